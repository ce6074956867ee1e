"""Claims about speed, memory and learning, measured: every figure is a ratio of things measured in turn in one run.

`zeroth.py`, `estimator.py`, `rollouts/` and `grid.py` are what `reroll bench` runs, `demo.py` what the demo compares;
`claims.py` is the table of `reroll reproduce`, and `experiments/` measure its rows. `harness.py` and `cases.py` are
what they share.
"""

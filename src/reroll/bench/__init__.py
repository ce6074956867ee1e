"""Measurements of speed, memory and learning: every figure is a ratio of quantities measured alternately in one run.

`reroll bench` runs `zeroth.py`, `estimator.py`, `rollouts/` and `grid.py`; `demo.py` is the comparison of the demo;
`claims.py` is the table of `reroll reproduce`, and `experiments/` measures its rows. They share `harness.py` and
`cases.py`.
"""

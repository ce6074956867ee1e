"""Claims about speed, memory and learning, measured: every figure is a ratio of things measured in turn in one run.

`zeroth.py` times and weighs a CD-RGE step, `estimator.py` holds its gradient against autograd's, `memory.py` compares
it with backpropagation, `claims.py` is the table that `reroll reproduce` prints, `experiments/` are the published
experiments on parallel-in-time evaluation.
"""

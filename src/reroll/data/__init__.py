"""What to learn: tasks, whose batches are a pure function of (seed, step), with their loss and their score.

`task.py` defines a task. `synthetic.py` draws sequences from a key; `text.py` reads what `corpus.py` finds,
`tokenizers.py` encodes and `cache.py` stores; `arrays.py` learns the series that `series.py` and `tables.py` read.
"""

"""What to learn: tasks that give batches as a pure function of (seed, step), with their loss and their score.

`task.py` says what a task is. `synthetic.py` draws sequences from a key; `text.py` reads what `corpus.py` finds,
`tokenizers.py` encodes and `cache.py` stores; `arrays.py` learns the series that `series.py` and `tables.py` read.
"""

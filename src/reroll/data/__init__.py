"""What to learn: tasks that give batches as a pure function of (seed, step), with their loss and their score.

`task.py` says what a task is. `synthetic.py` draws sequences from a key; `text.py` reads text, found by `corpus.py`,
encoded by `tokenizers.py`, kept by `cache.py`, measured by `measures.py`; `arrays.py` learns the series of `series.py`.
"""

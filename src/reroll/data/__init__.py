"""What to learn: tasks that give batches as a pure function of (seed, step), with their loss and their score.

`task.py` says what a task is; `synthetic.py` generates sequences from a key, `text.py` reads text, `arrays.py` series.
"""

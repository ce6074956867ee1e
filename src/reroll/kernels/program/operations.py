"""The operations of a program, numbered, and how many rows one block of it has."""

ROWS = 64
"""Rows of a block."""
OPERATIONS = (
    "load", "copy", "add", "sub", "mul", "div", "add_c", "mul_c", "rsub_c", "rdiv_c", "sigmoid", "tanh", "relu", "step",
    "addcmul", "addcmul_c", "linear", "fill", "gather", "store", "exp", "log", "sqrt", "sin", "cos",
    "log1p", "softplus",
)  # fmt: skip
CODE = {name: number for number, name in enumerate(OPERATIONS)}

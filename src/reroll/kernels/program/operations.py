"""The operations of a program, one row each; all but how they are carried out (`cpu.py`) is derived from the rows.

A row says how many operands are registers, and what becomes of a cotangent g on the way back: what arrives at each of
them, from g, the result y, the operands, and in operations `…_c` the constant, a number per feature. What is written
here with +, · and functions works on tensors and on `Symbol`s, which write it down as further instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

ROWS = 64
"""Rows of a block."""

FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "sigmoid": lambda x, y: y - y * y,
    "tanh": lambda x, y: 1 - y * y,
    "relu": lambda x, y: y.sign(),
    "exp": lambda x, y: y,
    "log": lambda x, y: 1 / x,
    "log1p": lambda x, y: 1 / (1 + x),
    "sqrt": lambda x, y: 0.5 / y,
    "sin": lambda x, y: x.cos(),
    "cos": lambda x, y: -x.sin(),
    "softplus": lambda x, y: x.sigmoid(),
}
"""Functions of one number, by their names in torch: their slope at x, where they are y."""


class Operation(NamedTuple):
    """See the module."""

    operands: int
    back: Callable[..., tuple[Any, ...]] | None = None


def _function(slope: Callable[[Any, Any], Any]) -> Operation:
    return Operation(1, lambda g, y, x: (g * slope(x, y),))


TABLE = {
    "load": Operation(0),
    "fill": Operation(0),
    "gather": Operation(0),  # reads a list of registers, not a range
    "store": Operation(1),
    "linear": Operation(1),  # the transposed product on the way back; see `reverse.py`
    "add": Operation(2, lambda g, y, a, b: (g, g)),
    "sub": Operation(2, lambda g, y, a, b: (g, -g)),
    "mul": Operation(2, lambda g, y, a, b: (g * b, g * a)),
    "div": Operation(2, lambda g, y, a, b: (g / b, -(g / b * y))),
    "add_c": Operation(1, lambda g, y, a, constant: (g,)),
    "mul_c": Operation(1, lambda g, y, a, constant: (g * constant,)),
    "rsub_c": Operation(1, lambda g, y, a, constant: (-g,)),
    "rdiv_c": Operation(1, lambda g, y, a, constant: (-(g / a * y),)),
    "addcmul_c": Operation(2, lambda g, y, a, b, constant: (g, g * constant)),
    "sign": Operation(1),
    **{name: _function(slope) for name, slope in FUNCTIONS.items()},
    "sigmoid": Operation(1, lambda g, y, x: (g * (y * (1 - y)),)),  # the same but for rounding
}
NAMES = tuple(TABLE)
CODE = {name: number for number, name in enumerate(NAMES)}

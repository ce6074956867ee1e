"""The operations of a program, one row each; everything but their execution (`cpu.py`) is derived from the rows.

A row has the number of register operands and the backward rule: the cotangent of each operand from the cotangent g of
the result, the result y, the operands, and in operations `…_c` the constant, a number per feature. The rules work on
tensors and on `Symbol`s, which record them as further instructions.
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
"""Functions of one number, by their names in torch: their derivative at x, where their value is y."""


class Operation(NamedTuple):
    """See the module."""

    operands: int
    back: Callable[..., tuple[Any, ...]] | None = None


def _function(derivative: Callable[[Any, Any], Any]) -> Operation:
    return Operation(1, lambda g, y, x: (g * derivative(x, y),))


TABLE = {
    "load": Operation(0),
    "fill": Operation(0),
    "gather": Operation(0),  # reads a list of registers, not a range
    "store": Operation(1),
    "linear": Operation(1),  # backward: the transposed product; see `reverse.py`
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
    **{name: _function(derivative) for name, derivative in FUNCTIONS.items()},
    "sigmoid": Operation(1, lambda g, y, x: (g * (y * (1 - y)),)),  # the same but for rounding
}
NAMES = tuple(TABLE)
CODE = {name: number for number, name in enumerate(NAMES)}

"""The derivative of a program, as more instructions of the same program: reverse accumulation over its registers.

    back = reverse(builder, outputs, cotangents, wrt)        registers of (∂outputs/∂wrt)ᵀ cotangents

Instructions are gone through from the last to the first. Of each register that depends on `wrt` it is known which other
register holds its cotangent; an instruction takes those of its results, and adds to those of its operands. What is
copied or chosen (`gather`) needs no instruction at all, unless something chose the same register before.

Reference: Griewank and Walther, "Evaluating Derivatives", 2008, chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.program import Builder, reads
from reroll.kernels.program.operations import CODE, OPERATIONS

Range = tuple[int, int]


def reverse(builder: Builder, outputs: Sequence[Range], cotangents: Sequence[int], wrt: Range) -> int | None:
    """Write the product of a transposed Jacobian and return its first register, or None where it is zero.

    Args:
        builder: holds the program so far.
        outputs: (first register, features) of what is differentiated.
        cotangents: the first register of what multiplies each output, as many features.
        wrt: (first register, features) of what is differentiated by.
    """
    accumulated = _Cotangents(builder)
    for (first, features), given in zip(outputs, cotangents):
        accumulated.add(range(first, first + features), range(given, given + features))
    written = list(builder.instructions)
    depends = _dependent(builder, written, wrt)
    constants = np.concatenate(builder.constants) if builder.constants else np.zeros(0, np.float32)
    for code, first, a, b, c, features in reversed(written):
        name, results = OPERATIONS[code], range(first, first + features)
        if name in ("load", "step") or depends.isdisjoint(results) or not accumulated.any(results):
            continue
        arriving = accumulated.together(results)
        if name == "gather":
            chosen = builder.gathered[a : a + features]
            accumulated.add(chosen, range(arriving, arriving + features))
            continue
        for operand, part in _RULES[name](_Instruction(builder, constants, first, a, b, c, features), arriving):
            if not depends.isdisjoint(operand):
                first_part = part()
                accumulated.add(operand, range(first_part, first_part + len(operand)))
    inputs = range(wrt[0], sum(wrt))
    return accumulated.together(inputs) if accumulated.any(inputs) else None


class _Cotangents:
    """Which register holds the cotangent of which."""

    def __init__(self, builder: Builder):
        self.builder = builder
        self.of: dict[int, int] = {}

    def any(self, registers: range) -> bool:
        return any(register in self.of for register in registers)

    def together(self, registers: range) -> int:
        """Return the first of adjacent registers that hold the cotangents of these."""
        held = [self.of.get(register) for register in registers]
        if None in held:
            zero = self.builder.emit("fill", 1, 0, self.builder.constant(torch.zeros(1)))
            held = [zero if register is None else register for register in held]
        return self.builder.adjacent([register for register in held if register is not None])

    def add(self, registers: Sequence[int], parts: Sequence[int]) -> None:
        """Add parts to the cotangents of registers, of which some may be named several times."""
        left = list(zip(registers, parts))
        while left:
            now, later, seen = [], [], set()
            for register, part in left:
                if register in seen:
                    later.append((register, part))
                elif register in self.of:
                    now.append((register, part))
                else:
                    self.of[register] = part
                seen.add(register)
            if now:
                old = self.builder.adjacent([self.of[register] for register, _ in now])
                new = self.builder.adjacent([part for _, part in now])
                first = self.builder.emit("add", len(now), old, new)
                self.of.update((register, first + i) for i, (register, _) in enumerate(now))
            left = later


def _dependent(builder: Builder, written: list[tuple[int, ...]], wrt: Range) -> set[int]:
    """Return the registers whose values depend on those of `wrt`."""
    gathered = np.array(builder.gathered, np.int64)
    depends = set(range(wrt[0], sum(wrt)))
    for row in written:
        if not depends.isdisjoint(reads(row, gathered)):
            depends.update(range(row[1], row[1] + row[5]))
    return depends


# ---- rules: an instruction and the cotangent of its results → what arrives at each operand


class _Instruction:
    """One instruction y ← a op b, and the emission of others of its size."""

    def __init__(self, builder: Builder, constants: np.ndarray, y: int, a: int, b: int, c: int, features: int):
        self.builder, self.constants = builder, constants
        self.y, self.a, self.b, self.c, self.features = y, a, b, c, features

    def at(self, first: int) -> range:
        return range(first, first + self.features)

    def emit(self, name: str, a: int, b: int = 0) -> int:
        return self.builder.emit(name, self.features, a, b)

    def with_number(self, name: str, a: int, number: float) -> int:
        return self.emit(name, a, self.builder.constant(torch.full((self.features,), number)))

    def negated(self, a: int) -> int:
        return self.with_number("mul_c", a, -1.0)

    def kept(self, begin: int, count: int) -> Tensor:
        """Return constants of the program."""
        return torch.from_numpy(self.constants[begin : begin + count])


Arriving = list[tuple[range, Callable[[], int]]]


def _add(i: _Instruction, g: int) -> Arriving:
    return [(i.at(i.a), lambda: g), (i.at(i.b), lambda: g)]


def _sub(i: _Instruction, g: int) -> Arriving:
    return [(i.at(i.a), lambda: g), (i.at(i.b), lambda: i.negated(g))]


def _mul(i: _Instruction, g: int) -> Arriving:
    return [(i.at(i.a), lambda: i.emit("mul", g, i.b)), (i.at(i.b), lambda: i.emit("mul", g, i.a))]


def _div(i: _Instruction, g: int) -> Arriving:
    def below() -> int:
        return i.negated(i.emit("mul", i.emit("div", g, i.b), i.y))

    return [(i.at(i.a), lambda: i.emit("div", g, i.b)), (i.at(i.b), below)]


def _addcmul(i: _Instruction, g: int) -> Arriving:
    return [
        (i.at(i.a), lambda: g), (i.at(i.b), lambda: i.emit("mul", g, i.c)), (i.at(i.c), lambda: i.emit("mul", g, i.b))
    ]  # fmt: skip


def _addcmul_c(i: _Instruction, g: int) -> Arriving:
    return [(i.at(i.a), lambda: g), (i.at(i.b), lambda: i.emit("mul_c", g, i.c))]


def _linear(i: _Instruction, g: int) -> Arriving:
    """y = W a + bias with constants W, row by row, from b on; a has c features."""

    def back() -> int:
        transposed = i.kept(i.b, i.features * i.c).view(i.features, i.c).T
        at = i.builder.constant(torch.cat([transposed.reshape(-1), torch.zeros(i.c)]))
        return i.builder.emit("linear", i.c, g, at, i.features)

    return [(range(i.a, i.a + i.c), back)]


def _one(derivative: Callable[[_Instruction, int], int]) -> Callable[[_Instruction, int], Arriving]:
    """The rule of a function of one operand, from what becomes of a cotangent."""
    return lambda i, g: [(i.at(i.a), lambda: derivative(i, g))]


_RULES: dict[str, Callable[[_Instruction, int], Arriving]] = {
    "copy": _one(lambda i, g: g), "add": _add, "sub": _sub, "mul": _mul, "div": _div,
    "add_c": _one(lambda i, g: g), "mul_c": _one(lambda i, g: i.emit("mul_c", g, i.b)),
    "rsub_c": _one(lambda i, g: i.negated(g)),
    "rdiv_c": _one(lambda i, g: i.negated(i.emit("mul", i.emit("div", g, i.a), i.y))),
    "sigmoid": _one(lambda i, g: i.emit("mul", g, i.emit("mul", i.y, i.with_number("rsub_c", i.y, 1.0)))),
    "tanh": _one(lambda i, g: i.emit("mul", g, i.with_number("rsub_c", i.emit("mul", i.y, i.y), 1.0))),
    "relu": _one(lambda i, g: i.emit("mul", g, i.emit("step", i.a))),
    "addcmul": _addcmul, "addcmul_c": _addcmul_c, "linear": _linear, "fill": lambda i, g: [],
    "exp": _one(lambda i, g: i.emit("mul", g, i.y)), "log": _one(lambda i, g: i.emit("div", g, i.a)),
    "sqrt": _one(lambda i, g: i.with_number("mul_c", i.emit("div", g, i.y), 0.5)),
    "sin": _one(lambda i, g: i.emit("mul", g, i.emit("cos", i.a))),
    "cos": _one(lambda i, g: i.negated(i.emit("mul", g, i.emit("sin", i.a)))),
    "softplus": _one(lambda i, g: i.emit("mul", g, i.emit("sigmoid", i.a))),
    "log1p": _one(lambda i, g: i.emit("div", g, i.with_number("add_c", i.a, 1.0))),
}  # fmt: skip
assert _RULES.keys() == CODE.keys() - {"load", "gather", "step", "store"}

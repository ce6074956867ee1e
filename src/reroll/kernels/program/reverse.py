"""The derivative of a program, as more instructions of the same program: reverse accumulation over its registers.

    back = reverse(builder, outputs, cotangents, wrt)        registers of (∂outputs/∂wrt)ᵀ cotangents

Instructions are visited from the last to the first. A table maps each register to the one that holds its cotangent; an
instruction reads the cotangents of its results and adds to those of its operands. A copy (`gather`) needs no
instruction, unless the same register already has a cotangent. Instructions whose results are not needed are emitted
too; `Builder.finish` drops them.

Reference: Griewank and Walther, "Evaluating Derivatives", 2008, chapter 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from reroll.kernels.program import Builder
from reroll.kernels.program.operations import NAMES, TABLE
from reroll.kernels.program.symbol import Symbol

Range = tuple[int, int]


def reverse(builder: Builder, outputs: Sequence[Range], cotangents: Sequence[int], wrt: Range) -> int | None:
    """Emit the product with a transposed Jacobian and return its first register, or None where it is zero.

    Args:
        builder: holds the program so far.
        outputs: (first register, features) of what is differentiated.
        cotangents: the first register of the cotangent of each output, which has as many features.
        wrt: (first register, features) of the variables.
    """
    table = _Cotangents(builder)
    for (first, features), g in zip(outputs, cotangents):
        table.add(range(first, first + features), range(g, g + features))
    constants = torch.from_numpy(np.concatenate([*builder.constants, np.zeros(0, np.float32)]))
    for code, first, *columns, features in reversed(list(builder.instructions)):
        name, results = NAMES[code], range(first, first + features)
        operands, back = TABLE[name]
        if not table.any(results) or (back is None and name not in ("gather", "linear")):
            continue
        cotangent = table.of_all(results)
        if name == "gather":
            table.add(builder.gathered[columns[0] : columns[0] + features], cotangent)
            continue
        g = Symbol(builder, torch.tensor([cotangent]))
        if back is None:
            a, weight, inputs = columns
            matrix = constants[weight : weight + features * inputs].view(features, inputs)
            table.add(range(a, a + inputs), functional.linear(g, matrix.T).registers)  # type: ignore[arg-type]: a Symbol, which torch dispatches
            continue
        arguments = [Symbol.range(builder, column, features) for column in (first, *columns[:operands])]
        constant = [constants[columns[operands] :][:features]] if name.endswith("_c") else []
        for column, part in zip(columns, back(g, *arguments, *constant)):
            table.add(range(column, column + features), part.registers)
    inputs = range(wrt[0], sum(wrt))
    return builder.adjacent(table.of_all(inputs)) if table.any(inputs) else None


class _Cotangents:
    """The registers that hold the cotangents of others."""

    def __init__(self, builder: Builder):
        self.builder = builder
        self.of: dict[int, int] = {}

    def any(self, registers: range) -> bool:
        return any(register in self.of for register in registers)

    def of_all(self, registers: range) -> list[int]:
        """Return the cotangents of registers, zero for those that have none."""
        if self.of.keys() >= set(registers):
            return [self.of[register] for register in registers]
        zero = self.builder.emit("fill", 1, 0, self.builder.constant(torch.zeros(1)))
        return [self.of.get(register, zero) for register in registers]

    def add(self, registers: Sequence[int], parts: Sequence[int]) -> None:
        """Add parts to the cotangents of registers, some of which may occur several times."""
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

"""A short straight-line program of elementwise functions and small products, run over many rows at once.

    builder = Builder()
    x = builder.input(tensor)                 [M, rows] → the first of M registers
    y = builder.emit("sigmoid", M, x)
    program = builder.finish([(y, M)])
    program.run(out)                          [features of all outputs, rows]

torch carries out one operation after another over memory that does not stay in the cache, each with the cost of a call.
A program goes through blocks of 64 rows instead and does all of its operations on one block, in the first cache, before
the next; it runs on the CPU, in float32, without a gradient.

An instruction works on M features at once: dst ← a op b. Operands are registers (a range of M), constants (a number per
feature) or one number.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.program.operations import CODE, ROWS, TABLE
from reroll.kernels.threads import split

MINIMUM = 1 << 12
"""Numbers of work per thread that are worth another one."""


@dataclass
class Builder:
    """Collects instructions. Registers are numbered from 0, one per feature, and written once."""

    instructions: list[tuple[int, ...]] = field(default_factory=list)
    constants: list[np.ndarray] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    gathered: list[int] = field(default_factory=list)
    known: dict[int, Any] = field(default_factory=dict)
    """What `Symbol` has loaded, by the identity of the tensor."""
    firsts: list[int] = field(default_factory=list)
    registers: int = 0
    numbers: int = 0

    @property
    def rows(self) -> int:
        return self.inputs[0].shape[1]

    def emit(self, name: str, features: int, a: int = 0, b: int = 0, c: int = 0) -> int:
        """Add an instruction and return its first result register."""
        first = self.registers
        self.firsts.append(first)
        self.instructions.append((CODE[name], first, a, b, c, features))
        self.registers += features
        return first

    def adjacent(self, registers: list[int]) -> int:
        """Return the first of adjacent registers with these values: copies, unless one instruction wrote them all."""
        first, last = registers[0], registers[-1]
        # Registers that different instructions wrote lie apart once the program is packed.
        of_one = bisect.bisect_right(self.firsts, first) == bisect.bisect_right(self.firsts, last)
        if of_one and registers == list(range(first, first + len(registers))):
            return first
        begin = len(self.gathered)
        self.gathered += registers
        return self.emit("gather", len(registers), begin)

    def constant(self, values: Tensor) -> int:
        """Keep numbers and return where they begin."""
        array = values.detach().to(torch.float32).reshape(-1).contiguous().numpy()
        begin = self.numbers
        self.constants.append(array)
        self.numbers += array.size
        return begin

    def input(self, tensor: Tensor) -> int:
        """Return the registers that hold an input [M, rows], contiguous."""
        self.inputs.append(tensor)
        return self.emit("load", tensor.shape[0], len(self.inputs) - 1)

    def finish(self, outputs: list[tuple[int, int]]) -> Program:
        """Return the program whose outputs are these ranges (first register, features), one after another.

        It holds the instructions that they need. A builder can finish several programs, which share its inputs.
        """
        row, stores = 0, []
        for first, features in outputs:
            stores.append((CODE["store"], row, first, 0, 0, features))
            row += features
        constants = np.concatenate(self.constants) if self.constants else np.zeros(1, np.float32)
        gathered = np.array([*self.gathered, 0], np.int64)
        table = np.array(_needed(self.instructions, stores, gathered), np.int64).reshape(-1, 6)
        table, gathered, registers = _packed(table, gathered)
        return Program(table, gathered, constants, self.inputs, registers, row)


@dataclass(frozen=True)
class Program:
    """What `Builder.finish` returns: `table` [instructions, 6], registers to gather, constants, inputs, and sizes."""

    table: np.ndarray
    gathered: np.ndarray
    constants: np.ndarray
    inputs: list[Tensor]
    registers: int
    outputs: int

    @property
    def code(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the interpreter reads."""
        return self.table, self.gathered, self.constants

    def run(self, out: Tensor, begin: int = 0, state: Tensor | None = None) -> None:
        """Run over the rows begin … of the inputs.

        Args:
            out: [outputs, rows], contiguous; it says how many rows.
            begin: first row of the inputs.
            state: takes the place of the first input, from its own first row on.
        """
        from reroll.kernels.program.cpu import run

        tensors = list(self.inputs)
        starts = np.full(len(tensors), begin, np.int64)
        if state is not None:
            tensors[0], starts[0] = state, 0
        # The inputs lie where they lie: the kernel is told where each begins, from the first one on.
        addresses = np.array([t.data_ptr() for t in tensors], np.int64)
        strides = np.array([t.shape[1] for t in tensors], np.int64)
        array = out.numpy()
        rows = out.shape[1]
        blocks = -(-rows // ROWS)

        def work(first: int, last: int) -> None:
            run(self.code, self.registers, (addresses, strides, starts), array, first, last)

        split(work, blocks, max(1, MINIMUM // (ROWS * max(1, self.outputs))))


def _needed(
    instructions: list[tuple[int, ...]], stores: list[tuple[int, ...]], gathered: np.ndarray
) -> list[tuple[int, ...]]:
    """Return the instructions whose results are stored in the end, and the stores."""
    wanted: set[int] = {register for row in stores for register in reads(row, gathered)}
    kept = []
    for row in reversed(instructions):
        if not wanted.isdisjoint(range(row[1], row[1] + row[5])):
            wanted.update(reads(row, gathered))
            kept.append(row)
    return kept[::-1] + stores


def _packed(table: np.ndarray, gathered: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Let registers be used again after their last use, so that a block's stay in the first cache.

    Memory is taken and given back by whole results: an instruction may read some of the registers that another wrote,
    and expects them where they lay beside each other.
    """
    writes = {number: (int(row[1]), int(row[5])) for number, row in enumerate(table) if row[0] != CODE["store"]}
    owner = {register: number for number, (first, count) in writes.items() for register in range(first, first + count)}
    read = [{owner[register] for register in reads(row, gathered)} for row in table.tolist()]
    last = {number: number for number in range(len(table))}
    for number, writers in enumerate(read):
        last.update(dict.fromkeys(writers, number))
    table, gathered, place, top = table.copy(), gathered.copy(), {}, 0
    free: dict[int, list[int]] = {}  # places to write to again, by their number of registers

    def moved(register: int) -> int:
        writer = owner[register]
        return place[writer] + register - writes[writer][0]

    for number, row in enumerate(table):
        if row[0] == CODE["gather"]:
            at = slice(row[2], row[2] + row[5])
            gathered[at] = [moved(int(register)) for register in gathered[at]]
        for column in _columns(row[0]):
            row[column] = moved(int(row[column]))
        if number in writes:
            count = writes[number][1]
            if free.get(count):
                place[number] = free[count].pop()
            else:
                place[number], top = top, top + count
            row[1] = place[number]
        # Only now, as no instruction may write over what it reads; what nobody reads is free at once.
        for writer in read[number] | (writes.keys() & {number}):
            if last[writer] == number:
                free.setdefault(writes[writer][1], []).append(place[writer])
    return table, gathered, top


_OPERANDS = [operation.operands for operation in TABLE.values()]


def _columns(code: int) -> range:
    """The columns of an instruction that name registers it reads."""
    return range(2, 2 + _OPERANDS[code])


def reads(row: Sequence[int], gathered: np.ndarray) -> list[int]:
    """The registers that an instruction reads."""
    code, *_, features = row
    if code == CODE["gather"]:
        return gathered[row[2] : row[2] + features].tolist()
    count = row[4] if code == CODE["linear"] else features  # of a product, column 4 is the number of its inputs
    return [row[column] + i for column in _columns(code) for i in range(count)]

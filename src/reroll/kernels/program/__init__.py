"""A short straight-line program of elementwise functions and small products, run over many rows at once.

    builder = Builder()
    x = builder.input(tensor)                 [M, rows] → the first of M registers
    y = builder.emit("sigmoid", M, x)
    program = builder.finish([(y, M)])
    program.run(out)                          [features of all outputs, rows]

torch runs one operation after another over arrays that do not fit the cache, each with the cost of a call. A program
runs all of its operations on one block of 64 rows, in the L1 cache, before it goes on to the next block; it runs on the
CPU, in float32, without a gradient.

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
    loaded: dict[int, Any] = field(default_factory=dict)
    """The tensors that `Symbol.load` has made inputs, by their identity."""
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
        # Results of different instructions are not adjacent once registers are allocated.
        of_one = bisect.bisect_right(self.firsts, first) == bisect.bisect_right(self.firsts, last)
        if of_one and registers == list(range(first, first + len(registers))):
            return first
        begin = len(self.gathered)
        self.gathered += registers
        return self.emit("gather", len(registers), begin)

    def constant(self, values: Tensor) -> int:
        """Add numbers to the constants and return the position of the first."""
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

        It has only the instructions that they need. A builder can finish several programs, which share its inputs.
        """
        row, stores = 0, []
        for first, features in outputs:
            stores.append((CODE["store"], row, first, 0, 0, features))
            row += features
        constants = np.concatenate(self.constants) if self.constants else np.zeros(1, np.float32)
        gathered = np.array([*self.gathered, 0], np.int64)
        table = np.array(_needed(self.instructions, stores, gathered), np.int64).reshape(-1, 6)
        table, gathered, registers = _allocate(table, gathered)
        return Program(table, gathered, constants, self.inputs, registers, row)


@dataclass(frozen=True)
class Program:
    """The result of `Builder.finish`: `table` [instructions, 6], registers to gather, constants, inputs, and sizes."""

    table: np.ndarray
    gathered: np.ndarray
    constants: np.ndarray
    inputs: list[Tensor]
    registers: int
    outputs: int

    @property
    def code(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The arguments of the interpreter."""
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
        # The inputs are not copied: the kernel gets the address of each.
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
    needed = []
    for row in reversed(instructions):
        if not wanted.isdisjoint(range(row[1], row[1] + row[5])):
            wanted.update(reads(row, gathered))
            needed.append(row)
    return needed[::-1] + stores


def _allocate(table: np.ndarray, gathered: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Allocate registers: reuse them after their last read, so that those of a block fit the L1 cache.

    Whole results are allocated and freed: an instruction may read some of the registers that another wrote, and expects
    them to be adjacent still.
    """
    writes = {number: (int(row[1]), int(row[5])) for number, row in enumerate(table) if row[0] != CODE["store"]}
    owner = {register: number for number, (first, count) in writes.items() for register in range(first, first + count)}
    read = [{owner[register] for register in reads(row, gathered)} for row in table.tolist()]
    last = {number: number for number in range(len(table))}
    for number, writers in enumerate(read):
        last.update(dict.fromkeys(writers, number))
    table, gathered, place, top = table.copy(), gathered.copy(), {}, 0
    free: dict[int, list[int]] = {}  # freed places, by their number of registers

    def allocated(register: int) -> int:
        writer = owner[register]
        return place[writer] + register - writes[writer][0]

    for number, row in enumerate(table):
        if row[0] == CODE["gather"]:
            at = slice(row[2], row[2] + row[5])
            gathered[at] = [allocated(int(register)) for register in gathered[at]]
        for column in _columns(row[0]):
            row[column] = allocated(int(row[column]))
        if number in writes:
            count = writes[number][1]
            if free.get(count):
                place[number] = free[count].pop()
            else:
                place[number], top = top, top + count
            row[1] = place[number]
        # Freed only now, as no instruction may overwrite its operands; a result that nothing reads is free at once.
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

"""A step of a cell, and its Jacobian, as a program that runs over rows without coming back to Python.

    step, whole = compile_step(cell, layout, inputs, "diagonal")
    step.run(out, begin, state)               out [D, rows]: next states
    whole.run(out, begin, state)              out [2D, rows]: next states, and the diagonal

The cell's code runs once on `Tracked` values whose tensors are `Symbol`s: these record the operations applied to them,
and the rules that derive the Jacobian record its operations too. What depends on the inputs alone is computed by torch,
for all steps, beforehand. A cell that does what a program cannot is run operation by operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.cells.base import Cell
from reroll.cells.jacobian import MISTAKES, OTHER_VALUES, OWN_DERIVATIVE, band, why_untrackable
from reroll.cells.layout import Layout
from reroll.cells.tracked import Tracked
from reroll.kernels.program import Builder, Program
from reroll.kernels.program.reverse import reverse
from reroll.kernels.program.symbol import Symbol, Untrackable

DENSE_OUTPUTS = 1100
"""Entries of a Jacobian per row up to which a program computes dense ones."""


def compile_step(
    cell: Cell, layout: Layout, inputs: Tensor, structure: str | None, blocks: int = 1
) -> tuple[Program, Program] | None:
    """Compile a step to a program, alone and with its Jacobian; return None if that is not possible.

    Args:
        cell, layout: the recurrence.
        inputs: projected inputs of all steps, [rows, U], feature-major, float32 on a CPU.
        structure, blocks: of the Jacobian, as in `jacobian.linearise`; None for none.

    Returns:
        Two programs whose first input is the state. The first outputs the D next states, the second these and the
        entries of the Jacobian, [D], [K·K·C] or [D·D]. Without a structure they are the same.
    """
    if (reason := why_untrackable(cell)) == OTHER_VALUES or (structure is not None and reason == OWN_DERIVATIVE):
        return None
    if structure == "dense" and layout.size**2 > DENSE_OUTPUTS:
        return None
    if structure == "block" and (len(layout.sizes) != blocks or len(set(layout.sizes)) > 1):
        return None
    builder, size = Builder(), layout.size
    value: Any = Symbol.range(builder, builder.input(torch.empty(size, len(inputs), device="meta")), size)
    try:
        state = Tracked(value, moves=True) if structure is None else Tracked.state(value)
        parts, following = _trace(builder, cell, layout, inputs, state)
        jacobian = [] if structure is None else _jacobian(builder, parts, layout, structure)
    except (Untrackable, *MISTAKES):
        return None
    step = builder.finish(following)
    return step, builder.finish(following + jacobian) if jacobian else step


def compile_adjoint(cell: Cell, layout: Layout, inputs: Tensor, states: Tensor, cotangent: Tensor) -> Program | None:
    """Compile g ← Aᵀ g + c to a program whose first input is g, [D, rows]; return None if that is not possible.

    A is the Jacobian of the step at `states`, c the `cotangent`, both [D, rows]; `inputs` are as in `compile_step`.
    """
    if why_untrackable(cell) in (OTHER_VALUES, OWN_DERIVATIVE):
        return None
    size, rows = states.shape
    builder = Builder()
    first = builder.input(torch.empty(size, rows, device="meta"))
    before, arriving = builder.input(states), builder.input(cotangent)
    value: Any = Symbol.range(builder, before, size)
    try:
        _, following = _trace(builder, cell, layout, inputs, Tracked(value, moves=True))
    except (Untrackable, *MISTAKES):
        return None
    begins = [first + sum(layout.sizes[:i]) for i in range(len(layout.sizes))]
    back = reverse(builder, following, begins, (before, size))
    return builder.finish([(arriving if back is None else builder.emit("add", size, arriving, back), size)])


def _trace(builder: Builder, cell: Cell, layout: Layout, inputs: Tensor, state: Any) -> tuple[Any, list]:
    """Return the parts of the next state, and the registers (first, count) they are in."""
    fixed: Any = Tracked(inputs)
    parts = layout.parts(cell.step(fixed, layout.unpack(state)))
    following = [_output(builder, part) for part in parts]
    if [features for _, features in following] != list(layout.sizes):
        raise Untrackable("a state of another shape")
    return parts, following


def _output(builder: Builder, part: Any) -> tuple[int, int]:
    value = part.value if isinstance(part, Tracked) else part
    symbol = value if isinstance(value, Symbol) else Symbol.load(builder, value)
    return symbol.first(), symbol.index.numel()


def _jacobian(builder: Builder, parts: Any, layout: Layout, structure: str) -> list[tuple[int, int]]:
    outputs, begins = [], [sum(layout.sizes[:i]) for i in range(len(layout.sizes))]
    for part, begin, size in zip(parts, begins, layout.sizes):
        if structure == "dense":
            columns = [_output(builder, band(part, torch.full((size,), j))) for j in range(layout.size)]
            # The Jacobian is laid out row by row: one feature of every column after another.
            outputs += [(first + i, 1) for i in range(size) for first, _ in columns]
        else:
            others = [begin] if structure == "diagonal" else begins
            outputs += [_output(builder, band(part, torch.arange(other, other + size))) for other in others]
    return outputs

"""The rollout that is likely the fastest, by static rules on the cell, the sizes and the device.

The rules come from `reroll bench rollouts` (figures in docs/results.md). They never look at a clock, so the same call
always makes the same choice; the last one and its reason are in `reroll.kernels.dispatch.report()["rollout"]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_features
from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.kernels import dispatch
from reroll.kernels.dispatch import Candidate
from reroll.rollout import native
from reroll.rollout.base import Rollout, Trajectory, check, has_tangent, is_transformed, uncompiled
from reroll.rollout.lengths import filled
from reroll.rollout.presets import deer, quasi_deer
from reroll.rollout.sequential import Sequential

SHORT = 256
"""Steps below which a loop is taken: too few to parallelise, or to pay for compiling."""
LIMITS = {
    "forward": (1 << 12, 256),
    "forward against a kernel": (1 << 11, 64),
    "gradient": (1 << 11, 512),
    "gradient against a kernel": (1 << 11, 128),
}
"""Batch size times state size, and state size, up to which a program is faster than torch's operations, or than a
library's kernel for whole sequences."""
FEW = 4 if get_host_cpu_features().get("amx-tile") else 3
"""Largest batch size that leaves vector registers unfilled; processors with AMX also multiply narrow batches faster."""
WIDE_FEW = 128
"""State size up to which a program is then faster, without a gradient."""
ALONE = 64
"""State size up to which a single sequence is faster in windows than step by step, without a gradient."""
TINY = 16
"""Batch size times state size up to which Newton's method in torch operations is faster than a loop of them, and a
compiled step than a library's kernel for whole sequences."""


@dataclass(frozen=True)
class Auto:
    """Chooses among `Sequential`, in all its kernels, `quasi_deer` and `deer` for every call.

    Args:
        options: keyword arguments of `Newton`, used where that is chosen.
    """

    options: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"auto({', '.join(f'{name}={value!r}' for name, value in self.options)})"

    @uncompiled
    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Trajectory:  # fmt: skip
        """Return all states; see `Rollout`."""
        check(cell, inputs)
        inputs = inputs if lengths is None else filled(inputs, lengths)[0]  # `choose` runs the step on some of them
        return self.choose(cell, inputs, state)(cell, inputs, state, reset, lengths)

    @uncompiled
    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Return the readouts and the final state; see `Rollout`."""
        check(cell, inputs)
        fused = reset is None and cell.can_fuse
        inputs = inputs if lengths is None else filled(inputs, lengths)[0]
        return self.choose(cell, inputs, state, fused=fused).read(cell, inputs, state, reset, lengths)

    def choose(self, cell: Cell, inputs: Tensor, state: State | None = None, *, fused: bool = False) -> Rollout:
        """Return the rollout for a cell and inputs of this shape on this device.

        Args:
            cell, inputs, state: of the call.
            fused: whether a library's kernel for whole sequences would be used by `Sequential`.
        """
        rollouts: dict[str, Rollout] = {
            "sequential": Sequential(), "compiled": Sequential(kernel="compiled"),
            "quasi_deer": quasi_deer(**dict(self.options)), "deer": deer(**dict(self.options)),
        }  # fmt: skip
        return rollouts[dispatch.choose("rollout", _candidates(cell, inputs, state, fused)).name]


def _candidates(cell: Cell, inputs: Tensor, state: State | None, fused: bool) -> tuple[Candidate, ...]:
    batch, time = inputs.shape[:2]
    if time < SHORT or batch == 0:
        return (Candidate("sequential", True, f"{time} steps of {batch} sequences are too few to parallelise"),)
    if has_tangent(inputs) or is_transformed(inputs) or any(map(is_transformed, cell.parameters())):
        return (Candidate("sequential", True, "torch.func and forward-mode derivatives go through a loop only"),)
    if inputs.device.type != "cpu" and not dispatch.is_mapped():
        return (Candidate("quasi_deer", True, f"{time} steps of {batch} sequences at once"),)
    gradient = torch.is_grad_enabled() and _any_gradient(cell, inputs, state)
    kernel = fused and cell.has_kernel
    if dispatch.is_mapped() or (kernel and (gradient or batch > 1)):
        return (Candidate("sequential", True, "a kernel for this cell's whole sequences, or a loop under vmap"),)
    examined = native.examine(cell, inputs)
    if examined is None:
        return (Candidate("sequential", True, "the step is random, mixes sequences or has no Jacobian"),)
    size = examined.size
    if not examined.compilable:
        return (
            Candidate("deer", batch * size <= TINY, "a small state, and a step that cannot be compiled"),
            Candidate("sequential", True, "the step cannot be compiled"),
        )
    if kernel and size > TINY:
        return (Candidate("sequential", True, "a kernel for this cell's whole sequences"),)
    numbers, features = LIMITS[("gradient" if gradient else "forward") + (" against a kernel" if fused else "")]
    if batch <= FEW and not gradient:
        features = min(features, WIDE_FEW)
    pays = batch * size <= numbers and size <= features
    windows = pays and batch == 1 and size <= ALONE and not gradient and not kernel
    return (
        Candidate("quasi_deer", windows, "one sequence alone: windows of steps at once"),
        Candidate("compiled", pays, "the step as a program, in compiled code"),
        Candidate("sequential", True, f"for {batch} × {size} numbers of state, torch's products are faster"),
    )


def _any_gradient(cell: Cell, inputs: Tensor, state: State | None) -> bool:
    parts = (state,) if isinstance(state, Tensor) else state or ()
    return any(tensor.requires_grad for tensor in (inputs, *parts, *cell.parameters()))


def auto(**options: Any) -> Auto:
    """Return a rollout that chooses; keyword arguments are those of `Newton`."""
    quasi_deer(**options)  # a wrong option raises here, not at the first long sequence
    return Auto(tuple(options.items()))

"""How a Newton iteration approximates the Jacobian A_t = ∂s_t/∂s_{t−1}: the choice that names the method.

    Dense()          all of it            DEER: quadratic convergence, B·T·D² numbers
    Block(K)         K×K per channel      for states of K parts of equal size, as an LSTM's (h, c)
    Diagonal()       the diagonal         quasi-DEER: linear convergence, B·T·D numbers
    Hutchinson(m)    the diagonal, estimated from m products with Aᵀ: for large states of unknown structure
    Identity()       1                    Picard
    Zero()           nothing              Jacobi

Each takes rows, steps outermost and sequences innermost, and returns the next states and the approximate Jacobian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeGuard, get_args

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.cells.base import Cell
from reroll.cells.jacobian import Structure
from reroll.cells.layout import Layout
from reroll.cells.tracked import Tracked
from reroll.errors import require_count
from reroll.kernels.noise_axpy import noise
from reroll.keys import Key

Kind = Literal["zero", "identity", "diagonal", "block", "dense"]

WINDOW_FLOATS = 1 << 18
"""Numbers of state in a window on a CPU, so that temporaries stay in the cache."""


class Transition(NamedTuple):
    """An approximate Jacobian of every step.

    Args:
        kind: its structure.
        tensor: [rows, D], [rows, K, K, C] or [rows, D, D]; None for "zero" and "identity".
    """

    kind: Kind
    tensor: Tensor | None = None


class Linearisation(Protocol):
    """An approximation of the Jacobian, and its structure."""

    kind: ClassVar[Kind]

    @property
    def every(self) -> int:
        """Iterations for which a Jacobian is used."""
        ...

    def __call__(
        self, cell: Cell, layout: Layout, u: Tracked, state: Tensor, steps: int, fresh: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return next states [rows, D] and their approximate Jacobian, [rows, …]; None: reuse the previous one.

        Args:
            cell, layout: the recurrence.
            u: projected inputs, [rows, U], with a tape.
            state: [rows, D].
            steps: T.
            fresh: whether to compute a new Jacobian.
        """
        ...


class Structured:
    """A Jacobian in a structure, derived from the operations of a step by torch or by compiled code."""

    kind: ClassVar[Kind]
    every: int = 1
    count: int | None = None

    @property
    def structure(self) -> Structure | None:
        """The structure in which the Jacobian is computed; None where none is."""
        return None if self.kind in ("zero", "identity") else self.kind

    def blocks(self, layout: Layout) -> int:
        """Return K, for a Jacobian in blocks."""
        return self.count or len(layout.sizes)

    def __call__(self, cell, layout, u, state, steps, fresh):
        if self.structure is None or not fresh:
            return jacobian.advance(cell, layout, u, state), None
        return jacobian.linearise(cell, layout, u, state, self.structure, self.blocks(layout))


@dataclass(frozen=True)
class Dense(Structured):
    """The whole Jacobian: Newton's method, DEER (Lim et al., arXiv:2309.12252)."""

    kind: ClassVar[Kind] = "dense"


@dataclass(frozen=True)
class Block(Structured):
    """The K×K block of every channel: feature c of part k by feature c of part l.

    Args:
        count: K; None takes the number of tensors in the state, which must have equal sizes.
    """

    count: int | None = None
    kind: ClassVar[Kind] = "block"


@dataclass(frozen=True)
class Diagonal(Structured):
    """The diagonal: quasi-DEER (Gonzalez et al., arXiv:2407.19115).

    Args:
        every: iterations for which a diagonal is used (the first, at the initial guess, for one only). Where the
            iteration converges fast the diagonal hardly changes, and a step without computing it costs half.
    """

    every: int = 1
    kind: ClassVar[Kind] = "diagonal"

    def __post_init__(self) -> None:
        require_count(every=self.every)


@dataclass(frozen=True)
class Hutchinson:
    """The diagonal estimated as the mean of v ∘ Aᵀv over m random signs v, the same at every iteration.

    The variance of entry i is Σ_{j≠i} A_ij² / m. With m = 1 the iteration can diverge where the exact diagonal does
    not; it costs m products per iteration, whatever D is.

    Args:
        products: m.
        seed: seed of the signs.
    """

    products: int = 4
    seed: int = 0
    kind: ClassVar[Kind] = "diagonal"
    every = 1

    def __post_init__(self) -> None:
        require_count(products=self.products)

    def __call__(self, cell, layout, u, state, steps, fresh):
        signs = [
            noise(Key(self.seed).at("hutchinson"), (steps, layout.size), m, "signs", dtype=state.dtype,
                  device=str(state.device))
            for m in range(self.products)
        ]  # fmt: skip
        repeated = torch.stack([v.repeat_interleave(len(state) // steps, 0) for v in signs])
        return jacobian.hutchinson(cell, layout, u.value, state, repeated)


@dataclass(frozen=True)
class Identity(Structured):
    """A ≈ 1: Picard iteration; good for small steps of a differential equation."""

    kind: ClassVar[Kind] = "identity"


@dataclass(frozen=True)
class Zero(Structured):
    """A ≈ 0: Jacobi iteration; good where a step forgets nearly everything."""

    kind: ClassVar[Kind] = "zero"


Compilable = Dense | Block | Diagonal | Identity | Zero


def is_compilable(linearise: Linearisation) -> TypeGuard[Compilable]:
    """Return whether compiled code has this linearisation; a subclass may do something else."""
    return type(linearise) in get_args(Compilable)

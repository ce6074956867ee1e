"""The Jacobian of a step in closed form, derived by running its code on values that carry their own derivative.

A `Tracked` is a tensor v [rows, …] together with ∂v/∂s, stored as a sum of

    diag(α) W               W the same at all rows, α different from row to row
    diag(α) L diag(β) W     a second linear map behind a nonlinearity

Elementwise functions multiply α, linear maps act on W (or start a second one), changes of shape apply to all of them.
So the diagonal of the Jacobian costs a few elementwise operations instead of D derivatives, and the whole Jacobian
costs row scalings. For a GRU the result is the formula one would derive by hand.

Values are feature-major in memory (the rows of a feature adjacent): `linearise` passes them so, and rules preserve it.
Ranges of features are then contiguous, which makes elementwise functions fast.

Code that does anything else (attention over a state, a third product in a row, a branch on values) raises
`Untrackable`, and derivatives are taken by automatic differentiation instead. The rules are in `rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reroll.kernels.program.symbol import Traced, Untrackable

RULES: dict[str, Callable[..., Any]] = {}
"""How each operation, by its name in torch, acts on tracked values; filled by `rules.py`."""
COMPOSED: dict[str, Callable[..., Any]] = {}
"""Operations that are written in terms of others."""
MOST = 32
"""Terms of a Jacobian up to which it is tracked; beyond, automatic differentiation is cheaper."""
PLAIN = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad", "dim", "size", "numel",
    "is_floating_point", "new_zeros", "new_ones", "new_empty", "new_full",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Term:
    """diag(α) W with `weight` Wᵀ, [D, …]; or, where there is an `inner` diag(β) W, diag(α) L inner with `weight` Lᵀ.

    `alpha` is [rows, …], None for ones. What has features (…) are `weight` and `alpha`, in either case.
    """

    weight: Tensor
    alpha: Tensor | None = None
    inner: Term | None = None


class Tape:
    """What a step computes from its inputs alone, recorded so that it is computed once for several runs."""

    def __init__(self) -> None:
        self.results: list[tuple[str, Any]] = []
        self.position = 0

    def play(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of the next operation, computed at the first run."""
        at, self.position = self.position, self.position + 1
        if at >= len(self.results) or self.results[at][0] != name:
            self.results[at:] = [(name, compute())]
        return self.results[at][1]


class Tracked(Traced):
    """A value and its Jacobian with respect to the state; see the module."""

    def __init__(
        self, value: Tensor, terms: Sequence[Term] = (), *, tape: Tape | None = None, moves: bool = False
    ):  # fmt: skip
        self.value, self.terms, self.tape = value, tuple(terms), tape
        self.moves = moves  # depends on the state, though no derivative is carried

    @classmethod
    def inputs(cls, rows: Tensor) -> Tracked:
        """Inputs, [rows, U], on which a step will be run several times."""
        return cls(rows, tape=Tape())

    @classmethod
    def state(cls, vector: Tensor) -> Tracked:
        """The state itself, [rows, D], with the identity as its derivative."""
        return cls(vector, [Term(torch.eye(vector.shape[-1], dtype=vector.dtype, device=vector.device))])

    @property
    def fixed(self) -> bool:
        """Whether this does not depend on the state: an input."""
        return not (self.terms or self.moves)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name) if name in PLAIN else super().__getattr__(name)

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> Tracked:
        """Apply a change of shape (or a choice of features) that leaves the first axis alone."""
        terms = [Term(change(p.weight), None if p.alpha is None else change(p.alpha), p.inner) for p in self.terms]
        return Tracked(change(self.value), terms)

    def scaled(self, value: Tensor, factor: Any) -> Tracked:
        """Return an elementwise function of this: its value, and its derivative by this, a number or tensor."""
        terms = self.expanded(value.shape).terms
        return Tracked(value, [replace(p, alpha=_times(p.alpha, factor, value)) for p in terms])

    def weighted(self, value: Tensor, factor: Any) -> Tracked:
        """Return the same for a factor that is equal at all rows: it goes into the weights of terms without an α."""
        terms = self.expanded(value.shape).terms
        return Tracked(
            value,
            [
                replace(p, weight=p.weight * factor) if p.alpha is None else replace(p, alpha=p.alpha * factor)
                for p in terms
            ],
        )

    def expanded(self, shape: torch.Size) -> Tracked:
        """Return this broadcast to a shape."""
        if self.value.shape == shape:
            return self
        if len(shape) != self.value.dim() or shape[0] != self.value.shape[0]:
            raise Untrackable(f"broadcasting {tuple(self.value.shape)} to {tuple(shape)}")
        return self.reshaped(lambda t: t.expand(t.shape[0], *shape[1:]))

    def mapped(self, value: Tensor, linear: Callable[[Tensor], Tensor]) -> Tracked:
        """Apply a linear map of the features, the same at all rows."""
        if any(p.inner is not None for p in self.terms):
            raise Untrackable("three products in a row")
        terms = [Term(linear(p.weight)) for p in self.terms if p.alpha is None]
        inners = [Term(p.weight.flatten(1), p.alpha.flatten(1)) for p in self.terms if p.alpha is not None]
        if inners:
            features = math.prod(self.value.shape[1:])
            identity = torch.eye(features, dtype=value.dtype, device=value.device)
            outer = linear(identity.reshape(features, *self.value.shape[1:]))
            terms += [Term(outer, None, inner) for inner in inners]
        return Tracked(value, terms)

    def plus(self, value: Tensor, other: Tracked) -> Tracked:
        """Return a sum of the two: its value is passed, its derivative is the sum of theirs."""
        a, b = self.expanded(value.shape), other.expanded(value.shape)
        terms = {(id(p.weight), id(p.inner)): p for p in a.terms}
        for p in b.terms:
            same = terms.get(key := (id(p.weight), id(p.inner)))
            terms[key] = p if same is None else replace(p, alpha=_sum(same.alpha, p.alpha, value))
        if len(terms) > MOST:
            raise Untrackable("a Jacobian of too many terms")
        return Tracked(value, list(terms.values()))

    @classmethod
    def call(cls, name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Carry out an operation on values of which some are tracked."""
        if name.endswith("_") and not name.endswith("__"):
            raise Untrackable(f"the change in place {name}")
        if name in COMPOSED:
            return COMPOSED[name](*args, **kwargs)
        lists = [x for argument in args if isinstance(argument, tuple | list) for x in argument]  # as of `cat`
        tracked = [x for x in (*args, *kwargs.values(), *lists) if isinstance(x, Tracked)]
        tape = tracked[0].tape if all(x.tape is not None for x in tracked) else None

        def compute() -> Any:
            if name in RULES:
                return RULES[name](function, *args, **kwargs)
            if lists or not all(x.fixed for x in tracked):
                raise Untrackable(f"the operation {name}")
            result = function(*map(value_of, args), **{key: value_of(x) for key, x in kwargs.items()})
            return Tracked(result) if isinstance(result, Tensor) and result.dtype != torch.bool else result

        result = compute() if tape is None else tape.play(name, compute)
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, Tracked):
                part.tape, part.moves = tape, part.moves or not all(x.fixed for x in tracked)
        return result


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    first, second = (torch.ones_like(like) if alpha is None else alpha for alpha in (a, b))
    return first + second


def _times(alpha: Tensor | None, factor: Any, like: Tensor) -> Tensor:
    if alpha is not None:
        return alpha * factor
    if getattr(factor, "shape", None) == like.shape:
        return factor
    return torch.ones_like(like) * factor


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Tracked) else x

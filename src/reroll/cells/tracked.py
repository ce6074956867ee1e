"""The Jacobian of a step in closed form, found by running its code on values that know how they depend on the state.

A `Tracked` is a tensor v [rows, …] together with ∂v/∂s, kept as a sum of

    terms     diag(α) W               W the same at all rows, α different from row to row
    chains    diag(β) L diag(α) W     a second linear map behind a nonlinearity

Elementwise functions multiply α and β, linear maps act on W (or begin a chain), shapes change on all of them alike. So
the diagonal of the Jacobian costs a few elementwise operations instead of D derivatives, and the whole Jacobian costs
row scalings. For a GRU what comes out is the formula one would derive by hand.

Values lie in memory feature by feature, rows next to one another ("feature-major"), as `linearise` gives them and every
rule here keeps them: pieces of the features are then contiguous, which is what makes elementwise functions fast.

Code that does anything else (attention over a state, a third product in a row, a branch on values) raises
`Untrackable`, and derivatives are taken by automatic differentiation instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

RULES: dict[str, Callable[..., Any]] = {}
"""How each operation, by its name in torch, acts on tracked values; `rules.py`, which is made of them, fills it in."""
MOST = 32
"""Pieces of a Jacobian that are followed; beyond, automatic differentiation is cheaper."""


class Untrackable(Exception):
    """The step does something whose Jacobian has no such form."""


@dataclass(frozen=True, eq=False)
class Term:
    """diag(α) W: `weight` is Wᵀ, [D, …]; `alpha` [rows, …], None for ones."""

    weight: Tensor
    alpha: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chain:
    """diag(β) L diag(α) W: `outer` is Lᵀ, [P, …]; `inner` the term with P features; `beta` [rows, …] or None."""

    outer: Tensor
    inner: Term
    beta: Tensor | None = None


class Tape:
    """What a step computes from its inputs alone, kept from one run of its code to the next."""

    def __init__(self) -> None:
        self.results: list[tuple[Any, Any]] = []
        self.position = 0

    def play(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result of the operation that comes, computed at the first run."""
        at, self.position = self.position, self.position + 1
        if at < len(self.results) and self.results[at][0] == name:
            return self.results[at][1]
        del self.results[at:]
        self.results.append((name, result := compute()))
        return result


class Tracked:
    """A value and its Jacobian with respect to the state; see the module."""

    def __init__(
        self, value: Tensor, terms: Sequence[Term], chains: Sequence[Chain] = (), *, tape: Tape | None = None,
        moves: bool = False,
    ):  # fmt: skip
        self.value, self.terms, self.chains, self.tape = value, tuple(terms), tuple(chains), tape
        self.moves = moves  # depends on the state, though no derivative is carried

    @classmethod
    def inputs(cls, rows: Tensor) -> Tracked:
        """Inputs, [rows, U], on which a step will be run several times."""
        return cls(rows, (), tape=Tape())

    @classmethod
    def state(cls, vector: Tensor) -> Tracked:
        """Begin with the state itself, [rows, D]."""
        return cls(vector, [Term(torch.eye(vector.shape[-1], dtype=vector.dtype, device=vector.device))])

    @property
    def flat(self) -> bool:
        """Whether there is no derivative to carry along."""
        return not (self.terms or self.chains)

    @property
    def fixed(self) -> bool:
        """Whether this does not depend on the state: an input."""
        return self.flat and not self.moves

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        return call(name, function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad"):
            return getattr(self.value, name)
        if name in ("dim", "size", "numel", "is_floating_point", "new_zeros", "new_ones", "new_empty", "new_full"):
            return getattr(self.value, name)
        function = getattr(Tensor, name)
        return lambda *args, **kwargs: call(name, function, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Tracked:
        index = index if isinstance(index, tuple) else (index,)
        rest = [i for i in index if i is not Ellipsis]
        # The rows' axis is left alone by [..., x] and [:, x]; anything else would mix rows.
        if index[0] is not Ellipsis and index[0] != slice(None):
            raise Untrackable(f"indexing rows with {index!r}")
        if any(not isinstance(i, int | slice) for i in rest) or len(rest) >= self.value.dim() + (index[0] != Ellipsis):
            raise Untrackable(f"indexing with {index!r}")
        if self.tape is not None:
            tape = self.tape
            return tape.play(f"[{index}]", lambda: _on_tape(self.reshaped(lambda t: t[index]), tape))
        found = self.reshaped(lambda t: t[index])
        found.moves = self.moves
        return found

    def reshaped(self, change: Callable[[Tensor], Tensor]) -> Tracked:
        """Apply a change of shape (or a choice of features) that leaves the first axis alone."""

        def term(t: Term) -> Term:
            return Term(change(t.weight), None if t.alpha is None else change(t.alpha))

        chains = [Chain(change(c.outer), c.inner, None if c.beta is None else change(c.beta)) for c in self.chains]
        return Tracked(change(self.value), [term(t) for t in self.terms], chains)

    def scaled(self, value: Tensor, factor: Any) -> Tracked:
        """Return something with this value whose derivative by what this is is `factor` (a number or tensor)."""
        fits = self.expanded(value.shape)
        terms = [Term(t.weight, _times(t.alpha, factor, value)) for t in fits.terms]
        return Tracked(value, terms, [replace(c, beta=_times(c.beta, factor, value)) for c in fits.chains])

    def expanded(self, shape: torch.Size) -> Tracked:
        """Return this broadcast to a shape."""
        if self.value.shape == shape:
            return self
        features = shape[1:]
        if len(shape) != self.value.dim() or shape[0] != self.value.shape[0]:
            raise Untrackable(f"broadcasting {tuple(self.value.shape)} to {tuple(shape)}")
        return self.reshaped(lambda t: t.expand(t.shape[0], *features))

    def mapped(self, value: Tensor, linear: Callable[[Tensor], Tensor]) -> Tracked:
        """Apply a linear map of the features, the same at all rows."""
        if self.chains:
            raise Untrackable("three products in a row")
        features = math.prod(self.value.shape[1:])
        terms = [Term(linear(t.weight)) for t in self.terms if t.alpha is None]
        bent = [t for t in self.terms if t.alpha is not None]
        if not bent:
            return Tracked(value, terms)
        identity = torch.eye(features, dtype=value.dtype, device=value.device)
        outer = linear(identity.reshape(features, *self.value.shape[1:]))
        chains = [Chain(outer, Term(t.weight.flatten(1), t.alpha.flatten(1))) for t in bent if t.alpha is not None]
        return Tracked(value, terms, chains)

    def plus(self, value: Tensor, other: Tracked) -> Tracked:
        """Return something with this value whose derivative is the sum of both."""
        a, b = self.expanded(value.shape), other.expanded(value.shape)
        terms: dict[int, Term] = {id(t.weight): t for t in a.terms}
        for t in b.terms:
            known = terms.get(id(t.weight))
            terms[id(t.weight)] = t if known is None else Term(t.weight, _sum(known.alpha, t.alpha, value))
        if len(terms) + len(a.chains) + len(b.chains) > MOST:
            raise Untrackable("a Jacobian of too many pieces")
        return Tracked(value, list(terms.values()), [*a.chains, *b.chains])

    __add__ = __radd__ = lambda self, other: call("add", torch.add, (self, other), {})
    __mul__ = __rmul__ = lambda self, other: call("mul", torch.mul, (self, other), {})
    __sub__ = lambda self, other: call("sub", torch.sub, (self, other), {})
    __rsub__ = lambda self, other: call("sub", torch.sub, (other, self), {})
    __truediv__ = lambda self, other: call("div", torch.div, (self, other), {})
    __rtruediv__ = lambda self, other: call("div", torch.div, (other, self), {})
    __neg__ = lambda self: call("neg", torch.neg, (self,), {})

    def __iadd__(self, other: Any) -> Any:
        # Without this, Python would bind the name anew, and other names for the value would keep the old one.
        raise Untrackable("an operation in place")

    __isub__ = __imul__ = __itruediv__ = __ipow__ = __iadd__
    __pow__ = lambda self, power: call("pow", torch.pow, (self, power), {})
    __matmul__ = lambda self, other: call("matmul", torch.matmul, (self, other), {})
    __rmatmul__ = lambda self, other: call("matmul", torch.matmul, (other, self), {})
    __abs__ = lambda self: call("abs", torch.abs, (self,), {})

    __hash__ = object.__hash__

    def __eq__(self, other: Any) -> Any:
        return self._compared("__eq__", other)

    def __ne__(self, other: Any) -> Any:
        return self._compared("__ne__", other)

    __lt__ = lambda self, other: self._compared("__lt__", other)
    __le__ = lambda self, other: self._compared("__le__", other)
    __gt__ = lambda self, other: self._compared("__gt__", other)
    __ge__ = lambda self, other: self._compared("__ge__", other)

    def _compared(self, how: str, other: Any) -> Tensor:
        """Compare inputs; a comparison of states would be a kink, or a branch."""
        if not self.fixed or (isinstance(other, Tracked) and not other.fixed):
            raise Untrackable("a comparison of states")
        return getattr(self.value, how)(value_of(other))

    def __bool__(self) -> bool:
        raise Untrackable("a branch on a value")

    __float__ = __int__ = __iter__ = __len__ = __bool__


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    first, second = (torch.ones_like(like) if alpha is None else alpha for alpha in (a, b))
    return first + second


def _times(alpha: Tensor | None, factor: Any, like: Tensor) -> Tensor:
    if alpha is not None:
        return alpha * factor
    if getattr(factor, "shape", None) == like.shape:
        return factor
    return torch.ones_like(like) * factor


# ---- operations


def call(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Carry out an operation on values of which some are tracked."""
    if name.endswith("_") and not name.endswith("__"):
        raise Untrackable(f"the change in place {name}")
    known = [x for x in (*args, *kwargs.values(), *_inside(args)) if isinstance(x, Tracked)]
    tapes = [x.tape for x in known]
    tape = tapes[0] if tapes and all(tape is not None for tape in tapes) else None
    if tape is not None:
        return tape.play(name, lambda: _on_tape(_carried_out(name, function, args, kwargs), tape))
    result = _carried_out(name, function, args, kwargs)
    if any(not x.fixed for x in known):
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, Tracked):
                part.moves = True
    return result


def _inside(args: Sequence[Any]) -> list[Any]:
    """The values in lists among the arguments, as of `cat`."""
    return [x for argument in args if isinstance(argument, tuple | list) for x in argument]


def _on_tape(result: Any, tape: Tape) -> Any:
    for part in result if isinstance(result, tuple) else (result,):
        if isinstance(part, Tracked):
            part.tape = tape
    return result


def _carried_out(name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    rule = RULES.get(name)
    if rule is not None:
        return rule(function, *args, **kwargs)
    tracked = [x for x in (*args, *kwargs.values()) if isinstance(x, Tracked)]
    if not tracked or not all(x.fixed for x in tracked):
        raise Untrackable(f"the operation {name}")
    result = function(*map(value_of, args), **{key: value_of(x) for key, x in kwargs.items()})
    return Tracked(result, ()) if isinstance(result, Tensor) else result


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Tracked) else x

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
from torch.nn import functional

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
    __eq__ = lambda self, other: self._compared("__eq__", other)  # type: ignore[assignment]
    __ne__ = lambda self, other: self._compared("__ne__", other)  # type: ignore[assignment]
    __lt__ = lambda self, other: self._compared("__lt__", other)
    __le__ = lambda self, other: self._compared("__le__", other)
    __gt__ = lambda self, other: self._compared("__gt__", other)
    __ge__ = lambda self, other: self._compared("__ge__", other)

    def _compared(self, how: str, other: Any) -> Tensor:
        """Compare inputs; a comparison of states would be a kink, or a branch."""
        if not self.fixed or (isinstance(other, Tracked) and not other.fixed):
            raise Untrackable("a comparison of states")
        return getattr(self.value, how)(_value(other))

    def __bool__(self) -> bool:
        raise Untrackable("a branch on a value")

    __float__ = __int__ = __iter__ = __len__ = __bool__  # type: ignore[assignment]


def _sum(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    ones = None
    if a is None or b is None:
        ones = torch.ones_like(like)
    return (ones if a is None else a) + (ones if b is None else b)  # type: ignore[operator]


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
    result = function(*map(_value, args), **{key: _value(x) for key, x in kwargs.items()})
    return Tracked(result, ()) if isinstance(result, Tensor) else result


def _run(function: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch, or the method of its name where the value is no tensor."""
    if isinstance(value, Tensor):
        return function(value, *args, **kwargs)
    return getattr(value, function.__name__)(*args, **kwargs)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Tracked) else x


def _sub(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Tracked:
    return _add(function, a, b, alpha=-alpha)


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Tracked:
    sign = alpha
    value = torch.add(_value(a), _value(b), alpha=sign)
    if isinstance(a, Tracked) and isinstance(b, Tracked):
        return a.plus(value, b if sign == 1 else b.scaled(b.value, sign))
    if isinstance(a, Tracked):
        fits = a.expanded(value.shape)
        return Tracked(value, fits.terms, fits.chains)
    return b.expanded(value.shape).scaled(value, sign) if sign != 1 else _add(function, b, a)


def _mul(function: Any, a: Any, b: Any) -> Tracked:
    value = _value(a) * _value(b)
    if isinstance(a, Tracked) and isinstance(b, Tracked) and not (a.flat or b.flat):
        return a.scaled(value, b.value.expand_as(value)).plus(value, b.scaled(value, a.value.expand_as(value)))
    moving = isinstance(a, Tracked) and (not a.flat or not isinstance(b, Tracked))
    known, factor = (a, _value(b)) if moving else (b, _value(a))
    if not isinstance(factor, Tensor) or factor.dim() < value.dim() or factor.shape[0] == 1:
        return _weighted(known, value, factor)
    return known.scaled(value, factor.expand_as(value))


def _weighted(known: Tracked, value: Tensor, factor: Any) -> Tracked:
    """A factor that is the same at all rows goes into the weights of what has no α yet."""
    fits = known.expanded(value.shape)
    terms = [Term(t.weight * factor) if t.alpha is None else Term(t.weight, t.alpha * factor) for t in fits.terms]
    chains = [
        replace(c, outer=c.outer * factor) if c.beta is None else replace(c, beta=c.beta * factor) for c in fits.chains
    ]
    return Tracked(value, terms, chains)


def _div(function: Any, a: Any, b: Any) -> Tracked:
    if not isinstance(b, Tracked):
        return _mul(function, a, 1 / b)
    inverse = 1 / b.value
    return _mul(function, a, b.scaled(inverse, -inverse * inverse))


def _linear(function: Any, x: Any, weight: Any, bias: Any = None) -> Tracked:
    if isinstance(weight, Tracked) or isinstance(bias, Tracked):
        raise Untrackable("weights that depend on the state")
    if not isinstance(x, Tracked):
        raise Untrackable("weights that depend on the state")
    return x.mapped(_product(x.value, weight, bias), lambda t: functional.linear(t, weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, feature-major if x is."""
    if x.dim() != 2 or x.stride(0) != 1:
        return functional.linear(x, weight, bias)
    return (weight @ x.T if bias is None else torch.addmm(bias.unsqueeze(1), weight, x.T)).T


def _matmul(function: Any, a: Any, b: Any) -> Tracked:
    if isinstance(b, Tracked) or not isinstance(a, Tracked) or b.dim() != 2:
        raise Untrackable("a product of states")
    return a.mapped(_product(a.value, b.T, None), lambda t: t @ b)


def _addmm(function: Any, bias: Any, x: Any, weight: Any) -> Tracked:
    return _add(torch.add, _matmul(function, x, weight), bias)


def _einsum(function: Any, equation: str, *operands: Any) -> Tracked:
    known = [i for i, x in enumerate(operands) if isinstance(x, Tracked)]
    inputs, _, output = equation.replace(" ", "").partition("->")
    if len(known) != 1 or not output.startswith("...") or not inputs.split(",")[known[0]].startswith("..."):
        raise Untrackable(f"einsum {equation!r}")
    if any("..." in part for i, part in enumerate(inputs.split(",")) if i != known[0]):
        raise Untrackable(f"einsum {equation!r}")

    def apply(t: Tensor) -> Tensor:
        return torch.einsum(equation, *operands[: known[0]], t, *operands[known[0] + 1 :])

    return operands[known[0]].mapped(apply(operands[known[0]].value), apply)


def _total(function: Any, x: Tracked, dim: Any = None, keepdim: bool = False) -> Tracked:
    if dim is None:
        raise Untrackable("a sum over rows")
    _features_only(x, dim)
    return x.mapped(_run(function, x.value, dim, keepdim), lambda t: function(t, dim, keepdim))


def _roll(function: Any, x: Tracked, shifts: Any, dims: Any = None) -> Tracked:
    _features_only(x, dims)
    return x.reshaped(lambda t: torch.roll(t, shifts, dims))


def _features_only(x: Tracked, *dims: Any) -> None:
    for dim in dims:
        for d in dim if isinstance(dim, tuple | list) else (dim,):
            if not isinstance(d, int) or d % x.value.dim() == 0:
                raise Untrackable(f"an operation along axis {dim}")


def _along(position: int, default: Any = None) -> Callable[..., Any]:
    """A change of shape whose axis is the argument at `position`; it may return several."""

    def rule(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Any:
        dim = kwargs.get("dim", args[position] if len(args) > position else default)
        if function is torch.unsqueeze or getattr(function, "__name__", "") == "unsqueeze":
            if not isinstance(dim, int) or dim % (x.value.dim() + 1) == 0:
                raise Untrackable("a new first axis")
        else:
            _features_only(x, dim)
        value = _run(function, x.value, *args, **kwargs)
        if not isinstance(value, tuple | list):
            return x.reshaped(lambda t: _run(function, t, *args, **kwargs))
        return tuple(x.reshaped(lambda t, i=i: _run(function, t, *args, **kwargs)[i]) for i in range(len(value)))

    return rule


def _flatten(function: Any, x: Tracked, start_dim: int = 0, end_dim: int = -1) -> Tracked:
    _features_only(x, start_dim)
    return x.reshaped(lambda t: t.flatten(start_dim, end_dim))


def _transpose(function: Any, x: Tracked, dim0: int, dim1: int) -> Tracked:
    _features_only(x, dim0, dim1)
    return x.reshaped(lambda t: t.transpose(dim0, dim1))


def _cat(function: Any, tensors: Sequence[Any], dim: int = 0) -> Tracked:
    known = [x for x in tensors if isinstance(x, Tracked)]
    _features_only(known[0], dim)
    if known[0].value.dim() != 2:
        raise Untrackable("cat of more than one feature axis")
    value = torch.cat([_value(x) for x in tensors], dim)
    width, begin, terms, chains = value.shape[1], 0, [], []
    for x in tensors:
        size = x.shape[1]
        if isinstance(x, Tracked):
            pad = (begin, width - begin - size)
            terms += [Term(_padded(t.weight, pad), _padded(t.alpha, pad)) for t in x.terms]
            chains += [Chain(_padded(c.outer, pad), c.inner, _padded(c.beta, pad)) for c in x.chains]
        begin += size
    return Tracked(value, terms, chains)


def _padded(t: Any, pad: tuple[int, int]) -> Any:
    return None if t is None else functional.pad(t, pad)


def _where(function: Any, condition: Any, a: Any, b: Any) -> Tracked:
    if isinstance(condition, Tracked) and not condition.fixed:
        raise Untrackable("where on a condition of the state")
    condition = _value(condition)
    value = torch.where(condition, _value(a), _value(b))
    mask = condition.to(value.dtype).expand_as(value)
    parts = [x.scaled(value, m) for x, m in ((a, mask), (b, 1 - mask)) if isinstance(x, Tracked)]
    return parts[0] if len(parts) == 1 else parts[0].plus(value, parts[1]) if parts else Tracked(value, ())


def _lerp(function: Any, a: Any, b: Any, weight: Any) -> Tracked:
    return _add(torch.add, a, _mul(torch.mul, weight, _sub(torch.sub, b, a)))


def _addcmul(function: Any, a: Any, b: Any, c: Any, *, value: float = 1) -> Tracked:
    product = b * c
    return _add(torch.add, a, product if value == 1 else product * value)


def _same(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Tracked:
    return x


def _smooth(derivative: Callable[[Tensor, Tensor], Any]) -> Callable[..., Tracked]:
    """An elementwise function whose derivative is a function of (argument, value)."""

    def rule(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Tracked:
        if args or any(kwargs.values()):
            return _elementwise(function, x, *args, **kwargs)
        value = _run(function, x.value)
        return Tracked(value, ()) if x.flat else x.scaled(value, derivative(x.value, value))

    return rule


def _elementwise(function: Any, x: Any, *args: Any, **kwargs: Any) -> Tracked:
    """An elementwise function without a rule of its own: its derivative by automatic differentiation."""
    if any(isinstance(a, Tracked) for a in (*args, *kwargs.values())) or not isinstance(x, Tracked):
        raise Untrackable(f"{function} of two tracked values")
    if x.flat:
        return Tracked(function(x.value, *args, **kwargs), ())
    with torch.enable_grad():
        leaf = x.value.detach().requires_grad_()
        value = function(leaf, *args, **kwargs)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return x.scaled(value.detach(), slope)


_SHAPES = {
    "chunk": _along(1, 0), "split": _along(1, 0), "unbind": _along(0, 0), "narrow": _along(0), "select": _along(0),
    "unsqueeze": _along(0), "squeeze": _along(0), "unflatten": _along(0), "flip": _along(0), "flatten": _flatten,
    "transpose": _transpose, "roll": _roll, "cat": _cat, "concat": _cat,
}  # fmt: skip
_ARITHMETIC = {
    "add": _add, "sub": _sub, "subtract": _sub, "mul": _mul, "multiply": _mul, "div": _div, "true_divide": _div,
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "addmm": _addmm, "einsum": _einsum, "where": _where,
    "lerp": _lerp, "sum": _total, "mean": _total, "addcmul": _addcmul, "neg": lambda function, x: x * -1.0,
}  # fmt: skip
_FUNCTIONS = {
    "tanh": _smooth(lambda x, y: 1 - y * y),
    "sigmoid": _smooth(lambda x, y: y - y * y),
    "exp": _smooth(lambda x, y: y),
    "relu": _smooth(lambda x, y: torch.sign(y) if isinstance(y, Tensor) else y.positive()),
    "square": _smooth(lambda x, y: 2 * x),
    "sin": _smooth(lambda x, y: x.cos()),
    "cos": _smooth(lambda x, y: -x.sin()),
    "abs": _smooth(lambda x, y: torch.sign(x) if isinstance(x, Tensor) else 2 * x.positive() - 1),
    "log": _smooth(lambda x, y: 1 / x),
    "sqrt": _smooth(lambda x, y: 0.5 / y),
    "reciprocal": _smooth(lambda x, y: -(y * y)),
    "silu": _smooth(lambda x, y: y + x.sigmoid() * (1 - y)),
    "softplus": _smooth(lambda x, y: x.sigmoid()),
}  # fmt: skip
_BY_AUTOGRAD = (
    "rsqrt", "pow", "gelu", "elu", "selu", "celu", "mish",
    "leaky_relu", "hardtanh", "hardsigmoid", "softsign", "logsigmoid", "erf", "atan", "sinh", "cosh", "clamp", "clip",
    "log1p", "expm1", "asinh", "tanhshrink",
)  # fmt: skip
RULES: dict[str, Callable[..., Any]] = {
    **_SHAPES, **_ARITHMETIC, **_FUNCTIONS, **dict.fromkeys(_BY_AUTOGRAD, _elementwise), "clone": _same,
    "contiguous": _same,
}  # fmt: skip
"""How each operation, by its name in torch, acts on tracked values."""


# ---- the Jacobian of a whole state, feature-major


def diagonal_of(parts: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """Return the diagonal of the Jacobian, [D, rows], of a new state given by its parts [rows, size]."""
    begin, found = 0, []
    for part, size in zip(parts, sizes):
        found.append(band(part, torch.arange(begin, begin + size)).T)
        begin += size
    return torch.cat(found)


def blocks_of(parts: Sequence[Any], count: int) -> Tensor:
    """Return the derivatives of feature c of part k by feature c of part l, [K, K, C, rows]; all parts are equal."""
    width = parts[0].shape[-1]
    columns = [torch.arange(width * other, width * (other + 1)) for other in range(count)]
    return torch.stack([torch.stack([band(part, c).T for c in columns]) for part in parts])


def band(part: Any, columns: Tensor) -> Any:
    """Return ∂v_c/∂s_{columns[c]} for every feature c of a part, [rows, C]."""
    if not isinstance(part, Tracked):
        return torch.zeros_like(part)
    features, total = torch.arange(part.shape[-1]), None
    for t in part.terms:
        total = _accumulate(total, t.alpha, t.weight[columns, features], part.value)
    for c in part.chains:
        assert c.inner.alpha is not None
        # Σ_p L[c, p] α_p W[p, c]: one product for all rows
        product = _product(c.inner.alpha, c.inner.weight[columns] * c.outer.T, None)
        product = product if c.beta is None else c.beta * product
        total = product if total is None else total + product
    return torch.zeros_like(part.value) if total is None else total


def _accumulate(total: Any, alpha: Any, factor: Tensor, like: Any) -> Any:
    if alpha is None:
        return torch.ones_like(like) * factor if total is None else total + factor
    return alpha * factor if total is None else torch.addcmul(total, alpha, factor)


def dense_of(parts: Sequence[Any], size: int) -> Tensor:
    """Return the Jacobian, [D, D, rows]: entry [i, j] is the derivative of s_i by the old s_j."""
    return torch.cat([_dense(part, size) for part in parts])


def _dense(part: Any, size: int) -> Tensor:
    rows, features = part.shape
    if not isinstance(part, Tracked):
        return part.new_zeros(features, size, rows)
    total: Tensor | None = None
    for t in part.terms:
        matrix = t.weight.T.unsqueeze(-1)
        if t.alpha is None:
            total = matrix.expand(-1, -1, rows).clone() if total is None else total.add_(matrix)
        elif total is None:
            total = t.alpha.T.unsqueeze(1) * matrix
        else:
            total.addcmul_(t.alpha.T.unsqueeze(1), matrix)
    for c in part.chains:
        assert c.inner.alpha is not None
        # Σ_p L[i, p] α_p W[p, j], a product over p of all pairs (i, j)
        pairs = (c.outer.T.unsqueeze(1) * c.inner.weight.unsqueeze(0)).flatten(0, 1)
        matrix = (pairs @ c.inner.alpha.T).unflatten(0, (features, size))
        matrix = matrix if c.beta is None else c.beta.T.unsqueeze(1) * matrix
        total = matrix if total is None else total.add_(matrix)
    return part.value.new_zeros(features, size, rows) if total is None else total

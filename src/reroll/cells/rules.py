"""How torch's operations, by their names, act on a value that knows how it depends on the state (`tracked.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reroll.cells.tracked import RULES, Chain, Term, Tracked, Untrackable, value_of


def _run(function: Callable[..., Any], value: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch, or the method of its name where the value is no tensor."""
    if isinstance(value, Tensor):
        return function(value, *args, **kwargs)
    return getattr(value, function.__name__)(*args, **kwargs)


def _sub(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Tracked:
    return _add(function, a, b, alpha=-alpha)


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Tracked:
    sign = alpha
    value = torch.add(value_of(a), value_of(b), alpha=sign)
    if isinstance(a, Tracked) and isinstance(b, Tracked):
        return a.plus(value, b if sign == 1 else b.scaled(b.value, sign))
    if isinstance(a, Tracked):
        fits = a.expanded(value.shape)
        return Tracked(value, fits.terms, fits.chains)
    return b.expanded(value.shape).scaled(value, sign) if sign != 1 else _add(function, b, a)


def _mul(function: Any, a: Any, b: Any) -> Tracked:
    value = value_of(a) * value_of(b)
    if isinstance(a, Tracked) and isinstance(b, Tracked) and not (a.flat or b.flat):
        return a.scaled(value, b.value.expand_as(value)).plus(value, b.scaled(value, a.value.expand_as(value)))
    moving = isinstance(a, Tracked) and (not a.flat or not isinstance(b, Tracked))
    known, factor = (a, value_of(b)) if moving else (b, value_of(a))
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
    return x.mapped(product(x.value, weight, bias), lambda t: functional.linear(t, weight))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return W x + b, feature-major if x is."""
    if x.dim() != 2 or x.stride(0) != 1:
        return functional.linear(x, weight, bias)
    return (weight @ x.T if bias is None else torch.addmm(bias.unsqueeze(1), weight, x.T)).T


def _matmul(function: Any, a: Any, b: Any) -> Tracked:
    if isinstance(b, Tracked) or not isinstance(a, Tracked) or b.dim() != 2:
        raise Untrackable("a product of states")
    return a.mapped(product(a.value, b.T, None), lambda t: t @ b)


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
    value = torch.cat([value_of(x) for x in tensors], dim)
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
    condition = value_of(condition)
    value = torch.where(condition, value_of(a), value_of(b))
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
RULES |= {
    **_SHAPES, **_ARITHMETIC, **_FUNCTIONS, **dict.fromkeys(_BY_AUTOGRAD, _elementwise), "clone": _same,
    "contiguous": _same,
}  # fmt: skip

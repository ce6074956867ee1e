"""How torch's operations, by their names, act on a value that carries its derivative (`tracked.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reroll.cells.tracked import COMPOSED, RULES, Term, Tracked, Untrackable, value_of
from reroll.kernels.program.operations import FUNCTIONS
from reroll.kernels.program.symbol import Symbol


def _add(function: Any, a: Any, b: Any, *, alpha: float = 1) -> Tracked:
    value = torch.add(value_of(a), value_of(b), alpha=alpha)
    if isinstance(b, Tracked) and alpha != 1:
        b = b.scaled(b.value, alpha)
    first, *second = (x for x in (a, b) if isinstance(x, Tracked))
    return first.plus(value, second[0]) if second else Tracked(value, first.expanded(value.shape).terms)


def _mul(function: Any, a: Any, b: Any) -> Tracked:
    value = value_of(a) * value_of(b)
    if isinstance(a, Tracked) and isinstance(b, Tracked) and a.terms and b.terms:
        return a.scaled(value, b.value.expand_as(value)).plus(value, b.scaled(value, a.value.expand_as(value)))
    first = isinstance(a, Tracked) and (bool(a.terms) or not isinstance(b, Tracked))
    tracked, factor = (a, value_of(b)) if first else (b, value_of(a))
    if not isinstance(factor, Tensor | Symbol) or factor.dim() < value.dim() or factor.shape[0] == 1:
        return tracked.weighted(value, factor)
    return tracked.scaled(value, factor.expand_as(value))


def _div(function: Any, a: Any, b: Any) -> Tracked:
    if not isinstance(b, Tracked):
        return _mul(function, a, 1 / b)
    inverse = 1 / b.value
    return _mul(function, a, b.scaled(inverse, -inverse * inverse))


def _linear(function: Any, x: Any, weight: Any, bias: Any = None) -> Tracked:
    if isinstance(weight, Tracked) or isinstance(bias, Tracked) or not isinstance(x, Tracked):
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


def _einsum(function: Any, equation: str, *operands: Any) -> Tracked:
    tracked = [i for i, x in enumerate(operands) if isinstance(x, Tracked)]
    inputs, _, output = equation.replace(" ", "").partition("->")
    batched = [i for i, part in enumerate(inputs.split(",")) if "..." in part]
    if len(tracked) != 1 or batched != tracked or not output.startswith("..."):
        raise Untrackable(f"einsum {equation!r}")
    (at,) = tracked
    if not inputs.split(",")[at].startswith("..."):
        raise Untrackable(f"einsum {equation!r}")

    def apply(t: Tensor) -> Tensor:
        return torch.einsum(equation, *operands[:at], t, *operands[at + 1 :])

    return operands[at].mapped(apply(operands[at].value), apply)


def _features_only(x: Tracked, *dims: Any) -> None:
    for dim in dims:
        for d in dim if isinstance(dim, tuple | list) else (dim,):
            if not isinstance(d, int) or d % x.value.dim() == 0:
                raise Untrackable(f"an operation along axis {dim}")


def _total(name: str) -> Callable[..., Tracked]:
    def rule(function: Any, x: Tracked, dim: Any = None, keepdim: bool = False) -> Tracked:
        _features_only(x, dim)
        return x.mapped(getattr(x.value, name)(dim, keepdim), lambda t: getattr(t, name)(dim, keepdim))

    return rule


def _refuse_in_place() -> Any:
    raise Untrackable("an operation in place")


AXES = ("dim", "dims", "start_dim", "dim0", "dim1")
"""Keywords that name an axis, in the order of the positions they stand for."""


def _shape(name: str, position: int, default: Any = None, count: int = 1) -> Callable[..., Any]:
    """A change of shape whose axes are the `count` arguments from `position` on; it may return several."""

    def rule(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Any:
        named = [kwargs[axis] for axis in AXES if axis in kwargs]
        dims = [*args[position : position + count], *named] or [default]
        if name == "split":
            kwargs = {"split_size" if key == "split_size_or_sections" else key: v for key, v in kwargs.items()}
        if name == "unsqueeze" and (not isinstance(dims[0], int) or dims[0] % (x.value.dim() + 1) == 0):
            raise Untrackable("a new first axis")
        if name != "unsqueeze":
            _features_only(x, *dims)

        def change(t: Any) -> Any:
            return getattr(t, name)(*args, **kwargs)

        value = change(x.value)
        if not isinstance(value, tuple | list):
            return x.reshaped(change)
        return tuple(x.reshaped(lambda t, i=i: change(t)[i]) for i in range(len(value)))

    return rule


def _index(function: Any, x: Tracked, index: Any) -> Tracked:
    index = index if isinstance(index, tuple) else (index,)
    # The rows' axis is left alone by [..., x] and [:, x]; anything else would mix rows.
    first, rest = index[0], [i for i in index if i is not Ellipsis]
    if first is not Ellipsis and first != slice(None):
        raise Untrackable(f"indexing rows with {index!r}")
    if any(not isinstance(i, int | slice) for i in rest) or len(rest) >= x.value.dim() + (first is not Ellipsis):
        raise Untrackable(f"indexing with {index!r}")
    return x.reshaped(lambda t: t[index])


def _cat(function: Any, tensors: Sequence[Any], dim: int = 0) -> Tracked:
    _features_only(next(x for x in tensors if isinstance(x, Tracked)), dim)
    if tensors[0].dim() != 2:
        raise Untrackable("cat of more than one feature axis")
    value = torch.cat([value_of(x) for x in tensors], dim)
    width, begin, terms = value.shape[1], 0, []
    for x in tensors:
        size = x.shape[1]
        pad = (begin, width - begin - size)
        for p in x.terms if isinstance(x, Tracked) else ():
            alpha = None if p.alpha is None else functional.pad(p.alpha, pad)
            terms.append(Term(functional.pad(p.weight, pad), alpha, p.inner))
        begin += size
    return Tracked(value, terms)


def _where(function: Any, condition: Any, a: Any, b: Any) -> Tracked:
    if isinstance(condition, Tracked):
        raise Untrackable("where on a condition of the state")
    value = torch.where(condition, value_of(a), value_of(b))
    mask = condition.to(value.dtype).expand_as(value)
    first, *second = (x.scaled(value, m) for x, m in ((a, mask), (b, 1 - mask)) if isinstance(x, Tracked))
    return first.plus(value, second[0]) if second else first


def _same(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Tracked:
    return x


def _smooth(name: str) -> Callable[..., Tracked]:
    """An elementwise function whose slope is in the table."""
    compute, slope = getattr(functional, name, None) or getattr(torch, name), FUNCTIONS[name]

    def rule(function: Any, x: Tracked, *args: Any, **kwargs: Any) -> Tracked:
        if args or any(kwargs.values()):
            return _elementwise(function, x, *args, **kwargs)
        value = compute(x.value)
        return x.scaled(value, slope(x.value, value)) if x.terms else Tracked(value)

    return rule


def _elementwise(function: Any, x: Any, *args: Any, **kwargs: Any) -> Tracked:
    """An elementwise function without a rule of its own: its derivative by automatic differentiation."""
    if any(isinstance(a, Tracked) for a in (*args, *kwargs.values())) or not isinstance(x, Tracked):
        raise Untrackable(f"{function} of two tracked values")
    if not x.terms:
        return Tracked(function(x.value, *args, **kwargs))
    with torch.enable_grad():
        leaf = x.value.detach().requires_grad_()
        value = function(leaf, *args, **kwargs)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return x.scaled(value.detach(), slope)


_BY_AUTOGRAD = (
    "rsqrt", "pow", "gelu", "elu", "selu", "celu", "mish", "leaky_relu", "hardtanh", "hardsigmoid", "softsign",
    "logsigmoid", "erf", "atan", "sinh", "cosh", "clamp", "clip", "expm1", "asinh", "tanhshrink",
)  # fmt: skip
RULES |= {
    "add": _add, "sub": lambda function, a, b, alpha=1: _add(function, a, b, alpha=-alpha), "mul": _mul, "div": _div,
    "linear": _linear, "matmul": _matmul, "mm": _matmul, "einsum": _einsum, "where": _where, "cat": _cat,
    "sum": _total("sum"), "mean": _total("mean"), "__getitem__": _index, "clone": _same, "contiguous": _same,
    "sign": lambda function, x: Tracked(x.value.sign()),
    **{name: _shape(name, 1, 0) for name in ("chunk", "split")},
    **{name: _shape(name, 0) for name in ("narrow", "select", "unsqueeze", "squeeze", "unflatten", "flip")},
    "unbind": _shape("unbind", 0, 0), "flatten": _shape("flatten", 0, 0), "roll": _shape("roll", 1),
    "transpose": _shape("transpose", 0, count=2), **{name: _smooth(name) for name in FUNCTIONS},
    **dict.fromkeys(_BY_AUTOGRAD, _elementwise),
}  # fmt: skip
RULES |= {"subtract": RULES["sub"], "multiply": _mul, "true_divide": _div, "concat": _cat}
COMPOSED |= {
    "neg": lambda x: x * -1.0,
    "abs": lambda x: x * x.sign(),
    "square": lambda x: x * x,
    "reciprocal": lambda x: 1 / x,
    "silu": lambda x, inplace=False: x * x.sigmoid() if not inplace else _refuse_in_place(),
    "lerp": lambda a, b, weight: a + weight * (b - a),
    "addmm": lambda bias, x, weight: x @ weight + bias,
    "addcmul": lambda a, b, c, *, value=1: a + (b * c if value == 1 else b * c * value),
}

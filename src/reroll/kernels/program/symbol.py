"""Values that stand in for tensors and record the operations on them; `Symbol` records them as a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroll.kernels.program import Builder
from reroll.kernels.program.operations import FUNCTIONS


class Untrackable(Exception):
    """The code does something that cannot be recorded."""


def _operator(name: str, swapped: bool = False) -> Callable[..., Any]:
    function = getattr(torch, name)
    return lambda self, *other: self.call(name, function, (*other, self) if swapped else (self, *other), {})


class Traced:
    """A value in place of a tensor; every torch operation on it becomes `call(name, …)`, which a subclass defines."""

    @classmethod
    def call(cls, name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation, by its name in torch."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.call(getattr(function, "__name__", str(function)), function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        function = getattr(Tensor, name)
        return lambda *args, **kwargs: self.call(name, function, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Any:
        return self.call("__getitem__", Tensor.__getitem__, (self, index), {})

    __add__ = __radd__ = _operator("add")
    __mul__ = __rmul__ = _operator("mul")
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swapped=True)
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", swapped=True)
    __matmul__, __rmatmul__ = _operator("matmul"), _operator("matmul", swapped=True)
    __neg__, __abs__, __pow__ = _operator("neg"), _operator("abs"), _operator("pow")
    __eq__, __ne__, __hash__ = _operator("eq"), _operator("ne"), object.__hash__
    __lt__, __le__, __gt__, __ge__ = map(_operator, ("lt", "le", "gt", "ge"))

    def __iadd__(self, other: Any) -> Any:
        # Without this, Python would rebind the name to a new value, and other references would keep the old one.
        raise Untrackable("an operation in place")

    __isub__ = __imul__ = __itruediv__ = __ipow__ = __iadd__

    def __bool__(self) -> bool:
        raise Untrackable("a branch on a value")

    __float__ = __int__ = __iter__ = __len__ = __bool__


class Symbol(Traced):
    """Registers of a program in place of a tensor [rows, …]: `index` [1, …] says which register each feature is in."""

    dtype, device = torch.float32, torch.device("cpu")
    requires_grad = False

    def __init__(self, builder: Builder, index: Tensor):
        self.builder, self.index = builder, index

    @classmethod
    def range(cls, builder: Builder, first: int, features: int) -> Symbol:
        """Return adjacent registers as features."""
        return cls(builder, torch.arange(first, first + features).unsqueeze(0))

    @classmethod
    def load(cls, builder: Builder, tensor: Tensor) -> Symbol:
        """Return a tensor [rows, …] as an input of the program, loaded once."""
        entry = builder.loaded.get(id(tensor))
        if entry is None:
            memory = tensor.movedim(0, -1).flatten(0, -2).to(torch.float32).contiguous()
            index = cls.range(builder, builder.input(memory), len(memory)).index.view(1, *tensor.shape[1:])
            entry = builder.loaded[id(tensor)] = (index, tensor)  # a symbol would make a cycle with its builder
        return cls(builder, entry[0])

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.builder.rows, *self.index.shape[1:]))

    @property
    def ndim(self) -> int:
        return self.index.dim()

    def dim(self) -> int:
        return self.index.dim()

    def stride(self, dim: int) -> int:
        return 0

    def at(self, index: Tensor) -> Symbol:
        return Symbol(self.builder, index)

    def expand(self, *sizes: int) -> Symbol:
        return self.at(self.index.expand(1, *sizes[1:]))

    @property
    def registers(self) -> list[int]:
        return self.index.reshape(-1).tolist()

    def first(self, shape: torch.Size | None = None) -> int:
        """Return the first of adjacent registers that hold the features, expanded to a shape."""
        return self.builder.adjacent((self if shape is None else self.at(self.index.expand(shape))).registers)

    def emit(self, name: str, shape: torch.Size, *operands: int) -> Symbol:
        """Add an instruction and return its result, of a shape [1, …]."""
        first = self.builder.emit(name, shape.numel(), *operands)
        return self.at(torch.arange(first, first + shape.numel()).view(shape))

    def fill(self, shape: torch.Size, number: float) -> Symbol:
        return self.emit("fill", shape, 0, self.builder.constant(torch.full(shape, number)))

    @classmethod
    def call(cls, name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if name in _SHAPES:
            result = function(args[0].index, *args[1:], **kwargs)
            return tuple(map(args[0].at, result)) if isinstance(result, tuple | list) else args[0].at(result)
        rule = _RULES.get(name)
        if rule is None:
            raise Untrackable(f"the operation {name}")
        return rule(*args, **kwargs)


def _operand(symbol: Symbol, x: Any) -> Symbol | Tensor:
    """Return an operand beside a symbol: a symbol too where it differs from row to row, else a constant [1, …]."""
    if isinstance(x, Symbol):
        return x
    x = torch.as_tensor(x)
    if x.dim() == symbol.dim() and x.shape[0] == symbol.builder.rows > 1:
        return Symbol.load(symbol.builder, x)
    if x.dim() >= symbol.dim() and x.shape[0] != 1:
        raise Untrackable(f"an operand of shape {tuple(x.shape)}")
    return (x if x.dim() == symbol.dim() else x.unsqueeze(0)).to(torch.float32)


def _shape(*operands: Any) -> torch.Size:
    return torch.broadcast_shapes(*(x.index.shape if isinstance(x, Symbol) else x.shape for x in operands))


def _binary(name: str) -> Callable[[Any, Any], Symbol]:
    def rule(a: Any, b: Any) -> Symbol:
        symbol = a if isinstance(a, Symbol) else b
        a, b = _operand(symbol, a), _operand(symbol, b)
        shape = _shape(a, b)
        if isinstance(a, Symbol) and isinstance(b, Symbol):
            return symbol.emit(name, shape, a.first(shape), b.first(shape))
        kind, constant = (name, b) if isinstance(a, Symbol) else (_REVERSED.get(name, name), a)
        # Subtracting or dividing by a constant is a sum or a product.
        kind, constant = {"sub": ("add", -constant), "div": ("mul", 1 / constant)}.get(kind, (kind, constant))
        values = symbol.builder.constant(constant.expand(shape))
        return symbol.emit(f"{kind}_c", shape, symbol.first(shape), values)

    return rule


def _add(a: Any, b: Any, *, alpha: float = 1) -> Symbol:
    return _binary("sub")(a, b) if alpha == -1 else _binary("add")(a, b if alpha == 1 else b * alpha)


def _unary(name: str) -> Callable[..., Symbol]:
    def rule(x: Symbol, *args: Any, **kwargs: Any) -> Symbol:
        if args or any(kwargs.values()):
            raise Untrackable(f"{name} with arguments")
        return x.emit(name, x.index.shape, x.first())

    return rule


def _addcmul(a: Any, b: Any, c: Any) -> Symbol:
    if isinstance(c, Tensor) and isinstance(a, Symbol) and isinstance(b, Symbol):
        constant, shape = _operand(a, c), a.index.shape
        if isinstance(constant, Tensor):
            return a.emit("addcmul_c", shape, a.first(), b.first(shape), a.builder.constant(constant.expand(shape)))
    return a + b * c


def _linear(x: Symbol, weight: Tensor, bias: Tensor | None = None) -> Symbol:
    if x.dim() != 2:
        raise Untrackable("a product of more than one axis")
    outputs, inputs = weight.shape
    constants = torch.cat([weight.reshape(-1), torch.zeros(outputs) if bias is None else bias])
    return x.emit("linear", torch.Size((1, outputs)), x.first(), x.builder.constant(constants), inputs)


def _cat(parts: Any, dim: int = 0) -> Symbol:
    symbol = next(part for part in parts if isinstance(part, Symbol))
    symbols = [part if isinstance(part, Symbol) else Symbol.load(symbol.builder, part) for part in parts]
    return symbol.at(torch.cat([part.index for part in symbols], dim))


def _pad(x: Symbol, pad: Any, mode: str = "constant", value: float | None = None) -> Symbol:
    zero = x.fill(torch.Size((1,)), 0.0)
    return x.at(torch.nn.functional.pad(x.index, pad, value=zero.first()))


_SHAPES = {
    "chunk", "split", "unbind", "narrow", "select", "unsqueeze", "squeeze", "unflatten", "flatten", "transpose", "roll",
    "flip", "__getitem__",
}  # fmt: skip
_REVERSED = {"sub": "rsub", "div": "rdiv"}
_RULES: dict[str, Callable[..., Any]] = {
    "add": _add, **{name: _binary(name) for name in ("sub", "mul", "div")}, "neg": lambda x: x * -1.0,
    **{name: _unary(name) for name in (*FUNCTIONS, "sign")}, "addcmul": _addcmul, "linear": _linear, "cat": _cat,
    "pad": _pad, "expand_as": lambda x, like: x.expand(*like.shape), "ones_like": lambda x: x.fill(x.index.shape, 1.0),
    "zeros_like": lambda x: x.fill(x.index.shape, 0.0),
}  # fmt: skip

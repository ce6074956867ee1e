"""A step of a cell, and its Jacobian, as a program that runs over rows without coming back to Python.

    step, whole = compile_step(cell, layout, inputs, "diagonal")
    step.run(out, begin, state)               out [D, rows]: next states
    whole.run(out, begin, state)              out [2D, rows]: next states, and the diagonal

The cell's code runs once on values that write down what is done with them (`Symbol`); where they are `Tracked` too, the
rules that find the Jacobian by its structure write down its operations as well. What depends on the inputs alone is
computed by torch, for all steps, before. A cell that does what a program cannot is run operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroll.cells.base import Cell
from reroll.cells.jacobian import has_own_derivative
from reroll.cells.layout import Layout
from reroll.cells.pieces import band
from reroll.cells.tracked import Tracked, Untrackable
from reroll.errors import UsageError
from reroll.kernels.program import Builder, Program
from reroll.kernels.program.reverse import reverse

DENSE_OUTPUTS = 1100
"""Numbers of a Jacobian per row up to which a program writes whole ones."""


class Unwritable(Exception):
    """The step does something a program has no instruction for."""


UNWRITTEN = (Unwritable, Untrackable, AttributeError, TypeError, IndexError, RuntimeError, UsageError, AssertionError)
"""What a step may raise on values that write down what is done with them; it is then run in torch's operations, where a
mistake in the step itself comes up again."""


class Symbol:
    """Registers of a program in place of a tensor [rows, …]: `index` [1, …] says which register each feature is in."""

    def __init__(self, builder: Builder, index: Tensor, rows: int):
        self.builder, self.index, self.rows = builder, index, rows

    dtype, device = torch.float32, torch.device("cpu")
    requires_grad = False

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows, *self.index.shape[1:]))

    @property
    def ndim(self) -> int:
        return self.index.dim()

    def dim(self) -> int:
        return self.index.dim()

    def stride(self, dim: int) -> int:
        return 0

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", str(function))
        return _written(name, function, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not (hasattr(Tensor, name) or name in RULES):
            raise AttributeError(name)
        function = getattr(Tensor, name, None)
        return lambda *args, **kwargs: _written(name, function, (self, *args), kwargs)

    def __getitem__(self, index: Any) -> Symbol:
        return self.at(self.index[index])

    def at(self, index: Tensor) -> Symbol:
        return Symbol(self.builder, index, self.rows)

    __add__ = __radd__ = lambda self, other: _written("add", torch.add, (self, other), {})
    __mul__ = __rmul__ = lambda self, other: _written("mul", torch.mul, (self, other), {})
    __sub__ = lambda self, other: _written("sub", torch.sub, (self, other), {})
    __rsub__ = lambda self, other: _written("sub", torch.sub, (other, self), {})
    __truediv__ = lambda self, other: _written("div", torch.div, (self, other), {})
    __rtruediv__ = lambda self, other: _written("div", torch.div, (other, self), {})
    __neg__ = lambda self: _written("mul", torch.mul, (self, -1.0), {})

    def __iadd__(self, other: Any) -> Any:
        raise Unwritable("an operation in place")

    __isub__ = __imul__ = __itruediv__ = __ipow__ = __iadd__

    def expand(self, *sizes: int) -> Symbol:
        return self.at(self.index.expand(1, *sizes[1:]))

    def expand_as(self, other: Any) -> Symbol:
        return self.expand(*other.shape)

    def positive(self) -> Symbol:
        """Return 1 where this is above zero, else 0."""
        return _unary("step")(self)

    def __bool__(self) -> bool:
        raise Unwritable("a branch on a value")

    __hash__ = object.__hash__
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = lambda self, other: self.__bool__()


_SHAPES = {
    "chunk", "split", "unbind", "narrow", "select", "unsqueeze", "squeeze", "unflatten", "flatten", "transpose", "roll",
    "flip",
}  # fmt: skip


def _written(name: str, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if name in _SHAPES:
        symbol = args[0]
        found = function(symbol.index, *args[1:], **kwargs)
        return tuple(map(symbol.at, found)) if isinstance(found, tuple | list) else symbol.at(found)
    rule = RULES.get(name)
    if rule is None:
        raise Unwritable(f"the operation {name}")
    return rule(*args, **kwargs)


def _range(symbol: Symbol, index: Tensor) -> int:
    """Return the first of adjacent registers that hold these features, copied there if they are not adjacent."""
    return symbol.builder.adjacent(index.reshape(-1).tolist())


def _binary(operation: str, a: Any, b: Any) -> Symbol:
    symbol = a if isinstance(a, Symbol) else b
    builder = symbol.builder
    a_index, b_index = _index(symbol, a), _index(symbol, b)
    shape = torch.broadcast_shapes(
        *(x.shape for x in (a_index, b_index) if isinstance(x, Tensor)),
        *(_with_rows(symbol, x).shape for x in (a, b) if isinstance(x, Tensor) and not _by_row(symbol, x)),
    )
    features = shape[1:].numel()
    constant = next((x for x, i in ((a, a_index), (b, b_index)) if i is None), None)
    if constant is None:
        assert a_index is not None
        assert b_index is not None
        first = builder.emit(
            operation, features, _range(symbol, a_index.expand(shape)), _range(symbol, b_index.expand(shape))
        )
    else:
        mine = a_index if a_index is not None else b_index
        assert mine is not None
        values = _with_rows(symbol, torch.as_tensor(constant, dtype=torch.float32)).expand(1, *shape[1:])[0]
        kind = operation
        if operation == "sub":
            kind, values = ("rsub", values) if a_index is None else ("add", -values)
        elif operation == "div":
            kind, values = ("rdiv", values) if a_index is None else ("mul", 1 / values)
        first = builder.emit(f"{kind}_c", features, _range(symbol, mine.expand(shape)), builder.constant(values))
    return symbol.at(torch.arange(first, first + features).view(shape))


def _with_rows(symbol: Symbol, constant: Tensor) -> Tensor:
    """Return a constant with an axis for rows, of length 1."""
    return constant if constant.dim() == symbol.index.dim() else constant.unsqueeze(0)


def _by_row(symbol: Symbol, x: Tensor) -> bool:
    return x.dim() == symbol.index.dim() and x.shape[0] == symbol.rows and symbol.rows > 1


def _index(symbol: Symbol, x: Any) -> Tensor | None:
    """Return where an operand lies; None for a constant. A tensor with a row axis becomes an input."""
    if isinstance(x, Symbol):
        return x.index
    if not isinstance(x, Tensor) or not _by_row(symbol, x):
        if isinstance(x, Tensor) and x.dim() >= symbol.index.dim() and x.shape[0] not in (1,):
            raise Unwritable(f"an operand of shape {tuple(x.shape)}")
        return None
    return loaded(symbol.builder, x).index


def loaded(builder: Builder, tensor: Tensor) -> Symbol:
    """Return a tensor [rows, …] as an input of the program, loaded once."""
    known = builder.known.get(id(tensor))
    if known is None:
        memory = tensor.movedim(0, -1).flatten(0, -2).to(torch.float32).contiguous()
        first = builder.input(memory)
        index = torch.arange(first, first + memory.shape[0]).view(1, *tensor.shape[1:])
        known = builder.known[id(tensor)] = (index, tensor)  # a symbol would hold the builder that holds it
    return Symbol(builder, known[0], tensor.shape[0])


def _add(a: Any, b: Any, *, alpha: float = 1) -> Symbol:
    if alpha == -1:
        return _binary("sub", a, b)
    return _binary("add", a, b if alpha == 1 else b * alpha)


def _unary(operation: str) -> Callable[[Symbol], Symbol]:
    def rule(x: Symbol) -> Symbol:
        features = x.index.numel()
        first = x.builder.emit(operation, features, _range(x, x.index))
        return x.at(torch.arange(first, first + features).view_as(x.index))

    return rule


def _absolute(x: Symbol) -> Symbol:
    return _unary("relu")(x) + _unary("relu")(x * -1.0)


def _silu(x: Symbol, inplace: bool = False) -> Symbol:
    return x * _unary("sigmoid")(x)


def _softplus(x: Symbol, beta: float = 1.0, threshold: float = 20.0) -> Symbol:
    if (beta, threshold) != (1, 20):
        raise Unwritable(f"softplus with beta = {beta}, threshold = {threshold}")
    return _unary("softplus")(x)


def _addcmul(a: Any, b: Any, c: Any) -> Symbol:
    if isinstance(c, Tensor) and isinstance(a, Symbol) and isinstance(b, Symbol) and not _by_row(a, c):
        shape = a.index.shape
        first = a.builder.emit(
            "addcmul_c", shape.numel(), _range(a, a.index), _range(a, b.index.expand(shape)),
            a.builder.constant(c.expand(shape[1:])),
        )  # fmt: skip
        return a.at(torch.arange(first, first + shape.numel()).view(shape))
    return a + b * c


def _linear(x: Symbol, weight: Tensor, bias: Tensor | None = None) -> Symbol:
    if x.index.dim() != 2:
        raise Unwritable("a product of more than one axis")
    outputs, inputs = weight.shape
    bias = torch.zeros(outputs) if bias is None else bias
    at = x.builder.constant(torch.cat([weight.reshape(-1), bias]))
    first = x.builder.emit("linear", outputs, _range(x, x.index), at, inputs)
    return x.at(torch.arange(first, first + outputs).view(1, outputs))


def _cat(parts: Any, dim: int = 0) -> Symbol:
    symbol = next(part for part in parts if isinstance(part, Symbol))
    every = [part if isinstance(part, Symbol) else loaded(symbol.builder, part) for part in parts]
    return symbol.at(torch.cat([part.index for part in every], dim))


def _pad(x: Symbol, pad: Any, mode: str = "constant", value: float | None = None) -> Symbol:
    zero = x.builder.emit("fill", 1, 0, x.builder.constant(torch.zeros(1)))
    return x.at(torch.nn.functional.pad(x.index, pad, value=zero))


def _ones_like(x: Symbol) -> Symbol:
    first = x.builder.emit("fill", x.index.numel(), 0, x.builder.constant(torch.ones(x.index.numel())))
    return x.at(torch.arange(first, first + x.index.numel()).view_as(x.index))


RULES: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": lambda a, b: _binary("sub", a, b), "mul": lambda a, b: _binary("mul", a, b),
    "div": lambda a, b: _binary("div", a, b), "reciprocal": lambda x: _binary("div", 1.0, x), "addcmul": _addcmul,
    "square": lambda x: x * x, "abs": _absolute, "silu": _silu, "softplus": _softplus, "linear": _linear,
    **{name: _unary(name) for name in ("sigmoid", "tanh", "relu", "exp", "log", "log1p", "sqrt", "sin", "cos")},
    "ones_like": _ones_like, "zeros_like": lambda x: x * 0.0, "cat": _cat, "pad": _pad, "contiguous": lambda x: x,
    "clone": lambda x: x, "expand_as": lambda x, like: x.expand(*like.shape),
}  # fmt: skip


def compile_step(
    cell: Cell, layout: Layout, inputs: Tensor, structure: str | None, blocks: int = 1
) -> tuple[Program, Program] | None:
    """Return a step as a program, alone and with its Jacobian; or None if it cannot be written as one.

    Args:
        cell: the recurrence.
        layout: of its state.
        inputs: projected inputs of all steps, [rows, U], feature-major, float32 on a CPU.
        structure: "diagonal", "block" or "dense" for the Jacobian behind the next states; None for those alone.
        blocks: K, for "block".

    Returns:
        Two programs whose first input is the state. Outputs of the first are the D next states, of the second these and
        the entries of the Jacobian, [D], [K·K·C] or [D·D]. Without a structure they are the same.
    """
    size = layout.size
    if structure is not None and has_own_derivative(cell):
        return None
    if structure == "dense" and size * size > DENSE_OUTPUTS:
        return None
    if structure == "block" and (len(layout.sizes) != blocks or len(set(layout.sizes)) > 1):
        return None
    builder = Builder()
    rows = inputs.shape[0]
    first = builder.input(torch.empty(size, rows, device="meta"))
    value: Any = Symbol(builder, torch.arange(first, first + size).view(1, size), rows)
    try:
        state = Tracked(value, (), moves=True) if structure is None else Tracked.state(value)
        parts = _stepped(cell, layout, inputs, state)
        following = [_output(builder, part) for part in parts]
        if sum(features for _, features in following) != size:
            return None
        jacobian = [] if structure is None else _jacobian(builder, parts, layout, structure)
    except UNWRITTEN:
        return None
    step = builder.finish(following)
    return step, builder.finish(following + jacobian) if jacobian else step


def compile_adjoint(cell: Cell, layout: Layout, inputs: Tensor, states: Tensor, cotangent: Tensor) -> Program | None:
    """Return g ← Aᵀ g + c as a program whose first input is g, [D, rows]; or None if it cannot be written as one.

    Args:
        cell: the recurrence; A is the Jacobian of its step.
        layout: of its state.
        inputs: projected inputs of all steps, [rows, U], feature-major, float32 on a CPU.
        states: the states that A is taken at, [D, rows].
        cotangent: c, [D, rows].
    """
    if has_own_derivative(cell):
        return None
    size, rows = states.shape
    builder = Builder()
    first = builder.input(torch.empty(size, rows, device="meta"))
    before, given = builder.input(states), builder.input(cotangent)
    value: Any = Symbol(builder, torch.arange(before, before + size).view(1, size), rows)
    try:
        parts = _stepped(cell, layout, inputs, Tracked(value, (), moves=True))
        following = [_output(builder, part) for part in parts]
        if [features for _, features in following] != list(layout.sizes):
            return None
    except UNWRITTEN:
        return None
    begins = [first + sum(layout.sizes[:i]) for i in range(len(layout.sizes))]
    back = reverse(builder, following, begins, (before, size))
    return builder.finish([(given if back is None else builder.emit("add", size, given, back), size)])


def _stepped(cell: Cell, layout: Layout, inputs: Any, state: Any) -> Any:
    """Return the parts of the state after a step from a tracked one."""
    fixed: Any = Tracked(inputs, ())
    return layout.parts(cell.step(fixed, layout.unpack(state)))


def _output(builder: Builder, part: Any) -> tuple[int, int]:
    value = part.value if isinstance(part, Tracked) else part
    symbol = value if isinstance(value, Symbol) else loaded(builder, value)
    return _range(symbol, symbol.index), symbol.index.numel()


def _jacobian(builder: Builder, parts: Any, layout: Layout, structure: str) -> list[tuple[int, int]]:
    found, begins = [], [sum(layout.sizes[:i]) for i in range(len(layout.sizes))]
    for part, begin in zip(parts, begins):
        if structure == "diagonal":
            wanted = [torch.arange(begin, begin + part.shape[-1])]
        elif structure == "block":
            wanted = [torch.arange(other, other + part.shape[-1]) for other in begins]
        else:
            wanted = [torch.full((part.shape[-1],), j) for j in range(layout.size)]
        rows = [_output(builder, band(part, columns)) for columns in wanted]
        if structure != "dense":
            found += rows
            continue
        # Column by column; the result is wanted row by row: one feature of every column after another.
        found += [(first + i, 1) for i in range(part.shape[-1]) for first, _ in rows]
    return found

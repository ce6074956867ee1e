"""What an estimator is: a model, a loss and a batch in, a gradient out.

    estimate = estimator(model, loss_fn, batch, key)      Estimate(loss, gradient, outcome, stats)

A gradient is a value with two forms. `Dense`: numbers, in every parameter's `.grad`. `Seeded`: N coefficients and
keys, from which any tensor of

    ĝ = Σ_k c_k · noise(key, shape, k, name)

can be generated when it is needed, in tiles, and discarded. What comes after the estimator (`reroll.optim.apply`) uses
the methods of the gradient and works with either.

`loss_fn(model, batch)` is any callable that returns a scalar, or one loss per sequence [batch]; the model is any
`torch.nn.Module`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from reroll.errors import UsageError, did_you_mean
from reroll.kernels.noise_axpy import Noise, Stream, layout, noise_axpy, noise_of
from reroll.kernels.philox import stream_id
from reroll.keys import Key
from reroll.models.roles import canonical_name
from reroll.outcome import Outcome

LossFn = Callable[[Any, Any], Any]
TILE_BYTES = 8 << 20
"""A perturbed copy or a piece of a gradient is at most this large, or 1 % of the weights if that is more."""

NOISE_AT_MOST = 256.0
"""Bound on the entries of the noise: √(2¹⁶) for the sparsest; normal noise stays below 8."""

NORM_BYTES = 1 << 20
"""Sums of squares are computed in blocks of at most this size, so that a norm needs almost no memory."""


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Args:
        loss: the loss of the batch, or the mean of (L⁺ + L⁻)/2 over the probes. A 0-dimensional fp64 tensor.
        gradient: `Dense` or `Seeded`.
        outcome: how it ended; `bool(outcome)` is False where there is no usable gradient.
        stats: numbers about it; always `forward_passes`.
        state: the state after the batch's last step, when the batch carried one.
    """

    loss: Tensor
    gradient: Gradient
    outcome: Outcome
    stats: dict[str, Any] = field(default_factory=dict)
    state: Any = None

    def __repr__(self) -> str:
        return (
            f"Estimate(loss {float(self.loss):.6g}, outcome {self.outcome.name}, {type(self.gradient).__name__} of "
            f"{len(self.gradient.parameters)} tensors, {self.stats.get('forward_passes')} forward passes)"
        )


class Estimator(Protocol):
    """Turns a loss into a gradient."""

    def __call__(self, model: nn.Module, loss_fn: LossFn, batch: Any, key: Key) -> Estimate:
        """Estimate the gradient of the loss.

        Args:
            model: the module; its parameters with `requires_grad` are differentiated, tied ones once.
            loss_fn: `loss_fn(model, batch)` → scalar, or one loss per sequence [batch].
            batch: whatever `loss_fn` takes.
            key: the key of this step, `Key(seed).at(step)`; all randomness is derived from it.

        This includes what the model or the loss draws from torch's global generators. After the estimate the generators
        are back in their earlier state: drawing inside the loss does not advance them.
        """
        ...


class Term(NamedTuple):
    """Consecutive probes of the key of one step: Σ_k coefficients[k] · noise(key, shape, first + k, name).

    `coefficients` are c_k, fp32 on the CPU, 1/N over the finite probes included.
    """

    key: Key
    first: int
    coefficients: Tensor


class Gradient(Protocol):
    """What an estimator returns and `reroll.optim.apply` takes a step with."""

    ways: ClassVar[tuple[str, ...]]
    """How `apply` can take a step with it: "write", "stream", "fused"."""

    @property
    def parameters(self) -> dict[str, Tensor]: ...

    def each(self, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield these tensors with their gradients, in the dtypes of the tensors, generated on demand."""
        ...

    def add_to(self, target: Tensor, name: str, factor: float = 1.0) -> None:
        """Compute target += factor · g for one tensor."""
        ...

    def norm(self) -> float:
        """Return ‖g‖, over all tensors, summed in fp64."""
        ...

    def scaled(self, factor: float) -> Gradient:
        """Return the gradient times a number."""
        ...

    def is_finite(self, norm: float | None = None) -> bool:
        """Whether every entry is finite and ‖g‖², which optimizers sum up; the norm, if it is known, saves a pass."""
        ...


@dataclass(frozen=True)
class Dense:
    """A gradient stored in the `.grad` of these parameters."""

    parameters: dict[str, Tensor]
    ways: ClassVar[tuple[str, ...]] = ("write",)

    def each(self, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield from ((self.parameters[name], self.parameters[name].grad) for name in names)

    def add_to(self, target: Tensor, name: str, factor: float = 1.0) -> None:
        grad = self.parameters[name].grad
        if grad is not None:
            target.add_(grad, alpha=factor)

    def norm(self) -> float:
        return sum(fetch([square_sum(p.grad) for p in self.parameters.values() if p.grad is not None])) ** 0.5

    def is_finite(self, norm: float | None = None) -> bool:
        grads, limit = [p.grad for p in self.parameters.values() if p.grad is not None], largest_norm(self.parameters)
        if norm is not None:
            return norm < limit
        # The maximum norm is NaN if any entry is: one pass without a copy, and one synchronisation.
        largest = fetch([torch.linalg.vector_norm(g, torch.inf).float() for g in grads])
        bound = math.sqrt(sum(g.numel() * size * size for g, size in zip(grads, largest)))
        return bound < limit or self.norm() < limit

    def scaled(self, factor: float) -> Dense:
        # In place: a copy would take as much memory as the weights.
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.mul_(factor)
        return self


@dataclass(frozen=True)
class Seeded:
    """A gradient as coefficients and seeds: ĝ = Σ over terms Σ_k c_k · noise(key, shape, first + k, name).

    Args:
        terms: keys, probes and coefficients.
        noise: what directions are made of.
        parameters: the perturbed tensors by name.
        scales: a factor per tensor, for tensors that were probed with another ε than the coefficients are for.
        sums: dtype of the sums over probes; None: fp32, fp64 for fp64 tensors.
        padding: the row of an embedding that gets no noise, by tensor; see `padding_rows`.
    """

    terms: tuple[Term, ...]
    noise: Noise
    parameters: dict[str, Tensor]
    scales: Mapping[str, float] = field(default_factory=dict)
    sums: torch.dtype | None = None
    padding: Mapping[str, int] = field(default_factory=dict)
    ways: ClassVar[tuple[str, ...]] = ("write", "stream", "fused")

    @classmethod
    def of(
        cls, key: Key, coefficients: Tensor, noise: Noise | str, parameters: Mapping[str, Tensor], **options: Any
    ) -> Seeded:
        """Return the gradient of probes 0 … N − 1 of one key; `options` are `scales`, `sums` and `padding`."""
        noise = noise_of(noise) if isinstance(noise, str) else noise
        return cls((Term(key, 0, coefficients),), noise, dict(parameters), **options)

    @property
    def coefficients(self) -> Tensor:
        """c_k of all terms, concatenated, in fp32."""
        return torch.cat([term.coefficients for term in self.terms])

    def each(self, names: Iterable[str]) -> Iterator[tuple[Tensor, Tensor]]:
        yield from ((self.parameters[name], self.tensor(name).to(self.parameters[name].dtype)) for name in names)

    def add_to(self, target: Tensor, name: str, factor: float = 1.0, first_row: int = 0) -> None:
        """Compute target += factor · ĝ for one tensor, or for some of its rows, of which `first_row` is the first."""
        factor = factor * self.scales.get(name, 1.0)
        for key, first, coefficients in self.terms:
            stream = Stream(key, name, self.noise, self.padding.get(name))
            probes, alphas = range(first, first + len(coefficients)), (coefficients.double() * factor).numpy()
            noise_axpy(target, stream, probes, alphas, first_row=first_row, sums=self.sums)

    def tensor(self, name: str) -> Tensor:
        """Return ĝ of one tensor, in fp32 (fp64 for fp64 tensors)."""
        if name not in self.parameters:
            raise UsageError(f'the gradient has no tensor "{name}".{did_you_mean(name, self.parameters)}')
        p = self.parameters[name]
        gradient = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        self.add_to(gradient, name)
        return gradient

    def norm(self) -> float:
        squares = []  # in blocks of at most 1 MB where rows allow
        for name, p in self.parameters.items():
            wide = torch.promote_types(p.dtype, torch.float32)
            for rows, first in row_blocks(p, NORM_BYTES * 4 // wide.itemsize):
                block = torch.zeros(rows.shape, dtype=wide, device=p.device)
                self.add_to(block, name, first_row=first)
                squares.append(square_sum(block))
        return sum(fetch(squares)) ** 0.5

    def is_finite(self, norm: float | None = None) -> bool:
        # |ĝ| ≤ Σ_k |c_k| · max |noise|, so the coefficients nearly always decide; if not, generate the tensors.
        limit = largest_norm(self.parameters)
        if not bool(self.coefficients.isfinite().all()) or not (norm is None or norm < limit):
            return False
        size = float(self.coefficients.double().abs().sum()) * NOISE_AT_MOST
        sizes = {name: size * abs(self.scales.get(name, 1.0)) for name in self.parameters}
        bound = math.sqrt(sum(p.numel() * sizes[name] * sizes[name] for name, p in self.parameters.items()))
        return (norm is not None or bound < limit or self.norm() < limit) and all(
            sizes[name] < torch.finfo(p.dtype).max or bool(self.tensor(name).to(p.dtype).isfinite().all())
            for name, p in self.parameters.items()
        )

    def scaled(self, factor: float) -> Seeded:
        terms = (term._replace(coefficients=(term.coefficients.double() * factor).float()) for term in self.terms)
        return replace(self, terms=tuple(terms))


def largest_norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the norm from which on ‖g‖² would be infinite in the dtype of these tensors, but at least in bf16.

    The squares of fp16 reach 65,504 only: a limit of 256 would refuse gradients that SGD can use.
    """
    most = min((torch.finfo(p.dtype).max for p in tensors.values()), default=math.inf)
    return math.sqrt(max(most, torch.finfo(torch.bfloat16).max))


def square_sum(tensor: Tensor) -> Tensor:
    """Return Σ x² in fp64, 0-dimensional, summed in blocks of 1 MB; on the CPU where the device has no fp64."""
    total = torch.zeros((), dtype=torch.float64, device="cpu" if tensor.device.type == "mps" else tensor.device)
    for block in tensor.detach().reshape(-1).split(NORM_BYTES // 8):
        wide = block.to(total.device).double()
        total += (wide.square() if wide is block else wide.square_()).sum()
    return total


def fetch(numbers: list[Tensor]) -> list[Any]:
    """Return the values of 0-dimensional tensors, with one synchronisation however many there are."""
    return torch.stack([n.to(numbers[0].device) for n in numbers]).tolist() if numbers else []


def row_blocks(p: Tensor, limit_bytes: int) -> Iterator[tuple[Tensor, int]]:
    """Yield views of consecutive rows of a tensor, of at most this many fp32 bytes, with the number of their first row.

    Rows are those of the noise stream; a tensor that is a single row there is yielded whole.
    """
    p = p.detach()
    count, columns = layout(p.shape)
    if count == 1 or not p.is_contiguous():
        yield p, 0
        return
    step = max(1, limit_bytes // (4 * columns))
    yield from ((rows, i * step) for i, rows in enumerate(p.view(count, columns).split(step)))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters with `requires_grad` by canonical name, tied ones once, under their first name.

    Wrapper prefixes are removed, so a compiled or distributed model has the noise of the plain one.

    Raises:
        UsageError: if there is none, if one is not floating-point, or if two share a name or a noise stream.
    """
    pairs = [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    check_names(name for name, _ in pairs)
    named = dict(pairs)
    check_streams(named)
    return named


def check_names(names: Iterable[str]) -> None:
    """Raise `UsageError` if two tensors share a canonical name: in a dict by name, one would silently go untrained."""
    for name, count in Counter(names).items():
        if count > 1:
            raise UsageError(
                f'Two parameters are named "{name}" (the prefixes of wrappers do not count); rename one of them.'
            )


def check_streams(named: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` unless these are floating-point tensors that can be moved, with a noise stream each."""
    if not named:
        raise UsageError("The model has no parameter with requires_grad=True; there is nothing to train.")
    seen: dict[int, str] = {}
    for name, p in named.items():
        if nn.parameter.is_lazy(p):
            raise UsageError(f"{name} has no shape yet (a lazy module); evaluate the model once on a batch before.")
        if p.is_floating_point() and p.dtype.itemsize < 2:
            raise UsageError(
                f"{name} is {p.dtype}, in which torch adds nothing; train it in bf16 or wider, or set "
                "requires_grad=False on it."
            )
        if not p.is_floating_point():
            raise UsageError(
                f"{name} is {p.dtype}; only floating tensors can be trained. Set requires_grad=False on it."
            )
        other = seen.setdefault(stream_id(name), name)
        if other != name:
            raise UsageError(f'"{other}" and "{name}" hash to the same noise stream; rename one of the parameters.')


def padding_rows(model: nn.Module | None, named: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the padding row (`padding_idx`) of every embedding that has one; it is never perturbed.

    A weight that another module uses as well is left out: it gets a gradient there.
    """
    modules = [] if model is None else list(model.modules())
    users = Counter(id(p) for module in modules for p in module.parameters(recurse=False))
    embeddings = [module for module in modules if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    rows = {id(m.weight): m.padding_idx for m in embeddings if m.padding_idx is not None}
    return {name: rows[id(p)] for name, p in named.items() if id(p) in rows and users[id(p)] == 1}


def weight_bytes(named: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    """Return the bytes of these tensors, or of copies in `dtype`."""
    return sum(p.numel() * (dtype or p.dtype).itemsize for p in named.values())

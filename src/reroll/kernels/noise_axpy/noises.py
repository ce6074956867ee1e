"""The noise stream that every implementation follows, and what a direction is made of: a class per kind of noise.

A noise knows how to add itself to a tensor, to some rows of one, or to one copy per probe; everything else asks it and
never looks at its name. Independent entries (`Entries`) are made by the kernels of this folder; a structured noise
overrides `add`, and `linear` where a product can be had without the matrix.

**Layout.** A tensor is R rows of its last dimension C; with C < 32 or one axis it is a single row. Row r has ⌈C/128⌉
blocks of 128 sign bits, numbered from r·⌈C/128⌉; block b of probe k of a tensor is one Philox call with counter
(b low, b high, k, id of the name). Bit i of a block (word 0 first, lowest bit first) is the sign of column i: 0 → +1,
1 → −1. So any group of rows starts on a block and can be made alone.

**Sums** over probes run in ascending order inside blocks of 128 probes, then over the blocks, in fp32 (fp64 for fp64
tensors, or on request), and one addition brings the sum to p. Nothing is reassociated: this is why p, and not only z,
has the same bits everywhere.
"""

from __future__ import annotations

import functools
import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.philox import stream_id
from reroll.keys import Key

Alphas = Sequence[float] | np.ndarray
BLOCK = 128  # sign bits of one Philox call
PROBE_BLOCK = 128  # probes summed before a partial sum is added to the total
NARROW = 32  # tensors with fewer columns than this are laid out as one row


def layout(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of this shape in the noise stream.

    Example:
        >>> layout((4, 3, 64)), layout((100, 20)), layout((7,)), layout(())
        ((12, 64), (1, 2000), (1, 7), (1, 1))
    """
    count = math.prod(shape)
    if len(shape) < 2 or shape[-1] < NARROW:
        return 1, count
    return count // shape[-1], shape[-1]


class Noise(ABC):
    """Directions z(key, name, probe) of zero mean, for tensors of any shape. Frozen, hashable, named for files."""

    name: str
    """What `noise_of` makes this noise from again."""
    signs: bool = False
    """Whether every entry is +1 or −1, so that a step of ±ε is exact on a grid."""
    fourth_moment: float = 1.0
    """E z⁴ of an entry."""

    @abstractmethod
    def add(
        self, p: Tensor, out: Tensor, stream: Stream, first_row: int, probes: np.ndarray, alphas: Alphas,
        sums: torch.dtype,
    ) -> None:  # fmt: skip
        """Compute out ← p + Σ_k alphas[k] · z(probes[k]); p may be the rows from `first_row` on of the tensor."""

    def add_each(self, p: Tensor, out: Tensor, stream: Stream, probes: np.ndarray, alphas: Alphas) -> None:
        """Compute out[k] ← p + alphas[k] · z(probes[k])."""
        for k in range(len(probes)):
            self.add(p, out[k], stream, 0, probes[k : k + 1], [alphas[k]], sums_for(p))

    def add_rows(self, p: Tensor, rows: Tensor, out: Tensor, stream: Stream, probe: int, alpha: float) -> None:
        """Compute out[i] ← p[rows[i]] + alpha · z at row rows[i]."""
        whole = torch.empty_like(p, dtype=out.dtype)
        self.add(p, whole, stream, 0, np.array([probe], dtype=np.uint32), [alpha], sums_for(p))
        out.copy_(whole[rows])

    def perturber(self, p: Tensor, out: Tensor, stream: Stream) -> Callable[[int, float], None]:
        """Return (probe, alpha) → None that computes out ← p + alpha · z(probe), prepared for many calls."""
        return lambda k, alpha: self.add(p, out, stream, 0, np.array([k], dtype=np.uint32), [alpha], sums_for(p))

    def linear(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, stream: Stream, probe: int, alpha: float
    ) -> Tensor | None:
        """Return input · (W + alpha z)ᵀ + bias without making the matrix, or None: make it."""
        return None


class Entries(Noise):
    """Independent entries, made by the kernels: signs under `masks` masks, or normal numbers."""

    masks: int = 0
    is_normal: bool = False

    def ids(self, name: str) -> tuple[int, ...]:
        """Return the counter words c3 of a tensor: of the signs, then of the masks; or of the normal numbers."""
        if self.is_normal:
            return (stream_id(name, "normal"),)
        return (stream_id(name), *(stream_id(name, f"mask{i + 1}") for i in range(self.masks)))

    def add(
        self, p: Tensor, out: Tensor, stream: Stream, first_row: int, probes: np.ndarray, alphas: Alphas,
        sums: torch.dtype,
    ) -> None:  # fmt: skip
        implementation(p, out).axpy(p, out, stream, first_row, probes, self._factors(alphas, sums))

    def add_each(self, p: Tensor, out: Tensor, stream: Stream, probes: np.ndarray, alphas: Alphas) -> None:
        module = implementation(p, out)
        if hasattr(module, "axpy_each"):
            module.axpy_each(p, out, stream, probes, self._factors(alphas, sums_for(p)))
        else:
            super().add_each(p, out, stream, probes, alphas)

    def add_rows(self, p: Tensor, rows: Tensor, out: Tensor, stream: Stream, probe: int, alpha: float) -> None:
        implementation(p, out).axpy_rows(p, rows, out, stream, probe, self._factors([alpha], sums_for(p)))

    def perturber(self, p: Tensor, out: Tensor, stream: Stream) -> Callable[[int, float], None]:
        module = implementation(p, out)
        if hasattr(module, "perturber") and p.is_contiguous() and out.is_contiguous() and p.numel():
            return module.perturber(p, out, stream, self._factors([1.0], sums_for(p))[0])
        return super().perturber(p, out, stream)

    def _factors(self, alphas: Alphas, sums: torch.dtype) -> np.ndarray:
        """alpha · √(2^masks), which gives every entry unit variance: rounded once per probe, and its sign is exact."""
        real = np.float64 if sums == torch.float64 else np.float32
        return np.asarray(alphas, dtype=real) * real(math.sqrt(2.0**self.masks))


@dataclass(frozen=True)
class Rademacher(Entries):
    """±1."""

    name = "rademacher"
    signs = True


@dataclass(frozen=True)
class Normal(Entries):
    """Standard normal numbers."""

    name = "normal"
    is_normal = True
    fourth_moment = 3.0


@dataclass(frozen=True)
class Sparse(Entries):
    """±√(1/d) with probability d, else 0; `density` is d, a negative power of two, 1/2 … 2⁻¹⁶."""

    density: float = 0.5

    def __post_init__(self) -> None:
        if self.density not in [2.0**-masks for masks in range(1, 17)]:
            raise UsageError(
                f'noise="sparse": the density must be 1/2, 1/4, … 2**-16, "sparse:0.25" say; it is {self.density}.'
            )
        derived = {"name": f"sparse:{self.density}", "masks": round(-math.log2(self.density))}
        for name, value in {**derived, "fourth_moment": 1 / self.density}.items():
            object.__setattr__(self, name, value)


RADEMACHER = Rademacher()
NOISES: dict[str, Callable[..., Noise]] = {"rademacher": Rademacher, "normal": Normal, "sparse": Sparse}
"""Every kind of noise by the name that options and files use; what follows a colon is given to the class."""


@functools.cache
def noise_of(name: str) -> Noise:
    """Return the noise with this name: a kind of `NOISES`, with its argument after a colon.

    Example:
        >>> noise_of("sparse:0.25")
        Sparse(density=0.25)
    """
    kind, _, argument = name.partition(":")
    try:
        return NOISES[kind](*([float(argument)] if argument else []))
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        known = ", ".join(sorted(NOISES))
        raise UsageError(f'noise="{name}" is not a kind of noise. Known: {known}, sparse:DENSITY.') from None


@dataclass(frozen=True)
class Stream:
    """Where the noise of one tensor comes from: the key of the step, the tensor's name, and the kind of noise.

    `still` is a row of the tensor that has no noise: an embedding's padding.
    """

    key: Key
    name: str
    noise: Noise = RADEMACHER
    still: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        return self.noise.ids(self.name) if isinstance(self.noise, Entries) else ()

    @property
    def is_normal(self) -> bool:
        return isinstance(self.noise, Entries) and self.noise.is_normal


def sums_for(p: Tensor) -> torch.dtype:
    """Return the dtype in which probes are summed onto a tensor."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def implementation(p: Tensor, out: Tensor) -> ModuleType:
    """Return the module that computes these tensors: `reference`, `cpu` or `triton`."""
    name = dispatch.choose("noise_axpy", candidates(p.device.type, p.dtype, out.dtype)).name
    return importlib.import_module(f"reroll.kernels.noise_axpy.{name}")


@functools.cache
def candidates(device: str, dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[dispatch.Candidate, ...]:
    """Return the implementations for tensors of these dtypes, the first that applies being taken."""
    compiled = {dtype, out_dtype} <= {torch.float32, torch.float64, torch.bfloat16}
    types = f"{str(dtype).removeprefix('torch.')} on {device}"
    return (
        dispatch.Candidate("cpu", device == "cpu" and compiled, f"Numba kernel, {types}"),
        dispatch.Candidate("triton", compiled and dispatch.triton_runs_on(device), f"Triton kernel, {types}"),
        dispatch.Candidate("reference", True, f"torch operations, {types}"),
    )

"""The one primitive of zeroth-order training: add seeded noise to a tensor without ever storing the noise.

    noise_axpy        out ← p + Σ_k alpha_k z_k          perturb (one k), restore, update (all k)
    noise_axpy_each   out[k] ← p + alpha_k z_k           one perturbed copy per probe
    noise_axpy_rows   out[i] ← p[rows[i]] + alpha z      perturb what an embedding looks up

z_k is a function of (key, tensor name, probe k, position) alone, defined in `noises.py`.
Three implementations give the same bits: `reference` (torch), `cpu` (Numba) and `triton` (CUDA). Measured on one core,
`cpu` perturbs at about 0.15 ns per weight and sums probes at 0.04 ns per weight and probe (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels.noise_axpy.noises import (
    NARROW,
    NOISES,
    RADEMACHER,
    Alphas,
    Noise,
    Stream,
    layout,
    noise_of,
    sums_for,
)
from reroll.keys import Key

__all__ = [
    "NOISES", "RADEMACHER", "Noise", "Stream", "layout", "noise", "noise_axpy", "noise_axpy_each", "noise_axpy_rows",
    "noise_of", "perturber",
]  # fmt: skip


def noise_axpy(
    p: Tensor,
    stream: Stream,
    probes: Sequence[int],
    alphas: Alphas,
    *,
    out: Tensor | None = None,
    first_row: int = 0,
    sums: torch.dtype | None = None,
) -> None:
    """Compute out ← p + Σ_k alphas[k] · z(probes[k]).

    Args:
        p: the tensor, or some consecutive rows of one, the first of which is `first_row`. Any floating dtype.
        stream: key, name and noise of the tensor.
        probes: probe indices in [0, 2³²), in the order in which they are summed.
        alphas: one factor per probe; rounded to the dtype of the sums.
        out: where the result goes, of p's shape and any floating dtype; None writes into p.
        sums: dtype of the sum over probes, float32 or float64; None is float64 for float64 tensors, else float32.

    Example:
        >>> p = torch.zeros(2, 64)
        >>> noise_axpy(p, Stream(Key(0), "w"), [3], [0.5])
        >>> p.abs().unique()
        tensor([0.5000])
        >>> noise_axpy(p, Stream(Key(0), "w"), [3], [-0.5])
        >>> p.count_nonzero().item()
        0
    """
    out = p if out is None else out
    if out.shape != p.shape:
        raise UsageError(f"noise_axpy: out has shape {tuple(out.shape)}, p has {tuple(p.shape)}; they must agree.")
    if len(probes) != len(alphas):
        raise UsageError(f"noise_axpy: {len(probes)} probes but {len(alphas)} alphas; give one factor per probe.")
    if first_row and (p.dim() < 2 or layout(p.shape)[1] != p.shape[-1]):
        raise UsageError(f"noise_axpy: a tensor of shape {tuple(p.shape)} is laid out as one row; first_row must be 0.")
    if not len(probes):
        out.detach().copy_(p)
    elif p.numel():
        indices = np.asarray(probes, dtype=np.uint32)
        row = -1 if stream.padding_row is None else stream.padding_row - first_row
        padding = p[row].detach().to(out.dtype, copy=True) if 0 <= row < p.shape[0] else None
        stream.noise.add(p.detach(), out.detach(), stream, first_row, indices, alphas, sums or sums_for(p))
        if padding is not None:
            out[row] = padding


def perturber(p: Tensor, stream: Stream, out: Tensor) -> Callable[[int, float], None]:
    """Return a function (probe, alpha) that computes out ← p + alpha · z(probe).

    It is `noise_axpy` with one probe, prepared once: for a small tensor most of a call is preparation. Neither tensor
    may be reallocated while the function is in use; their values may change.
    """
    if stream.padding_row is not None:
        return lambda probe, alpha: noise_axpy(p, stream, [probe], [alpha], out=out)
    return stream.noise.perturber(p.detach(), out.detach(), stream)


def noise_axpy_each(p: Tensor, stream: Stream, probes: Sequence[int], alphas: Alphas, *, out: Tensor) -> None:
    """Compute out[k] ← p + alphas[k] · z(probes[k]) for every k; a probe may come twice, with alphas +ε and −ε.

    `out` has the shape [len(probes), *p.shape] and any floating dtype.
    """
    if out.shape != (len(probes), *p.shape) or len(probes) != len(alphas):
        raise UsageError(
            f"noise_axpy_each: out has shape {tuple(out.shape)}; expected {(len(probes), *p.shape)} for "
            f"{len(probes)} probes and {len(alphas)} alphas."
        )
    if p.numel():
        stream.noise.add_each(p.detach(), out.detach(), stream, np.asarray(probes, dtype=np.uint32), alphas)
        if stream.padding_row is not None:
            out[:, stream.padding_row] = p[stream.padding_row].detach().to(out.dtype)


def noise_axpy_rows(p: Tensor, rows: Tensor, stream: Stream, probe: int, alpha: float, *, out: Tensor) -> None:
    """Compute out[i] ← p[rows[i]] + alpha · z(probe) at row rows[i].

    Args:
        p: a matrix [R, C] with C ≥ 32 (a narrower one is a single row of the stream: perturb it whole).
        rows: int64 row indices [n] in [0, R).
        stream, probe, alpha: as for `noise_axpy`.
        out: [n, C], any floating dtype.
    """
    if p.dim() != 2 or p.shape[1] < NARROW:
        raise UsageError(f"noise_axpy_rows needs a matrix with at least {NARROW} columns; p has {tuple(p.shape)}.")
    if out.shape != (len(rows), p.shape[1]):
        raise UsageError(f"noise_axpy_rows: out has shape {tuple(out.shape)}; expected {(len(rows), p.shape[1])}.")
    if len(rows):
        # The kernels do not check indices: one out of range would read foreign memory.
        low, high = (int(index) for index in torch.aminmax(rows))
        if low < 0 or high >= len(p):
            raise IndexError(f"index {low if low < 0 else high} is out of range for a matrix of {len(p)} rows")
        stream.noise.add_rows(p.detach(), rows, out.detach(), stream, probe, alpha)
        if stream.padding_row is not None:
            out[rows == stream.padding_row] = p[stream.padding_row].detach().to(out.dtype)


def noise(
    key: Key,
    shape: Sequence[int],
    probe: int,
    name: str,
    *,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the noise tensor of one probe: zero mean, unit variance, the same on every device.

    Args:
        key: the key of the step, `Key(seed).at(step)`.
        shape, name: of the tensor in `named_parameters()`.
        probe: the probe index, in [0, 2³²).
        kind: "rademacher" (±1), "normal", "sparse" (half the coordinates zero) or "sparse:DENSITY" (DENSITY a negative
            power of two; the others are ±√(1/DENSITY)).
        dtype, device: of the result.

    Training never forms it: `noise_axpy` adds it without storing it.

    Example:
        >>> noise(Key(0).at(0), (2, 3), 0, "w")
        tensor([[-1., -1.,  1.],
                [ 1.,  1.,  1.]])

    Reference: the generator is Philox4x32-10 (Salmon et al., SC 2011); its layout is in `noise_axpy/noises.py`.
    """
    p = torch.zeros(tuple(shape), dtype=dtype, device=device)
    noise_axpy(p, Stream(key, name, noise_of(kind)), [probe], [1.0])
    return p

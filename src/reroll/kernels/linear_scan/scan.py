"""The scan s_t = A_t s_{t−1} + b_t: shapes, choice of an implementation, and gradients.

The gradient is one scan in the other direction with the transposed A_t, by the same function, so it can be
differentiated again.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError, did_you_mean
from reroll.kernels import dispatch
from reroll.kernels.lengths import steps_of
from reroll.kernels.linear_scan.operators import AFFINE, Affine


def linear_scan(
    A: Tensor,
    b: Tensor,
    initial: Tensor | None = None,
    reverse: bool = False,
    *,
    structure: str | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Compute s_t = A_t s_{t−1} + b_t for t = 1 … T.

    | structure  | A                | b             | A_t s                                                |
    |------------|------------------|---------------|------------------------------------------------------|
    | "diagonal" | [B, T, *]        | [B, T, *]     | A_t[c] · s[c]                                        |
    | "block"    | [B, T, K, K, *C] | [B, T, K, *C] | Σ_j A_t[i, j, c] · s[j, c], a matrix in each channel |
    | "dense"    | [B, T, *, D, D]  | [B, T, *, D]  | Σ_j A_t[i, j] · s[j]                                 |

    Args:
        A: the transitions. Any strides: values shared across sequences or steps can be expanded.
        b: the inputs, of A's dtype. fp16 and bf16 are computed in fp32, and the result is rounded. Complex numbers are
            taken for diagonal A, and scanned as two real channels with a 2×2 block.
        initial: s_0, as b without its axis 1; None is zero, and then A_1 is not used.
        reverse: compute s_t = A_t s_{t+1} + b_t instead; `initial` is then s_{T+1}.
        structure: needed only where A and b fit both "block" and "dense".
        lengths: steps of each sequence, [batch]; values beyond are ignored, NaN included, and s is zero there.

    Returns:
        s_1 … s_T, [B, T, …] as b; differentiable any number of times in A, b and `initial`.

    Raises:
        UsageError: if shapes, dtypes or devices disagree, or the structure cannot be told from the shapes.

    Example:
        >>> linear_scan(torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
        >>> turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(1, 4, 2, 2)
        >>> linear_scan(turn, torch.zeros(1, 4, 2), torch.tensor([[1.0, 0.0]]))[0, 1]
        tensor([-1., 0.])

    Reference: Blelloch, "Prefix sums and their applications", 1990.
    """
    if lengths is not None:
        return _padded(A, b, initial, reverse, structure, lengths)
    if b.is_complex():
        return _complex(A, b, initial, reverse, structure)
    operator = check(A, b, initial, structure)
    dtype = torch.float32 if b.dtype in (torch.float16, torch.bfloat16) else b.dtype
    folded_A, folded_b, folded_initial = (
        None if tensor is None else tensor.to(dtype) for tensor in fold(operator, A, b, initial)
    )
    states: Any = _Scan.apply(folded_A, folded_b, folded_initial, operator, reverse)
    return states.view(b.shape).to(b.dtype)


def _padded(
    A: Tensor, b: Tensor, initial: Tensor | None, reverse: bool, structure: str | None, lengths: Tensor
) -> Tensor:
    """Scan with identity steps behind the end of a sequence, so that a reverse scan carries `initial` to its end."""
    operator = check(A, b, initial, structure)
    _, valid = steps_of(lengths, b)
    in_A, in_b = (valid.view(*valid.shape, *[1] * (t.dim() - 2)) for t in (A, b))
    if not b.numel():
        return torch.zeros_like(b)
    folded, *_ = fold(operator, A, b, None)
    one = operator.eye(folded[:1, :1]).reshape(1, 1, *A.shape[2:])
    states = linear_scan(torch.where(in_A, A, one), torch.where(in_b, b, 0), initial, reverse, structure=structure)
    return torch.where(in_b, states, 0)


def _complex(A: Tensor, b: Tensor, initial: Tensor | None, reverse: bool, structure: str | None) -> Tensor:
    """Scan complex numbers as pairs of real ones: A = x + iy acts on them as [[x, −y], [y, x]]."""
    if check(A, b, initial, structure).name != "diagonal":
        raise UsageError(f"linear_scan: A is {_describe(A)}; complex numbers are scanned with a diagonal A only.")

    def pairs(z: Tensor, axis: int) -> Tensor:
        return torch.stack([z.real, z.imag], axis)

    blocks = torch.stack([pairs(A, 2), pairs(1j * A, 2)], 3)
    start = None if initial is None else pairs(initial, 1)
    real, imaginary = linear_scan(blocks, pairs(b, 2), start, reverse, structure="block").unbind(2)
    return torch.complex(real, imaginary)


def scan_into(
    A: Tensor,
    b: Tensor,
    out: Tensor,
    initial: Tensor | None = None,
    reverse: bool = False,
    *,
    structure: str | None = None,
) -> None:
    """Compute `linear_scan` into `out`, float32 or float64, without a gradient and without a copy.

    Args:
        A, b, initial, reverse, structure: as in `linear_scan`.
        out: of b's shape and dtype, contiguous; it may be b itself.

    Raises:
        UsageError: as `linear_scan` does, or if `out` does not fit.

    Example:
        >>> b = torch.ones(1, 3, 2)
        >>> scan_into(torch.full_like(b, 2.0), b, out=b)
        >>> b[0, :, 0]
        tensor([1., 3., 7.])
    """
    operator = check(A, b, initial, structure)
    if b.is_complex():
        raise UsageError(f"scan_into: b is {_describe(b)}; complex numbers are for linear_scan.")
    if out.shape != b.shape or out.dtype != b.dtype or out.device != b.device or not out.is_contiguous():
        raise UsageError(
            f"scan_into: out is {_describe(out)}{'' if out.is_contiguous() else ', not contiguous'}; expected "
            f"contiguous memory like b, {_describe(b)}."
        )
    with torch.no_grad():
        A, b, initial = fold(operator, A, b, initial)
        run(operator, A, b, initial, out.view(b.shape), reverse)


class _Scan(torch.autograd.Function):
    """The scan of folded arguments (see `fold`), differentiable any number of times.

    With g_t the derivative of the loss with respect to s_t, and c_t the part of it that does not flow through s_{t+1},
    g_t = Aᵀ_{t+1} g_{t+1} + c_t: the same recurrence backwards in time. It starts from g_T = c_T, so it needs T − 1
    transitions: in a scan without `initial`, A may omit the first.
    """

    @staticmethod
    def forward(A: Tensor, b: Tensor, initial: Tensor | None, operator: Affine, reverse: bool) -> Tensor:
        return _states(A, b, initial, operator.name, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        A, b, initial, ctx.operator, ctx.reverse = inputs
        ctx.short = A.shape[1] < b.shape[1]
        # The states are needed for the derivative in A only.
        ctx.save_for_backward(A, initial, output if ctx.needs_input_grad[0] else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, initial, states = ctx.saved_tensors
        operator, (earlier, later, first) = ctx.operator, _parts(ctx.reverse)
        between = A if ctx.short else A[:, later]
        g: Any = _Scan.apply(operator.transpose(between), grads[0], None, operator, not ctx.reverse)
        d_A = d_initial = None
        if ctx.needs_input_grad[0]:
            if ctx.short:
                d_A = operator.outer(g[:, later], states[:, earlier])
            else:
                like = states[:, first]
                start = torch.zeros_like(like) if initial is None else initial.unsqueeze(1).expand_as(like)
                previous = [start, states[:, earlier]]
                d_A = operator.outer(g, torch.cat(previous[::-1] if ctx.reverse else previous, 1))
        if ctx.needs_input_grad[2]:
            # Of no or one step, so that T = 0 gives zero.
            d_initial = operator.times(operator.transpose(A[:, first]), g[:, first]).sum(1)
        return d_A, g if ctx.needs_input_grad[1] else None, d_initial, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        """Fold the mapped axis into the batch."""

        def fold_in(tensor: Tensor | None, axis: int | None) -> Tensor | None:
            if tensor is None:
                return None
            mapped = tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
            return mapped.flatten(0, 1)

        tensors = [fold_in(tensor, axis) for tensor, axis in zip(arguments[:3], in_dims[:3])]
        states: Any = _Scan.apply(*tensors, *arguments[3:])
        return states.unflatten(0, (info.batch_size, states.shape[0] // info.batch_size)), 0


@torch.library.custom_op("reroll::linear_scan", mutates_args=())
def _states(A: Tensor, b: Tensor, initial: Tensor | None, structure: str, reverse: bool) -> Tensor:
    """Scan folded arguments into new memory: an operation that `torch.compile` does not look into."""
    out = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    run(AFFINE[structure], A, b, initial, out, reverse)
    return out


@_states.register_fake
def _(A: Tensor, b: Tensor, initial: Tensor | None, structure: str, reverse: bool) -> Tensor:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


def run(operator: Affine, A: Tensor, b: Tensor, initial: Tensor | None, out: Tensor, reverse: bool) -> None:
    """Scan folded arguments into `out` by the implementation that dispatch takes.

    Without `initial` the first state is the first b, and the first A, which may be omitted, is not read.
    """
    if not out.numel():
        return
    if initial is None:
        _, later, first = _parts(reverse)
        out[:, first].copy_(b[:, first])
        if out.shape[1] == 1:
            return
        A = A[:, later] if A.shape[1] == b.shape[1] else A
        initial = out[:, first].squeeze(1)
        b, out = b[:, later], out[:, later]
    _implementation(operator, out)(operator, A, b, initial, out, reverse)


def _parts(reverse: bool) -> tuple[slice, slice, slice]:
    """Return all steps but the last, all but the first and the first, in the order of the scan."""
    if reverse:
        return slice(1, None), slice(0, -1), slice(-1, None)
    return slice(0, -1), slice(1, None), slice(0, 1)


def _implementation(operator: Affine, out: Tensor) -> Callable[..., None]:
    order = {"diagonal": 1, "block": out.shape[2], "dense": out.shape[-1]}[operator.name]
    fits = operator.name == "diagonal" or order <= 64  # `triton.dense.SIZE`; not imported where Triton may be missing
    limits = "for diagonal A and matrices up to 64×64"
    return implementation("linear_scan", f"{operator.name} A", fits, limits, out.device.type, out.dtype).scan


def implementation(op: str, what: str, fits: bool, limits: str, device: str, dtype: torch.dtype) -> Any:
    """Return the module that scans or filters; `limits` says in words what `fits` Triton's kernels."""
    choice = dispatch.choose(op, _candidates(what, fits, limits, device, dtype))
    return importlib.import_module(f"reroll.kernels.linear_scan.{choice.name}")


@functools.cache
def _candidates(what: str, fits: bool, limits: str, device: str, dtype: torch.dtype) -> tuple[dispatch.Candidate, ...]:
    compiled = dtype in (torch.float32, torch.float64)
    what = f"{what}, {str(dtype).removeprefix('torch.')} on {device}"
    triton = compiled and fits and dispatch.triton_runs_on(device)
    return (
        dispatch.Candidate("cpu", device == "cpu" and compiled, f"Numba kernel, step by step: {what}"),
        dispatch.Candidate("triton", triton, f"Triton kernel, {limits}: {what}"),
        dispatch.Candidate("reference", True, f"torch operations, parallel in time: {what}"),
    )


# ---- shapes


def check(A: Tensor, b: Tensor, initial: Tensor | None, structure: str | None) -> Affine:
    """Return the operator of these arguments; see `linear_scan` for what is raised."""
    if not (b.is_floating_point() or b.is_complex()) or b.dim() < 2:
        raise UsageError(
            f"linear_scan: b is {_describe(b)}; expected floating-point numbers of shape [batch, time, …]."
        )
    start = (*b.shape[:1], *b.shape[2:])
    for name, tensor in (("A", A), ("initial", initial)):
        if tensor is not None and (tensor.dtype != b.dtype or tensor.device != b.device):
            raise UsageError(
                f"linear_scan: {name} is {_describe(tensor)}; expected dtype and device of b, {_describe(b)}."
            )
    if initial is not None and tuple(initial.shape) != start:
        raise UsageError(
            f"linear_scan: initial has shape {tuple(initial.shape)}; expected {start}, b without its time."
        )
    expected = shapes(b)
    if structure is not None and structure not in AFFINE:
        raise UsageError(f'linear_scan: structure="{structure}" is not known.{did_you_mean(structure, AFFINE)}')
    wanted = expected if structure is None else {structure: expected.get(structure)}
    fitting = [name for name, shape in wanted.items() if shape == tuple(A.shape)]
    if len(fitting) > 1:
        raise UsageError(
            f"linear_scan: A of shape {tuple(A.shape)} with b of shape {tuple(b.shape)} can be a block per channel or "
            f'dense matrices; say structure="block" or structure="dense".'
        )
    if not fitting:
        options = "; ".join(f"{name}: {shape or 'b needs another axis'}" for name, shape in wanted.items())
        raise UsageError(
            f"linear_scan: A has shape {tuple(A.shape)}, which does not fit b of shape {tuple(b.shape)}. Expected "
            f"{options}. Expand what is shared across sequences or steps."
        )
    return AFFINE[fitting[0]]


def shapes(b: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of A for every structure that b can have."""
    batch, time, *rest = b.shape
    options: dict[str, tuple[int, ...]] = {"diagonal": (batch, time, *rest)}
    if len(rest) > 1:
        options["block"] = (batch, time, rest[0], *rest)
    if rest:
        options["dense"] = (batch, time, *rest, rest[-1])
    return options


def fold(operator: Affine, A: Tensor, b: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments with the axes that implementations expect, as views where strides allow.

    diagonal: A, b [B, T, C]. block: A [B, T, K, K, C], b [B, T, K, C]. dense: A [B, T, G, D, D], b [B, T, G, D].
    """
    axes = b.dim()
    if operator.name == "diagonal":
        in_A, in_b = (2, axes), (2, axes)
    elif operator.name == "block":
        in_A, in_b = (4, axes + 1), (3, axes)
    else:
        in_A, in_b = (2, axes - 1), (2, axes - 1)
    if initial is not None:
        initial = _merge(initial, in_b[0] - 1, in_b[1] - 1)
    return _merge(A, *in_A), _merge(b, *in_b), initial


def _merge(tensor: Tensor, begin: int, end: int) -> Tensor:
    """Merge the axes begin … end − 1 into one, of size 1 where there are none."""
    if end == begin + 1:
        return tensor
    shape = tensor.shape
    return tensor.reshape(*shape[:begin], math.prod(shape[begin:end]), *shape[end:])


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"

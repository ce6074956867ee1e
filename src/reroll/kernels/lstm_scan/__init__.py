"""A whole LSTM sequence with block-diagonal recurrence, by the fastest implementation that applies.

    pre_t = W_in x_t + R h_{t−1} + b        per head, gates in the order i, f, z, o
    c_t = σ(f) ∘ c_{t−1} + σ(i) ∘ tanh(z)
    h_t = σ(o) ∘ tanh(c_t)

Each of N heads of width D = H/N sees only its own part of h, so R is stored as its blocks, [4H, D]. Rows of W_in, R and
b are ordered by head, then gate: for N = 1 this is torch's own order. Implementations: `reference` (a torch loop over
steps: any device, differentiable), `library` (torch's LSTM kernel, one head: oneDNN or cuDNN, differentiable) and `cpu`
(Numba, any number of heads, fp32, no gradient, can be batched over probes).

The function can be intercepted by a `TorchFunctionMode`, as torch's own functions can: zeroth-order training perturbs
the weights one group of heads at a time there.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from reroll.errors import UsageError
from reroll.kernels import dispatch

__all__ = ["lstm_scan"]

CPU_WIDTH = 128
"""Widest single head for which the Numba kernel is used; above, torch's kernel is faster."""
CPU_WIDTH_FEW = 16
"""The same for fewer than eight sequences, which leave most lanes idle."""
CPU_BATCH = 4
"""Smallest batch for which the Numba kernel, which always computes sixteen sequences, beats torch operations."""


def lstm_scan(
    inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM over a sequence.

    Args:
        inputs: [B, T, E].
        weight_ih: [4H, E], rows by head, then gate (i, f, z, o).
        weight_hh: [4H, D]; there are H/D heads.
        bias: [4H], ordered as the rows of `weight_ih`.
        h, c: the state before the first step, [B, H] each.

    Returns:
        Hidden states [B, T, H], and the state after the last step, [B, H] each.

    Raises:
        UsageError: if the shapes disagree.

    Example:
        >>> x, h = torch.zeros(2, 5, 3), torch.zeros(2, 4)
        >>> out, h, c = lstm_scan(x, torch.zeros(16, 3), torch.zeros(16, 2), torch.zeros(16), h, h)
        >>> tuple(out.shape), tuple(c.shape)
        ((2, 5, 4), (2, 4))

    Reference: Hochreiter and Schmidhuber, "Long short-term memory", 1997; block-diagonal heads as in
    Chaubard and Kochenderfer, arXiv:2505.17852.
    """
    arguments = (inputs, weight_ih, weight_hh, bias, h, c)
    if has_torch_function(arguments):
        return handle_torch_function(lstm_scan, arguments, *arguments)
    _check(*arguments)
    choice = dispatch.choose("lstm_scan", candidates(arguments))
    return importlib.import_module(f"reroll.kernels.lstm_scan.{choice.name}").scan(*arguments)


def _check(inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor) -> None:
    hidden, width = h.shape[-1], weight_hh.shape[-1]
    expected = {
        "weight_ih": (weight_ih, (4 * hidden, inputs.shape[-1])),
        "weight_hh": (weight_hh, (4 * hidden, width)),
        "bias": (bias, (4 * hidden,)),
        "h": (h, (inputs.shape[0], hidden)),
        "c": (c, (inputs.shape[0], hidden)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise UsageError(f"lstm_scan: {name} has shape {tuple(tensor.shape)}; expected {shape}.")
    if not width or hidden % width:
        raise UsageError(f"lstm_scan: weight_hh has {width} columns, which do not divide the {hidden} features of h.")


def candidates(arguments: tuple[Tensor, ...]) -> tuple[dispatch.Candidate, ...]:
    """Return the implementations for some arguments, the best first, with reasons."""
    inputs, _, weight_hh, *_ = arguments
    batch, time, _ = inputs.shape
    width = weight_hh.shape[1]
    heads = weight_hh.shape[0] // (4 * width)
    device, dtype = inputs.device.type, inputs.dtype
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments)
    compiled = device == "cpu" and dtype in (torch.float32, torch.bfloat16) and not gradient and time > 0
    # Under vmap this is the batch of one copy. The Numba kernel takes all copies at once; torch's kernel cannot.
    mapped = dispatch.is_mapped()
    fills_lanes = batch >= CPU_BATCH or mapped
    several = fills_lanes and (heads > 1 or mapped)
    widest = CPU_WIDTH if mapped or batch >= 2 * CPU_BATCH else CPU_WIDTH_FEW
    single = fills_lanes and heads == 1 and width <= widest and dtype == torch.float32
    library = heads == 1 and device in ("cpu", "cuda") and time > 0 and not mapped
    what = f"{heads} {'heads' if heads > 1 else 'head'} of width {width}, batch {batch}, on {device}"
    return (
        dispatch.Candidate("cpu", compiled and (several or single), f"Numba kernel, no gradient needed: {what}"),
        dispatch.Candidate("library", library, f"torch's LSTM kernel: {what}"),
        dispatch.Candidate("reference", True, f"torch operations, step by step: {what}"),
        dispatch.Candidate("cpu", compiled, "Numba kernel"),  # not the fastest here, but may be forced
    )

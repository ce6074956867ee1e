"""lstm_scan step by step in torch operations: any device, any dtype, differentiable. The others must equal it."""

from __future__ import annotations

import torch
from torch import Tensor


def scan(
    inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the sequence; see `lstm_scan`."""
    projected = torch.nn.functional.linear(inputs, weight_ih, bias)
    outputs = []
    for u in projected.unbind(1):
        h, c = step(u, weight_hh, h, c)
        outputs.append(h)
    stacked = torch.stack(outputs, 1) if outputs else inputs.new_zeros(*inputs.shape[:2], h.shape[-1])
    return stacked, h, c


def step(u: Tensor, weight_hh: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Advance one step: u is W_in x + b, [..., 4H]; h and c are [..., H]; weight_hh is [4H, D]."""
    width = weight_hh.shape[1]
    heads = h.shape[-1] // width
    if heads == 1:
        recurrent = torch.nn.functional.linear(h, weight_hh).unsqueeze(-2)
    else:
        blocks = weight_hh.unflatten(0, (heads, 4 * width))
        recurrent = torch.einsum("...nd,ngd->...ng", h.unflatten(-1, (heads, width)), blocks)
    h, c = gated(u.unflatten(-1, (heads, 4 * width)) + recurrent, c.unflatten(-1, (heads, width)))
    return h.flatten(-2), c.flatten(-2)


def gated(pre: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return h and c after a step: pre is the gates' argument, [..., 4H] in the order i, f, z, o."""
    i, f, z, o = pre.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(c), c

"""Cross-entropy of a linear head, without all logits at once.

    losses[n] = logsumexp_v(x_n · W_v + b_v) − (x_n · W_y + b_y),   y = targets[n]
    hits[n]   = argmax_v(x_n · W_v + b_v) = y

Rows are processed in chunks, and the backward pass recomputes the logits of a chunk: memory is that of one chunk and of
the gradients, [rows, V] in place of [N, V]. Losses, and the sums over chunks in the gradients of W and b, are computed
in at least fp32, whatever the dtype of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reroll.errors import UsageError, require_positive

__all__ = ["cross_entropy", "cross_entropy_reference"]

CHUNK_FLOATS = 1 << 24
"""Logits of a chunk: 64 MB of fp32."""


def cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the loss of every position in nats, in at least fp32, and whether its largest logit is the target.

    Args:
        features: [..., D].
        weight, bias: of the head, [V, D] and [V] or None.
        targets: int64, [...].
        rows: positions of a chunk; None: as many as have `CHUNK_FLOATS` logits.

    Raises:
        UsageError: if the shapes do not fit together.

    Example:
        >>> head, x, y = torch.nn.Linear(8, 50), torch.randn(3, 7, 8), torch.randint(50, (3, 7))
        >>> losses, hits = cross_entropy(x, head.weight, head.bias, y, rows=4)
        >>> expected = functional.cross_entropy(head(x).flatten(0, 1), y.flatten(), reduction="none")
        >>> torch.allclose(losses.flatten(), expected, atol=1e-6), hits.shape
        (True, torch.Size([3, 7]))
    """
    if features.shape[:-1] != targets.shape or features.shape[-1:] != weight.shape[1:]:
        raise UsageError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not "
            "fit; expected [..., D], [V, D] and [...]."
        )
    require_positive(rows=rows)
    device = features.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # A generator's entries have one type for the checker, so it cannot see that only the bias may be None.
        features, weight, bias = (None if t is None else t.to(dtype) for t in (features, weight, bias))  # pyright: ignore[reportAssignmentType]: bias alone may be None
    rows = rows or max(1, CHUNK_FLOATS // weight.shape[0])
    with torch.autocast(device, enabled=False):
        flat = features.reshape(-1, features.shape[-1]), weight, bias, targets.reshape(-1), rows
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (features, weight, bias) if t is not None)
        # torch declares no type for what `apply` returns.
        losses, hits = _Chunked.apply(*flat) if needs_grad else _forward(*flat)  # pyright: ignore[reportGeneralTypeIssues]: torch types no apply()
    return losses.view(targets.shape), hits.view(targets.shape)


def cross_entropy_reference(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return losses and hits of features [N, D] and targets [N], all logits at once: the reference."""
    logits = functional.linear(features, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def _forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
) -> tuple[Tensor, Tensor]:
    chunks = zip(features.split(rows), targets.split(rows))
    parts = [cross_entropy_reference(x, weight, bias, y) for x, y in chunks]
    losses, hits = zip(*parts)
    return torch.cat(losses), torch.cat(hits)


class _Chunked(torch.autograd.Function):
    forward = staticmethod(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.rows = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    # torch names no argument of its own backward.
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]: fewer names
        features, weight, bias, targets = ctx.saved_tensors
        wide = torch.promote_types(weight.dtype, torch.float32)
        wants_features, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        to_features = torch.empty_like(features) if wants_features else None
        to_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        to_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for begin in range(0, len(targets), ctx.rows):
            part = slice(begin, begin + ctx.rows)
            x = features[part]
            # d loss / d logits = softmax − one-hot
            p = functional.linear(x, weight, bias).to(wide).softmax(-1)
            p[torch.arange(len(p), device=p.device), targets[part]] -= 1
            p *= grads[0][part].unsqueeze(-1)
            narrow = p.to(features.dtype)
            if to_features is not None:
                to_features[part] = narrow @ weight
            if to_weight is not None:
                to_weight += narrow.t() @ x
            if to_bias is not None:
                to_bias += p.sum(0)
        like = ((to_weight, weight), (to_bias, bias))
        return (to_features, *(None if g is None else g.to(t.dtype) for g, t in like), None, None)

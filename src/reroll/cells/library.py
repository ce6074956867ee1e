"""torch's kernels for a whole sequence (oneDNN, cuDNN) of a GRU or a plain recurrent cell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reroll.kernels import dispatch


def by_library(
    operation: str, inputs: Tensor, state: Tensor, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Run a sequence, or return None where torch has no kernel for this call.

    Args:
        operation: "gru", "rnn" (tanh) or "rnn_relu".
        inputs: [B, T, E].
        state: [B, H].
        weights: weight_ih, weight_hh, and bias_ih, bias_hh or None, as torch orders them.

    Returns:
        Outputs [B, T, H] and the last of them, [B, H].
    """
    if not dispatch.library_runs(operation, inputs):
        return None
    kernel = {"gru": torch.gru, "rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[operation]
    given = [w for w in weights if w is not None]
    train = torch.is_grad_enabled()
    outputs, final = kernel(inputs, state.unsqueeze(0), given, len(given) == 4, 1, 0.0, train, False, True)
    return outputs, final.squeeze(0)

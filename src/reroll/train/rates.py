"""What a step's time comes to: tokens per second, the share of the device's peak (MFU), and dollars.

    MFU = FLOPs of the model per token · tokens per second ÷ (peak of a device · devices)

A rate that is not known is absent: the peak of a device that no data sheet below is of, or of a session of objects,
whose model and loss compute in a precision of their own; the FLOPs of a model that does not say them
(`flops_per_token`); the price of a machine. Rematerialised activations count once, so MFU is of the model
and not of the hardware (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from reroll.specs.base import OBJECT

SXM, NVL = {"bf16": 989.4e12, "fp32": 66.9e12}, {"bf16": 835.5e12, "fp32": 60.0e12}
A100 = {"bf16": 312.0e12, "fp32": 19.5e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": SXM,
    "NVIDIA H100 PCIe": {"bf16": 756.5e12, "fp32": 51.2e12},
    "NVIDIA H100 NVL": NVL,
    "NVIDIA H200": SXM,
    "NVIDIA H200 NVL": NVL,
    **dict.fromkeys(
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), A100
    ),
}
"""FLOP/s of dense matrix products by the name torch has for a device, of NVIDIA's data sheets for A100, H100 and H200.

bf16 is by tensor cores, without the sparsity that the sheets count in; fp32 is not TF32.
"""


@dataclass(frozen=True)
class Rates:
    """Rates of a run.

    Args:
        peak: FLOP/s of all its devices; None: unknown.
        flops: FLOPs per token of a step whose sequences have some length; None: unknown.
        price: dollars per hour of the whole machine; None: unknown.

    Example:
        >>> Rates(peak=1e12, flops=lambda length: 1e6, price=3600.0).of(1000, 64, 0.002, 1.5)
        {'tokens_per_second': 500000.0, 'mfu': 0.5, 'dollars': 1.502}
    """

    peak: float | None = None
    flops: Callable[[int], float] | None = None
    price: float | None = None

    @classmethod
    def of_run(cls, model: Any, config: Any, device: torch.device, devices: int) -> Rates:
        """Return the rates of a run: FLOPs are known of a gradient by one backward pass in the dtype of the run."""
        once = config.gradient.kind == "backprop" and not config.gradient.truncate
        peak = None if config.model.kind == OBJECT else peak_of(device, config.run.dtype)
        return cls(peak and peak * devices, getattr(model, "flops_per_token", None) if once else None, config.run.price)

    def of(self, tokens: int, length: int, seconds: float, spent: float) -> dict[str, float]:
        """Return the rates of a step of this many tokens, and the dollars of all, `spent` of them before this one."""
        rates: dict[str, float] = {}
        if seconds > 0:
            rates["tokens_per_second"] = tokens / seconds
            if self.peak is not None and self.flops is not None:
                rates["mfu"] = self.flops(length) * tokens / seconds / self.peak
        if self.price is not None:
            rates["dollars"] = spent + self.price * seconds / 3600
        return rates


def peak_of(device: torch.device, dtype: str) -> float | None:
    """Return the FLOP/s that a device can reach; None if that is not known."""
    reduced = torch.get_float32_matmul_precision() != "highest" or torch.is_autocast_enabled("cuda")
    if device.type != "cuda" or (dtype == "fp32" and reduced):
        return None
    return PEAKS.get(torch.cuda.get_device_name(device), {}).get(dtype)


def mean_mfu(rows: Iterable[dict[str, Any]]) -> float | None:
    """Return the MFU over the seconds of all rows; None unless every row has one.

    Example:
        >>> mean_mfu([{"mfu": 0.2, "seconds": 3.0}, {"mfu": 0.4, "seconds": 1.0}])
        0.25
    """
    rows = list(rows)
    known = [(row["mfu"], row["seconds"]) for row in rows if {"mfu", "seconds"} <= row.keys()]
    seconds = math.fsum(each for _, each in known)
    return math.fsum(mfu * each for mfu, each in known) / seconds if seconds and len(known) == len(rows) else None

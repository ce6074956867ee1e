"""The linear recurrence on which every parallel-in-time evaluation is built, and its gradients.

    linear_scan    s_t = A_t s_{t−1} + b_t                  A_t diagonal, a K×K block per channel, or dense
    scan_into      the same into existing memory, without a gradient
    kalman_scan    the mean of a Kalman filter along time   A_t diagonal or dense (`kalman.py`)

Implementations: `reference` (torch, parallel in time: odd-even or chunked), `cpu` (Numba, one step after another,
parallel over channels) and `triton` (CUDA, parallel over sequences, channels and chunks of time).
"""

from reroll.kernels.linear_scan.kalman import Filtered, kalman_scan, kalman_smooth
from reroll.kernels.linear_scan.scan import linear_scan, scan_into

__all__ = ["Filtered", "kalman_scan", "kalman_smooth", "linear_scan", "scan_into"]

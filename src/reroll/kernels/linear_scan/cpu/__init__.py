"""linear_scan and kalman_scan on the CPU: Numba, one step after another.

A sequential step costs K² multiply-adds per channel where a parallel scan multiplies matrices (K³), so on a CPU nothing
is won by parallelism along time. What counts is memory: every number of A and b is read once and every state written
once, whatever the strides, and the previous state is read back from where it was just written. States may therefore be
written over b.
"""

from reroll.kernels.linear_scan.cpu.affine import scan
from reroll.kernels.linear_scan.cpu.kalman import kalman

__all__ = ["kalman", "scan"]

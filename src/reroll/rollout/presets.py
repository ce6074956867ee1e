"""The papers' names for `Newton` with one choice or another.

deer  quasi_deer  elk  quasi_elk  picard  jacobi          each takes the keyword arguments of `Newton`
"""

from __future__ import annotations

from typing import Any

from reroll.rollout.damping import Kalman
from reroll.rollout.linearise import Dense, Diagonal, Identity, Zero
from reroll.rollout.newton import Newton


def deer(**options: Any) -> Newton:
    """Newton's method with whole Jacobians (Lim et al., arXiv:2309.12252): few iterations, memory B·T·D².

    Example:
        >>> deer(rtol=1e-4).linearise
        Dense()
    """
    return Newton(linearise=Dense(), **options)


def quasi_deer(**options: Any) -> Newton:
    """Newton's method with the Jacobians' diagonals (Gonzalez et al., arXiv:2407.19115): memory B·T·D.

    A diagonal is used for three iterations; `Newton(Diagonal())` computes one in each.
    """
    return Newton(linearise=Diagonal(every=3), **options)


def elk(variance: float = 1e6, *, adaptive: bool = False, smoother: bool = False, **options: Any) -> Newton:
    """DEER damped by a Kalman filter (Gonzalez et al., arXiv:2407.19115), for recurrences on which DEER explodes.

    Args:
        variance: σ²; infinity is DEER, smaller is stronger damping.
        adaptive: let σ² follow the residual.
        smoother: the Levenberg–Marquardt step of the paper's text, instead of the filter its code runs.
        options: of `Newton`.
    """
    return Newton(linearise=Dense(), damping=Kalman(variance, smoother, adaptive), **options)


def quasi_elk(variance: float = 1e2, *, adaptive: bool = False, smoother: bool = False, **options: Any) -> Newton:
    """quasi-DEER damped by one scalar Kalman filter per channel; arguments as for `elk`."""
    return Newton(linearise=Diagonal(), damping=Kalman(variance, smoother, adaptive), **options)


def picard(**options: Any) -> Newton:
    """Picard iteration: for steps close to the identity, as of a differential equation."""
    return Newton(linearise=Identity(), **options)


def jacobi(**options: Any) -> Newton:
    """Jacobi iteration: every state from the previous iterate, without a linear recurrence."""
    return Newton(linearise=Zero(), **options)

"""About V₁ V₂ᵀ of a matrix V₁ Σ V₂ᵀ: every direction with about the same weight, whatever its singular value.

    X ← G / max(‖G‖, ε);    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X, some times

With each step a singular value x becomes a x + b x³ + c x⁵, and the singular vectors stay. `METHODS` holds the choices.

References: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; Amsel et al., "The Polar
Express" (arXiv:2505.16932); Boissin et al., "Turbo-Muon" (2512.04632), its scaling by Prach & Lampert, "Almost-
Orthogonal Layers" (2208.03160); "MuonEq: Balancing Before Orthogonalization with Lightweight Equilibration"
(2603.28254).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.errors import UsageError, did_you_mean, require_count, require_positive

Coefficients = tuple[float, float, float]
JORDAN: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),)
"""a, b and c of x ← a x + b x³ + c x⁵, the same at every step: singular values in [0.01, 1] end in 0.68 … 1.13.
It never settles: 12 steps end in that band, too."""
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.15655 / 1.02, -22.48329 / 1.02**3, 15.87877 / 1.02**5), (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606), (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324), (1.875, -1.25, 0.375),
)  # fmt: skip
"""Of Amsel et al., the best for each of five steps; the first one divides by the 1.02 that they leave for rounding. The
sixth is their limit, the one to repeat: a + b + c = 1, a + 3 b + 5 c = 0 and 6 b + 20 c = 0, so that it leaves 1 alone
and makes of an error e of a singular value about 5/2 e³."""
TURBO: tuple[Coefficients, ...] = (
    (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip
"""Of Turbo-Muon: the last four of five steps by J. You and F. Cesista (2025)."""


def _newton_schulz(x: Tensor, polynomials: list[Coefficients], eps: float, gram: Tensor | None = None) -> Tensor:
    """Take the steps; `gram` is the first one's product of x and its transpose, where it is there already."""
    least, most = sorted(x.shape[-2:])
    wide = x.shape[-2] == least
    while polynomials:
        (a, b, c), *polynomials = polynomials
        gram = _gram(x) if gram is None else gram
        factor = _added(gram, gram, gram, beta=b, alpha=c)
        if polynomials and most >= 2 * least:
            # Two steps at once are less work for long matrices: with Z = a + b A + c A², the next A is Z A Z.
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            (a, b, c), *polynomials = polynomials
            gram = factor @ gram @ factor
            second = _added(gram, gram, gram, beta=b, alpha=c)
            factor = _added(factor, second, factor, beta=a)
            x = factor @ x if wide else x @ factor
        else:
            x = _added(x, factor, x, beta=a) if wide else _added(x, x, factor, beta=a)
        gram = None
    return x


def _preconditioned(x: Tensor, polynomials: list[Coefficients], eps: float) -> Tensor:
    """Take the steps from S X, or X S if m > n: row sums of |X Xᵀ|, or |Xᵀ X|, bound the squares of its values."""
    gram = _gram(x)
    sums = gram.abs().sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale = sums.sqrt().clamp(min=eps).reciprocal().to(x.dtype)
    x = scale * x if x.shape[-2] == gram.shape[-1] else x * scale.mT
    return _newton_schulz(x, polynomials, eps, scale * gram * scale.mT)


def _exact(x: Tensor, polynomials: list[Coefficients], eps: float) -> Tensor:
    """V₁ V₂ᵀ of the singular values that are no rounding error, times the norm of x, which is 1 or below."""
    finite = x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    u, s, vh = torch.linalg.svd(torch.where(finite, x, 0.0), full_matrices=False)  # which refuses NaN
    first, of = s[..., :1], torch.finfo(s.dtype)
    norm = first * torch.linalg.vector_norm(s / first.clamp(min=of.tiny), dim=-1, keepdim=True)  # squares may underflow
    weights = norm * (s > max(x.shape[-2:]) * of.eps * first)
    return torch.where(finite, u * weights[..., None, :] @ vh, torch.nan)


class Method(NamedTuple):
    """A way to orthogonalise: the polynomials, how many steps of them, and the function that takes these.

    The function gets X of norm 1 (below 1 for ‖G‖ < ε), [..., m, n], the polynomials of its steps, and ε.
    """

    coefficients: tuple[Coefficients, ...]
    steps: int = 5
    of: Callable[[Tensor, list[Coefficients], float], Tensor] = _newton_schulz
    exact: bool = False
    """Whether bf16 is not precise enough."""


METHODS: dict[str, Method] = {
    "jordan": Method(JORDAN),
    "polar_express": Method(POLAR_EXPRESS),
    "turbo": Method(TURBO, 4, _preconditioned),
    "svd": Method(((1.0, 0.0, 0.0),), 1, _exact, exact=True),
}
"""Every method that a config can name. The tests run over this table."""


def orthogonalize(
    matrix: Tensor,
    steps: int | None = None,
    *,
    coefficients: str | Coefficients | Sequence[Coefficients] = JORDAN,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    normalize_rows: bool = False,
) -> Tensor:
    """Return about V₁ V₂ᵀ of a matrix V₁ Σ V₂ᵀ, by a Newton–Schulz iteration.

        X₀ = G / max(‖G‖, ε);    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X

    By name of the coefficients, with the singular values that x = σ/‖G‖ becomes:

        "jordan"           5 steps: 0.68 … 1.20 from x = 0.003 upwards, 0.68 … 1.13 from 0.01, less below. With more
                           steps from lower values, but no nearer to 1: they never settle
        "polar_express"    5 steps: 0.84 … 1.15 from x = 0.001 upwards; 12 steps: 1, to rounding
        "turbo"            4 steps from S X, for m ≤ n, with Sᵢᵢ = (Σⱼ |X Xᵀ|ᵢⱼ)^(−½), or from X S likewise: singular
                           values of S X, which are at most 1, end in 0.97 … 1.15 from 0.01 upwards
        "svd"              V₁ V₂ᵀ itself, in fp32 or fp64, without directions of σ below max(m, n) u σ₁, u the spacing
                           of the numbers at 1; steps count for nothing

    Rows of one length (`normalize_rows`) and S change what is orthogonalised: the result is near V₁ V₂ᵀ of the scaled
    matrix, which is not that of G. Autocast changes nothing. A matrix of zeros gives zeros; one whose norm is below ε
    gives proportionally less (with either scaling, below ε²; with both, ε³); one with NaN or infinity gives NaN.

    Args:
        matrix: [..., m, n].
        steps: of the iteration; beyond the coefficients the last ones are repeated. None: 5, for "turbo" 4.
        coefficients: a name, or numbers: (a, b, c), or one such for every step, as in `JORDAN` and `POLAR_EXPRESS`.
        eps: ε; ours is that the lengths of the rows of X and 1/Sᵢᵢ count as no less than ε.
        dtype: to iterate in; None: bf16, as precision is not what limits it, and float64 for float64.
        normalize_rows: divide each row by its length first (MuonEq-R).

    Returns:
        The same shape and dtype.

    Raises:
        UsageError: if there are fewer than two axes, the numbers are not real ones, or the name is not known.

    Example:
        >>> u, _, v = torch.linalg.svd(torch.randn(40, 30, dtype=torch.float64), full_matrices=False)
        >>> G = u @ torch.linspace(0.05, 1, 30, dtype=torch.float64).diag() @ v
        >>> bool((orthogonalize(G) - u @ v).norm() < 0.3 * (u @ v).norm())
        True
        >>> bool((orthogonalize(G, 12, coefficients="polar_express") - u @ v).norm() < 1e-12 * (u @ v).norm())
        True
    """
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise UsageError(
            f"matrix of shape {tuple(matrix.shape)} and {matrix.dtype} must be real and have two axes or more."
        )
    require_positive(eps=eps)
    check_method(coefficients, steps)
    found = orthogonalized(matrix, coefficients, steps, eps=eps, dtype=dtype, normalize_rows=normalize_rows)
    return found.to(matrix.dtype)


def newton_schulz_flops(shape: Sequence[int], steps: int = 5) -> int:
    """Return the floating-point operations of the products that orthogonalise [..., m, n], two for a multiply-add.

        4 r² R + 2 r³ for a step, r the smaller and R the larger of m and n;  4 r² R + 10 r³ for two of them if R ≥ 2 r

    Example:
        >>> newton_schulz_flops((768, 768)) == 30 * 768**3, newton_schulz_flops((3072, 768)) == 70 * 768**3
        (True, True)
    """
    small, large = sorted(shape[-2:])
    pairs = steps // 2 if large >= 2 * small else 0
    products = steps - pairs  # of X with its transpose, and of X with a factor
    return math.prod(shape[:-2]) * small**2 * (4 * products * large + (2 * (steps - 2 * pairs) + 10 * pairs) * small)


def check_method(coefficients: Any, steps: Any, prefix: str = "") -> None:
    """Refuse what is no number of steps, or neither a method nor the coefficients of polynomials."""
    if steps is not None:
        require_count(**{f"{prefix}steps": steps})
    if isinstance(coefficients, str) and coefficients not in METHODS:
        raise UsageError(f'{prefix}coefficients="{coefficients}" is not known.{did_you_mean(coefficients, METHODS)}')
    try:
        polynomials = method_of(coefficients).coefficients
        fits = len(polynomials) and all(len(abc) == 3 and all(map(math.isfinite, abc)) for abc in polynomials)
    except TypeError:
        fits = False
    if not fits:
        raise UsageError(f"{prefix}coefficients={coefficients!r} must be (a, b, c) of every step, finite numbers.")


def method_of(coefficients: Any) -> Method:
    """Return the method of a name, of the numbers of every step, or of those of each."""
    if isinstance(coefficients, str):
        return METHODS[coefficients]
    alone = len(coefficients) > 0 and isinstance(coefficients[0], float | int)
    return Method((coefficients,) if alone else tuple(coefficients))


def orthogonalized(
    matrix: Tensor,
    coefficients: Any,
    steps: int | None,
    *,
    eps: float,
    dtype: torch.dtype | None,
    normalize_rows: bool,
) -> Tensor:
    """`orthogonalize`, unchecked, in the dtype that it iterates in."""
    method = method_of(coefficients)
    exact, work = torch.promote_types(matrix.dtype, torch.float32), working_dtype(matrix.dtype, dtype, method)
    if matrix.numel() == 0:
        return matrix.to(work)
    last = len(method.coefficients) - 1
    polynomials = [method.coefficients[min(step, last)] for step in range(steps or method.steps)]
    with torch.autocast(matrix.device.type, enabled=False):  # it would iterate in its own precision
        x = matrix.to(exact).reshape(-1, *matrix.shape[-2:])
        x = x / _norm(x).to(exact).clamp(min=eps)
        if normalize_rows:  # of m rows of length 1 the norm is √m
            x = x / (x.shape[-2] ** 0.5 * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=eps))
        x = x.to(work)
        if len(x) == 1:
            x = x[0]  # on a CPU, products of several matrices copy what is transposed; those of two do not
        return method.of(x, polynomials, eps).view(matrix.shape)


def working_dtype(dtype: torch.dtype, asked: torch.dtype | None, method: Method) -> torch.dtype:
    """Return the dtype to iterate in, for a matrix of a dtype."""
    work = asked or (torch.float64 if dtype is torch.float64 else torch.bfloat16)
    return torch.promote_types(work, torch.float32) if method.exact else work


def _gram(x: Tensor) -> Tensor:
    """X Xᵀ or Xᵀ X, the smaller of them."""
    return x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x


def _added(c: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """β c + α a b, of matrices or of stacks of them."""
    return (torch.addmm if c.dim() == 2 else torch.baddbmm)(c, a, b, beta=beta, alpha=alpha)


def _norm(x: Tensor) -> Tensor:
    """The Frobenius norm of every matrix; in fp64 where the sum of squares may be too much for fp32."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    if x.device.type == "mps":
        return norm
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        with contextlib.suppress(RuntimeError):  # under torch.func.vmap no value can be looked at
            if norm.isfinite().all():
                return norm
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)

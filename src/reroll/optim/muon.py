"""Muon: momentum, orthogonalised (Jordan et al., 2024).

    M ← μ M + G;  U = G + μ M (Nesterov), or M            momentum as a sum, in at least fp32
    O = orthogonalize(U) ≈ V₁ V₂ᵀ where U = V₁ Σ V₂ᵀ       every direction with about the same weight
    W ← (1 − η λ) W − η √max(1, m/n) O                     for W of m rows and n columns

It is for matrices that map features to features; embeddings, heads and vectors belong to AdamW, which
`reroll.optim.build_optimizer("muon", model, …)` sees to. All matrices of one shape are orthogonalised in one call.

References: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; Bernstein & Newhouse, "Old
Optimizer, New Norm" (arXiv:2409.20325); Amsel et al., "The Polar Express" (2505.16932); Li et al., "NorMuon"
(2510.05491).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from reroll.errors import UsageError, require_count, require_positive
from reroll.optim.sgd import evaluated, in_range, keep_precision

Coefficients = tuple[float, float, float]
JORDAN: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),)
"""a, b and c of x ← a x + b x³ + c x⁵, the same at every step: singular values in [0.01, 1] end in 0.68 … 1.13."""
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324),
)  # fmt: skip
"""Of Amsel et al., the best for each of five steps; made for inputs of norm 1/1.02."""
AT_ONCE = {"cpu": 1 << 18}
"""Numbers orthogonalised in one call, by device; elsewhere 2²⁶. A step holds a few times that beside the weights: on a
CPU it should fit into the cache."""


def orthogonalize(
    matrix: Tensor,
    steps: int = 5,
    *,
    coefficients: Sequence[Coefficients] = JORDAN,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return about V₁ V₂ᵀ of a matrix V₁ Σ V₂ᵀ, by a Newton–Schulz iteration.

        X₀ = G / max(‖G‖, ε);    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X

    Singular values from about 0.003 ‖G‖ upwards end near 1 (with five steps of the usual coefficients in 0.68 … 1.20;
    those from 0.01 ‖G‖ upwards in 0.68 … 1.13), smaller ones below. Autocast changes nothing. A matrix of zeros
    gives zeros; one whose norm is below ε gives proportionally less; one with NaN or infinity gives NaN.

    Args:
        matrix: [..., m, n].
        steps: of the iteration; beyond the coefficients the last ones are repeated.
        coefficients: (a, b, c) of every step: `JORDAN`, `POLAR_EXPRESS` or other ones.
        eps: see above.
        dtype: to iterate in; None: bf16, as precision is not what limits it, and float64 for float64.

    Returns:
        The same shape and dtype.

    Raises:
        UsageError: if there are fewer than two axes, or the numbers are not real ones.

    Example:
        >>> u, _, v = torch.linalg.svd(torch.randn(40, 30, dtype=torch.float64), full_matrices=False)
        >>> G = u @ torch.linspace(0.05, 1, 30, dtype=torch.float64).diag() @ v
        >>> bool((orthogonalize(G) - u @ v).norm() < 0.3 * (u @ v).norm())
        True
    """
    if matrix.dim() < 2 or not matrix.is_floating_point():
        raise UsageError(
            f"matrix of shape {tuple(matrix.shape)} and {matrix.dtype} must be real and have two axes or more."
        )
    require_positive(eps=eps)
    _check_steps(steps, coefficients)
    return _orthogonalized(matrix, steps, coefficients, eps, dtype).to(matrix.dtype)


def _check_steps(steps: Any, coefficients: Any, prefix: str = "") -> None:
    """Refuse what is no number of steps, or not the coefficients of their polynomials."""
    require_count(**{f"{prefix}steps": steps})
    try:
        fits = len(coefficients) and all(len(abc) == 3 and all(math.isfinite(c) for c in abc) for abc in coefficients)
    except TypeError:
        fits = False
    if not fits:
        raise UsageError(f"{prefix}coefficients={coefficients!r} must be (a, b, c) of every step, finite numbers.")


def _same(one: Sequence[Coefficients], other: Sequence[Coefficients]) -> bool:
    """Whether two are equal by value, as after saving and loading, where tuples may have become lists."""
    return [*map(tuple, one)] == [*map(tuple, other)]


def _orthogonalized(
    matrix: Tensor, steps: int, coefficients: Sequence[Coefficients], eps: float, dtype: torch.dtype | None
) -> Tensor:
    """`orthogonalize`, in the dtype that it iterates in."""
    exact, work = torch.promote_types(matrix.dtype, torch.float32), _working_dtype(matrix.dtype, dtype)
    if matrix.numel() == 0:
        return matrix.to(work)
    with torch.autocast(matrix.device.type, enabled=False):  # it would iterate in its own precision
        return _iterated(matrix.to(exact), steps, coefficients, eps, work)


def _iterated(
    matrix: Tensor, steps: int, coefficients: Sequence[Coefficients], eps: float, work: torch.dtype
) -> Tensor:
    exact = matrix.dtype
    x = matrix.reshape(-1, *matrix.shape[-2:])
    margin = 1.02 if _same(coefficients, POLAR_EXPRESS) else 1.0
    x = (x / (margin * _norm(x)).to(exact).clamp(min=eps)).to(work)
    if len(x) == 1:
        x = x[0]  # on a CPU, products of several matrices copy what is transposed; those of two do not
    least, most = sorted(x.shape[-2:])
    wide = x.shape[-2] == least
    of = [coefficients[min(step, len(coefficients) - 1)] for step in range(steps)]
    while of:
        a, b, c = of.pop(0)
        gram = x @ x.mT if wide else x.mT @ x
        factor = _added(gram, gram, gram, beta=b, alpha=c)
        if of and most >= 2 * least:
            # Two steps at once are less work for long matrices: with Z = a + b A + c A², the next A is Z A Z.
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            a, b, c = of.pop(0)
            gram = factor @ gram @ factor
            second = _added(gram, gram, gram, beta=b, alpha=c)
            factor = _added(factor, second, factor, beta=a)
            x = factor @ x if wide else x @ factor
        else:
            x = _added(x, factor, x, beta=a) if wide else _added(x, x, factor, beta=a)
    return x.view(matrix.shape)


def _working_dtype(dtype: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked or (torch.float64 if dtype is torch.float64 else torch.bfloat16)


def _orthogonalized_alike(matrices: list[Tensor], group: dict[str, Any]) -> Tensor:
    """`orthogonalize` of matrices of one shape, [how many, ..., m, n], with the numbers of a parameter group."""
    coefficients = group["ns_coefficients"]
    if isinstance(coefficients[0], float | int):
        coefficients = (coefficients,)
    together = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
    return _orthogonalized(together, group["ns_steps"], coefficients, group["eps"], group["dtype"])


def owners(shapes: Sequence[torch.Size], processes: int) -> list[list[int]]:
    """Return which matrices each process orthogonalises: the costliest first, to whoever has the least to do.

    Example:
        >>> owners([torch.Size(s) for s in ((8, 8), (8, 32), (8, 8), (2, 8, 8), (16, 4))], 2)
        [[1, 4], [3, 0, 2]]
    """
    costs = [shape.numel() * min(shape[-2:]) for shape in shapes]  # products of the smaller Gram matrix
    owned: list[list[int]] = [[] for _ in range(processes)]
    for index in sorted(range(len(shapes)), key=lambda i: -costs[i]):
        min(owned, key=lambda of_rank: sum(costs[i] for i in of_rank)).append(index)
    return owned


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


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices; arguments that torch.optim.Muon has too mean the same.

    The kernel of a convolution, [out, in, k, k], is a stack of k × k matrices here, not the matrix [out, in · k²] that
    Jordan et al. make of it: leave kernels to AdamW, as `reroll.optim.build_optimizer` does.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer: [..., m, n], every matrix of a
            stack on its own.
        lr: η.
        weight_decay: λ, decoupled.
        momentum: μ, in [0, 1). A warm-up of it is a schedule: set it from step to step (`reroll.optim.configure`).
        nesterov: orthogonalise G + μ M in place of M.
        ns_coefficients, ns_steps, eps: of `orthogonalize`; `POLAR_EXPRESS` is the other usual choice.
        adjust_lr_fn: None or "original" for the factor √max(1, m/n), "match_rms_adamw" for 0.2 √max(m, n), with which
            rates and decay of AdamW carry over (Liu et al., arXiv:2502.16982).
        beta2: divide rows (columns, if m < n) of O by a running root mean square, and keep its norm: NorMuon. None: no.
        cautious: decay only the weights that the update moves towards zero (Chen et al., arXiv:2510.12402).
        dtype: of the iteration, as for `orthogonalize`.
        process_group: processes with equal weights and gradients, such as `torch.distributed.group.WORLD`, share the
            matrices out and gather the updates. None: each process does everything. It is an attribute too.

    Raises:
        UsageError: for a number out of range, and for a parameter of less than two axes: flattened matrices would not
            be orthogonalised, only scaled.

    Example:
        >>> layer = torch.nn.Linear(20, 30, bias=False)
        >>> muon = Muon(layer.parameters(), lr=0.02)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.randn(64, 20)).square().mean().backward()
        >>> muon.step()
        >>> moved = torch.linalg.svdvals(layer.weight.detach() - before) / (0.02 * 1.5**0.5)
        >>> bool((moved > 0.5).all() and (moved < 1.3).all())
        True
    """

    process_group: Any = None  # of the class: copies and pickles of an optimizer hold its groups and states alone

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: Coefficients | Sequence[Coefficients] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        beta2: float | None = None,
        cautious: bool = False,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
    ):
        self.process_group = process_group
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "beta2": beta2, "cautious": cautious, "dtype": dtype,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with every `.grad` there is; return what the closure returned."""
        loss = evaluated(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if self.process_group is not None:
                for dtype in dict.fromkeys(p.dtype for p in parameters):
                    self._update_together([p for p in parameters if p.dtype == dtype], group)
                continue
            for alike in _of_one_shape(parameters):
                self._update(alike, _orthogonalized_alike([self._momentum(p, group) for p in alike], group), group)
        return loss

    def _update_together(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take the step of parameters of one dtype, each orthogonalised by the process that owns it."""
        processes = self.process_group
        ahead = {p: self._momentum(p, group) for p in parameters}  # everywhere, so that each has the whole state
        owned = owners([p.shape for p in parameters], dist.get_world_size(processes))
        matrices = [[parameters[i] for i in of_rank] for of_rank in owned]
        sizes = [[p.numel() for p in of_rank] for of_rank in matrices]
        work = _working_dtype(parameters[0].dtype, group["dtype"])
        flat = torch.zeros(max(map(sum, sizes)), dtype=work, device=parameters[0].device)
        mine, counts = matrices[rank := dist.get_rank(processes)], sizes[rank]
        place = dict(zip(mine, flat[: sum(counts)].split(counts)))
        for alike in _of_one_shape(mine):
            for p, update in zip(alike, _orthogonalized_alike([ahead[p] for p in alike], group)):
                place[p].copy_(update.flatten())
        received = [torch.empty_like(flat) for _ in matrices]
        dist.all_gather(received, flat, group=processes)
        for of_rank, counts, updates in zip(matrices, sizes, received):
            for p, update in zip(of_rank, updates[: sum(counts)].split(counts)):
                self._update([p], update.view(1, *p.shape), group)

    def _update(self, parameters: list[Tensor], updates: Tensor, group: dict[str, Any]) -> None:
        """Take the step of parameters of one shape."""
        lr, decay = float(group["lr"]), group["weight_decay"]
        rate = lr * _adjusted(parameters[0].shape, group["adjust_lr_fn"])
        for p, update in zip(parameters, updates):
            if group["beta2"] is not None:
                update = self._evened(p, update, group["beta2"])
            if decay:
                shrink = 1 - lr * decay if not group["cautious"] else 1 - lr * decay * (update * p > 0).to(p.dtype)
                p.mul_(shrink)
            p.add_(update if p.dtype is torch.float32 else update.to(p.dtype), alpha=-rate)

    def _momentum(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """Take the gradient into M, and return what is to be orthogonalised."""
        assert p.grad is not None
        gradient, mu = p.grad, group["momentum"]
        if gradient.layout is not torch.strided:
            raise UsageError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse; Muon needs a dense one."
            )
        if "momentum_buffer" not in self.state[p]:
            wide = torch.promote_types(p.dtype, torch.float32)
            self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=wide)
        buffer = self.state[p]["momentum_buffer"]
        torch.add(gradient, buffer, alpha=mu, out=buffer)
        return torch.add(gradient, buffer, alpha=mu) if group["nesterov"] else buffer

    def _evened(self, p: Tensor, update: Tensor, beta2: float) -> Tensor:
        """Divide the rows of an update by a running root mean square, and give it back the norm that it had."""
        update = update.to(torch.promote_types(update.dtype, torch.float32))
        axis = -1 if update.shape[-2] >= update.shape[-1] else -2
        mean = update.square().mean(axis, keepdim=True)
        second = self.state[p].setdefault("second_moment", torch.zeros_like(mean))
        second.lerp_(mean, 1 - beta2)
        even = update / second.clamp(min=1e-10).sqrt()
        norm = torch.linalg.matrix_norm(update, keepdim=True)
        return even * (norm / torch.linalg.matrix_norm(even, keepdim=True).clamp(min=1e-10))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, the momentum in its own precision."""
        for group in state_dict["param_groups"]:
            if missing := self.defaults.keys() - group.keys():
                raise UsageError(
                    f"the state is not one of reroll.Muon: its groups lack {', '.join(sorted(missing))}. That of "
                    "torch.optim.Muon holds an average of gradients, not their sum, and cannot be loaded."
                )
        super().load_state_dict(state_dict)
        keep_precision(self, state_dict)


def _check(group: dict[str, Any]) -> None:
    in_range(group, lr=math.inf, weight_decay=math.inf, momentum=1.0)
    if group["beta2"] is not None:
        in_range(group, beta2=1.0)
    require_positive(eps=group["eps"])
    coefficients = group["ns_coefficients"]
    single = isinstance(coefficients, Sequence) and len(coefficients) and isinstance(coefficients[0], float | int)
    _check_steps(group["ns_steps"], (coefficients,) if single else coefficients, "ns_")
    if group["adjust_lr_fn"] not in (None, "original", "match_rms_adamw"):
        raise UsageError(f'adjust_lr_fn={group["adjust_lr_fn"]!r} must be None, "original" or "match_rms_adamw".')
    for p in group["params"]:
        if p.dim() < 2 or not p.is_floating_point():
            raise UsageError(
                f"a parameter of shape {tuple(p.shape)} and {p.dtype} is no matrix of real numbers: give it to AdamW, "
                'or use reroll.optim.build_optimizer("muon", model, lr), which tells them apart.'
            )


def _of_one_shape(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group tensors by shape, dtype and device, in at most `AT_ONCE` numbers, in their order."""
    most = AT_ONCE.get(parameters[0].device.type, 1 << 26) if parameters else 0
    batches: dict[Any, list[list[Tensor]]] = {}
    for p in parameters:
        of_shape = batches.setdefault((p.shape, p.dtype, p.device), [[]])
        if of_shape[-1] and (len(of_shape[-1]) + 1) * p.numel() > most:
            of_shape.append([])
        of_shape[-1].append(p)
    return [batch for of_shape in batches.values() for batch in of_shape]


def _adjusted(shape: torch.Size, how: str | None) -> float:
    """The factor of the learning rate for the shape of a matrix."""
    m, n = shape[-2:]
    return 0.2 * max(m, n) ** 0.5 if how == "match_rms_adamw" else max(1.0, m / max(n, 1)) ** 0.5

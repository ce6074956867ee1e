"""Muon: momentum, orthogonalised (Jordan et al., 2024).

    M ← μ M + G;  U = G + μ M (Nesterov), or M            momentum as a sum, in at least fp32
    O = orthogonalize(U) ≈ V₁ V₂ᵀ where U = V₁ Σ V₂ᵀ       every direction with about the same weight
    W ← (1 − η λ) W − η √max(1, m/n) O                     for W of m rows and n columns

It is for matrices that map features to features; embeddings, heads and vectors belong to AdamW, which
`reroll.optim.build_optimizer("muon", model, …)` sees to. All matrices of one shape are orthogonalised in one call.

References: K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; Bernstein & Newhouse, "Old
Optimizer, New Norm" (arXiv:2409.20325); Li et al., "NorMuon" (2510.05491).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from reroll.errors import UsageError, require_positive
from reroll.optim.orthogonal import JORDAN, Coefficients, check_method, method_of, orthogonalized, working_dtype
from reroll.optim.sgd import evaluated, in_range, keep_precision

AT_ONCE = {"cpu": 1 << 18}
"""Numbers orthogonalised in one call, by device; elsewhere 2²⁶. A step holds a few times that beside the weights: on a
CPU it should fit into the cache."""


def _orthogonalized_alike(matrices: list[Tensor], group: dict[str, Any]) -> Tensor:
    """`orthogonalize` of matrices of one shape, [how many, ..., m, n], with the numbers of a parameter group."""
    together = torch.stack(matrices) if len(matrices) > 1 else matrices[0][None]
    options = {name: group[name] for name in ("eps", "dtype", "normalize_rows")}
    return orthogonalized(together, group["ns_coefficients"], group["ns_steps"], **options)


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
        ns_coefficients, ns_steps, eps: of `orthogonalize`: a name in `METHODS` ("jordan", "polar_express", "turbo",
            "svd"), or numbers.
        adjust_lr_fn: None or "original" for the factor √max(1, m/n), "match_rms_adamw" for 0.2 √max(m, n), with which
            rates and decay of AdamW carry over (Liu et al., arXiv:2502.16982).
        beta2: divide rows (columns, if m < n) of O by a running root mean square, and keep its norm: NorMuon. None: no.
        cautious: decay only the weights that the update moves towards zero (Chen et al., arXiv:2510.12402).
        normalize_rows: divide each row of G + μ M by its length before that (MuonEq-R), as for `orthogonalize`.
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
        ns_coefficients: str | Coefficients | Sequence[Coefficients] = JORDAN,
        eps: float = 1e-7,
        ns_steps: int | None = None,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        beta2: float | None = None,
        cautious: bool = False,
        normalize_rows: bool = False,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
    ):
        self.process_group = process_group
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov,
            "ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn,
            "beta2": beta2, "cautious": cautious, "normalize_rows": normalize_rows, "dtype": dtype,
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
        work = working_dtype(parameters[0].dtype, group["dtype"], method_of(group["ns_coefficients"]))
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
    check_method(group["ns_coefficients"], group["ns_steps"], "ns_")
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

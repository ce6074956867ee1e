"""The exact gradient of a trajectory, however that was computed: one linear recurrence backwards in time.

    g_t = ∂ℓ/∂s_t + A_{t+1}ᵀ g_{t+1}            then every other gradient is one batched derivative of f with g

The trajectory is the root of s_t = f_t(s_{t−1}), so by the implicit function theorem this is backpropagation through
time, not an approximation; the solver's iterations are not stored. Ways to solve for g:

    dense           the recurrence with whole Jacobians, in windows of bounded memory
    splitting       g ← diagonal recurrence applied to (∂ℓ/∂s + (A − Ã)ᵀ g), to rounding error: memory B·T·D
    sequential      one step after another, where possible in compiled code (`reroll.rollout.native`)

Second derivatives are not available.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.dispatch import Candidate
from reroll.kernels.linear_scan import linear_scan
from reroll.rollout import native
from reroll.rollout.problem import Problem

Method = Literal["auto", "dense", "splitting", "sequential"]
METHODS = get_args(Method)
DENSE_FLOATS = 1 << 26
"""Numbers in all Jacobians up to which "auto" takes "dense": 256 MB of float32."""
WINDOW_FLOATS = 1 << 24
"""Numbers in the Jacobians of a window of "dense"."""
SPLITTING_ITERATIONS = 200
NARROW = 1 << 12
"""Batch size times state size up to which "sequential" is faster in compiled code."""


def attach(problem: Problem, states: Tensor, method: Method) -> Tensor:
    """Return the solution [B, T, D] with a graph: the adjoint, then one batched step."""
    solution = states.detach()
    before = problem.before(solution)
    u = problem.u
    with torch.autocast(u.device.type, enabled=False):
        following = jacobian.step(problem.cell, problem.layout, u.flatten(0, 1), before.flatten(0, 1))
    if not following.requires_grad:
        return states

    def solve(cotangent: Tensor) -> Tensor:
        with torch.autocast(u.device.type, enabled=False):
            return adjoint(problem, solution, cotangent, method)

    used = (u, problem.start, *problem.cell.parameters(), *problem.cell.buffers())
    return _Attach.apply(following.view_as(states), solution, solve, *used)


class _Attach(torch.autograd.Function):
    """Takes its value from the solution; backward solves for the adjoint and hands it to one evaluation of f."""

    @staticmethod
    def forward(
        ctx: Any, following: Tensor, states: Tensor, solve: Callable[[Tensor], Tensor], *used: Tensor
    ) -> Tensor:
        ctx.solve = solve
        ctx.save_for_backward(*used)  # so that torch notices if one is changed before the backward pass
        return states.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        if torch.is_grad_enabled():  # which it is in here with create_graph=True only
            raise UsageError(
                "A second derivative was asked for (create_graph=True); a rollout that solves for its gradient has the "
                'first only. Use rollout=Sequential(kernel="reference").'
            )
        _ = ctx.saved_tensors
        return ctx.solve(grad_outputs[0]), *[None] * (len(ctx.needs_input_grad) - 1)


@torch.no_grad()
def adjoint(problem: Problem, states: Tensor, cotangent: Tensor, method: Method = "auto") -> Tensor:
    """Return g, [B, T, D], for ∂ℓ/∂s = `cotangent`."""
    batch, time, size = states.shape
    if method == "auto" or (method == "sequential" and batch * size <= NARROW):
        g = native.adjoint(problem, states, cotangent)
        if g is not None:
            dispatch.choose("adjoint", (Candidate("compiled", True, "the derivative of the step as a program"),))
            return g
    if method == "auto":
        small = batch * time * size * size <= DENSE_FLOATS
        reasons = (
            "no program for the derivative; whole Jacobians fit",
            "whole Jacobians take more than 256 MB in float32",
        )
        candidates = Candidate("dense", small, reasons[0]), Candidate("splitting", True, reasons[1])
        method = "dense" if dispatch.choose("adjoint", candidates).name == "dense" else "splitting"
    if method == "dense":
        return _dense(problem, states, cotangent)
    if method == "splitting":
        g = _splitting(problem, states, cotangent)
        if g is not None:
            return g
        return _dense(problem, states, cotangent) if size <= 64 else _sequential(problem, states, cotangent)
    return _sequential(problem, states, cotangent)


def _dense(problem: Problem, states: Tensor, cotangent: Tensor) -> Tensor:
    batch, time, size = states.shape
    width = max(1, WINDOW_FLOATS // (batch * size * size))
    g = torch.empty_like(states)
    g[:, -1] = cotangent[:, -1]
    for end in range(time - 1, 0, -width):
        begin = max(0, end - width)
        # The transition out of steps begin … end − 1 is the Jacobian of steps begin + 1 … end.
        u = problem.u[:, begin + 1 : end + 1].detach().flatten(0, 1)
        rows = states[:, begin:end].flatten(0, 1)
        a = jacobian.linearise(problem.cell, problem.layout, u, rows, "dense")[1].unflatten(0, (batch, end - begin))
        if problem.reset is not None:  # no gradient flows back through a reset
            a = a.masked_fill(problem.reset[:, begin + 1 : end + 1, None, None], 0.0)
        g[:, begin:end] = linear_scan(a.mT, cotangent[:, begin:end], g[:, end], reverse=True, structure="dense")
    return g


def _splitting(problem: Problem, states: Tensor, cotangent: Tensor) -> Tensor | None:
    """Return g, or None if it does not converge."""
    batch, time, size = states.shape
    if time == 1:
        return cotangent.clone()
    u, rows = problem.u[:, 1:].detach().flatten(0, 1), states[:, :-1].flatten(0, 1)
    diagonal = _diagonal(problem, u, rows, size).unflatten(0, (batch, time - 1))
    keep = None if problem.reset is None else ~problem.reset[:, 1:].unsqueeze(-1)
    if keep is not None:
        diagonal = diagonal * keep
    padded = torch.nn.functional.pad(diagonal, (0, 0, 0, 1))
    tolerance = 1e-13 if states.dtype == torch.float64 else 1e-6
    with torch.enable_grad():
        leaf = rows.detach().requires_grad_()
        following = jacobian.step(problem.cell, problem.layout, u, leaf)
    g = linear_scan(padded, cotangent, reverse=True, structure="diagonal")
    for _ in range(min(SPLITTING_ITERATIONS, time)):
        later = g[:, 1:]
        back = jacobian.vjp(following, leaf, later.flatten(0, 1), retain=True).view_as(later)
        if keep is not None:
            back = back * keep
        rest = cotangent.clone()
        rest[:, :-1] += back - diagonal * later
        previous, g = g, linear_scan(padded, rest, reverse=True, structure="diagonal")
        change, scale = (g - previous).abs().amax(), g.abs().amax()
        if not bool(torch.isfinite(scale)):
            return None
        if bool(change <= tolerance * scale):
            return g
    return None


def _diagonal(problem: Problem, u: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return the diagonal of the Jacobian where it is cheap; zeros where it would take many derivatives."""
    if size <= 64 or jacobian.why_untrackable(problem.cell) is None:
        return jacobian.linearise(problem.cell, problem.layout, u, rows, "diagonal")[1]
    return torch.zeros_like(rows)


def _sequential(problem: Problem, states: Tensor, cotangent: Tensor) -> Tensor:
    g, before = cotangent.clone(), problem.before(states)
    for t in range(states.shape[1] - 2, -1, -1):
        with torch.enable_grad():
            leaf = before[:, t + 1].detach().requires_grad_()
            following = jacobian.step(problem.cell, problem.layout, problem.u[:, t + 1].detach(), leaf)
        back = jacobian.vjp(following, leaf, g[:, t + 1], retain=False)
        if problem.reset is not None:
            back = back.masked_fill(problem.reset[:, t + 1 : t + 2], 0.0)
        g[:, t] += back
    return g

"""The algebra of a scan: the composition of two steps, the action of a step on a state, and the identity step.

An element is one step of the recurrence, a tuple of tensors; a state is what it acts on. Composition is associative and
has an identity, and is not commutative:

    affine            element (A, b)             state s         s ← A s + b
                      (A₂, b₂) ∘ (A₁, b₁) = (A₂ A₁, A₂ b₁ + b₂)
    scalar Kalman     element (a, b, C, η, J)    state (m, P)    see `ScalarKalman`
    dense Kalman      the same with matrices     state (m, P)    see `DenseKalman`

The axes that come first (batch, time) are the same for all parts of an element; operations act on those that follow.

References: Blelloch, "Prefix sums and their applications", 1990. Särkkä and García-Fernández, "Temporal parallelization
of Bayesian smoothers", IEEE Transactions on Automatic Control, 2021 (the Kalman elements).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

Element = tuple[Tensor, ...]
State = tuple[Tensor, ...]


class Operator(ABC):
    """The composition of steps, and their action on states."""

    name: str

    @abstractmethod
    def combine(self, first: Element, second: Element) -> Element:
        """Return the step that does `first`, then `second`."""

    @abstractmethod
    def apply(self, element: Element, state: State) -> State:
        """Return the state after a step."""

    def eye(self, A: Tensor) -> Tensor:
        """Return identity transitions of A's shape."""
        return torch.ones_like(A)

    def identity(self, like: Element) -> Element:
        """Return identity elements of these shapes."""
        return self.eye(like[0]), *(torch.zeros_like(part) for part in like[1:])


class Affine(Operator):
    """s ← A s + b, for one structure of A."""

    @abstractmethod
    def product(self, second: Tensor, first: Tensor) -> Tensor:
        """Return second · first."""

    @abstractmethod
    def times(self, A: Tensor, s: Tensor) -> Tensor:
        """Return A s."""

    @abstractmethod
    def outer(self, g: Tensor, s: Tensor) -> Tensor:
        """Return g sᵀ, in the structure of A: the derivative of g · A s with respect to A."""

    @abstractmethod
    def transpose(self, A: Tensor) -> Tensor:
        """Return Aᵀ, a view."""

    def combine(self, first: Element, second: Element) -> Element:
        return self.product(second[0], first[0]), self.times(second[0], first[1]) + second[1]

    def apply(self, element: Element, state: State) -> State:
        return (self.times(element[0], state[0]) + element[1],)


class Diagonal(Affine):
    """A [..., C] times s [..., C], channel by channel."""

    name = "diagonal"

    def product(self, second: Tensor, first: Tensor) -> Tensor:
        return second * first

    def times(self, A: Tensor, s: Tensor) -> Tensor:
        return A * s

    def outer(self, g: Tensor, s: Tensor) -> Tensor:
        return g * s

    def transpose(self, A: Tensor) -> Tensor:
        return A


class Block(Affine):
    """A [..., K, K, C] times s [..., K, C]: one K×K matrix per channel."""

    name = "block"

    def product(self, second: Tensor, first: Tensor) -> Tensor:
        return (second.unsqueeze(-2) * first.unsqueeze(-4)).sum(-3)

    def times(self, A: Tensor, s: Tensor) -> Tensor:
        return (A * s.unsqueeze(-3)).sum(-2)

    def outer(self, g: Tensor, s: Tensor) -> Tensor:
        return g.unsqueeze(-2) * s.unsqueeze(-3)

    def transpose(self, A: Tensor) -> Tensor:
        return A.transpose(-3, -2)

    def eye(self, A: Tensor) -> Tensor:
        return identity(A, A.shape[-2]).unsqueeze(-1).expand(A.shape)


class Dense(Affine):
    """A [..., D, D] times s [..., D]."""

    name = "dense"

    def product(self, second: Tensor, first: Tensor) -> Tensor:
        return second @ first

    def times(self, A: Tensor, s: Tensor) -> Tensor:
        return times(A, s)

    def outer(self, g: Tensor, s: Tensor) -> Tensor:
        return g.unsqueeze(-1) * s.unsqueeze(-2)

    def transpose(self, A: Tensor) -> Tensor:
        return A.mT

    def eye(self, A: Tensor) -> Tensor:
        return identity(A, A.shape[-1]).expand(A.shape)


class ScalarKalman(Operator):
    """One step of a Kalman filter in every channel: elements (a, b, C, η, J), state (mean, variance), all [..., C].

    With d = 1 + C₁ J₂, `first` then `second` is

        a = a₂ a₁/d        b = a₂ (b₁ + C₁ η₂)/d + b₂        C = a₂² C₁/d + C₂
                           η = a₁ (η₂ − J₂ b₁)/d + η₁        J = a₁² J₂/d + J₁
    """

    name = "scalar Kalman"

    def combine(self, first: Element, second: Element) -> Element:
        a1, b1, C1, eta1, J1 = first
        a2, _, _, eta2, J2 = second
        shrunk = a1 / (1 + C1 * J2)
        b, C = self.apply(second, (b1, C1))
        return a2 * shrunk, b, C, shrunk * (eta2 - J2 * b1) + eta1, shrunk * J2 * a1 + J1

    def apply(self, element: Element, state: State) -> State:
        a, b, C, eta, J = element
        mean, variance = state
        shrunk = a / (1 + variance * J)
        return shrunk * (mean + variance * eta) + b, shrunk * variance * a + C


class DenseKalman(Operator):
    """One step of a Kalman filter: elements (A, b, C, η, J) with A, C, J [..., D, D], state (mean, covariance).

    With M = (I + C₁ J₂)⁻¹, `first` then `second` is

        A = A₂ M A₁        b = A₂ M (b₁ + C₁ η₂) + b₂        C = A₂ M C₁ A₂ᵀ + C₂
                           η = A₁ᵀ Mᵀ (η₂ − J₂ b₁) + η₁      J = A₁ᵀ Mᵀ J₂ A₁ + J₁

    C and J are symmetric, so Mᵀ = (I + J₂ C₁)⁻¹. The system is solved without an error check: where it is singular in
    floating point the result is not finite.
    """

    name = "dense Kalman"

    def combine(self, first: Element, second: Element) -> Element:
        A1, b1, C1, eta1, J1 = first
        A2, b2, C2, eta2, J2 = second
        size = A1.shape[-1]
        solved = _solve(C1 @ J2, A1, C1, b1 + times(C1, eta2))
        MA1, MC1, Mb1 = solved[..., :size], solved[..., size : 2 * size], solved[..., -1]
        return (
            A2 @ MA1,
            times(A2, Mb1) + b2,
            A2 @ MC1 @ A2.mT + C2,
            times(MA1.mT, eta2 - times(J2, b1)) + eta1,
            MA1.mT @ J2 @ A1 + J1,
        )

    def apply(self, element: Element, state: State) -> State:
        A, b, C, eta, J = element
        mean, covariance = state
        solved = _solve(covariance @ J, covariance, mean + times(covariance, eta))
        return times(A, solved[..., -1]) + b, A @ solved[..., :-1] @ A.mT + C

    def eye(self, A: Tensor) -> Tensor:
        return identity(A, A.shape[-1]).expand(A.shape)


def identity(like: Tensor, size: int) -> Tensor:
    """Return the identity matrix [size, size], in the dtype and on the device of a tensor."""
    return torch.eye(size, dtype=like.dtype, device=like.device)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the products of matrices [..., D, D] and vectors [..., D]."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _solve(matrix: Tensor, *right: Tensor) -> Tensor:
    """Return (I + matrix)⁻¹ of the columns of matrices and vectors, side by side."""
    columns = [part.unsqueeze(-1) if part.dim() < matrix.dim() else part for part in right]
    return torch.linalg.solve_ex(identity(matrix, matrix.shape[-1]) + matrix, torch.cat(columns, -1))[0]


def strides_from(tensor: Tensor, reverse: bool) -> tuple[int, ...]:
    """Return where the scan of a tensor [B, T, …] starts, and all strides; time runs backwards in reverse."""
    row, time, *others = tensor.stride()
    return ((tensor.shape[1] - 1) * time, row, -time, *others) if reverse else (0, row, time, *others)


DIAGONAL, BLOCK, DENSE = Diagonal(), Block(), Dense()
SCALAR_KALMAN, DENSE_KALMAN = ScalarKalman(), DenseKalman()
AFFINE: dict[str, Affine] = {operator.name: operator for operator in (DIAGONAL, BLOCK, DENSE)}

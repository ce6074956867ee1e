"""Muon against exact orthogonalisation, torch's own, and its stated results for gradients of every kind."""

import copy

import pytest
import torch
from torch import nn

from reroll import Muon, orthogonalize
from reroll.errors import UsageError
from reroll.optim.groups import build_optimizer
from reroll.optim.muon import JORDAN, POLAR_EXPRESS

SHAPES = [(7, 7), (20, 9), (9, 20), (33, 64), (3, 5, 4), (2, 2, 6, 11)]


def with_singular_values(shape, low, dtype=torch.float64):
    """A random matrix whose singular values are spread evenly from `low` to 1 in their logarithm; and its U Vᵀ."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=dtype), full_matrices=False)
    values = torch.logspace(torch.tensor(low).log10().item(), 0, s.shape[-1], dtype=dtype)
    return u * values @ vh, u @ vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients, low, high", [(JORDAN, 0.68, 1.14), (POLAR_EXPRESS, 0.84, 1.15)])
def test_singular_values_end_in_the_stated_band(shape, coefficients, low, high):
    matrix, exact = with_singular_values(shape, 0.05)
    found = orthogonalize(matrix, coefficients=coefficients)
    values = torch.linalg.svdvals(found)
    assert low < values.min()
    assert values.max() < high
    # The singular vectors are those of the matrix: Uᵀ O V is diagonal.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ found @ vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    # Steps of coefficients whose fixed point is 1 go on to U Vᵀ itself.
    newton_schulz = ((1.875, -1.25, 0.375),)
    assert (orthogonalize(matrix, 30, coefficients=newton_schulz) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
@pytest.mark.parametrize("coefficients", [JORDAN, POLAR_EXPRESS, ((2.0, -1.5, 0.5), *JORDAN)])
def test_a_step_is_the_polynomial_of_the_singular_values(steps, coefficients):
    matrix = torch.randn(11, 6, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    x = s / matrix.norm() / (1.02 if coefficients is POLAR_EXPRESS else 1.0)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(orthogonalize(matrix, steps, coefficients=coefficients), u * x @ vh)


def test_bf16_is_enough():
    matrix, _ = with_singular_values((64, 200), 0.01, torch.float32)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.25
    exact = orthogonalize(matrix.double())
    assert (orthogonalize(matrix) - exact).norm() < 0.05 * exact.norm()
    assert (orthogonalize(matrix, dtype=torch.float32) - exact).norm() < 1e-4 * exact.norm()


def test_extreme_matrices_have_the_stated_results():
    matrix = torch.randn(6, 9)
    assert torch.equal(orthogonalize(torch.zeros(6, 9)), torch.zeros(6, 9))
    assert orthogonalize(matrix * 1e-30).abs().max() < 1e-15  # below ε: proportionally less
    torch.testing.assert_close(orthogonalize(matrix * 2.0**100), orthogonalize(matrix))
    torch.testing.assert_close(orthogonalize(matrix * 2.0**-15), orthogonalize(matrix))
    for bad in (torch.nan, torch.inf):
        one = matrix.clone()
        one[2, 3] = bad
        assert orthogonalize(one).isnan().any()
    assert orthogonalize(torch.zeros(0, 4)).shape == (0, 4)
    for wrong in (torch.zeros(5), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(UsageError, match="must be real and have two axes"):
            orthogonalize(wrong)


def pair(shape, dtype=torch.float32):
    ours = nn.Parameter(torch.randn(shape, dtype=dtype))
    return ours, nn.Parameter(ours.detach().clone())


@pytest.mark.parametrize("shape", [(12, 12), (30, 10), (10, 30)])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}, {"weight_decay": 0.1}]
)
def test_torch_takes_the_same_steps(shape, options):
    ours, theirs = pair(shape)
    options = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.9} | options
    optimizers = Muon([ours], **options), torch.optim.Muon([theirs], **options)
    start = ours.detach().clone()
    for _ in range(6):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Both iterate in bf16, from gradients that are rounded in another order.
    assert (ours - theirs).norm() < 0.03 * (theirs - start).norm()


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_sum_and_an_average_of_gradients_are_orthogonalised_alike(nesterov):
    """torch keeps (1 − μ) Σ μᵏ g; orthogonalising leaves no trace of the factor, here in float64."""
    ours, _ = pair((8, 5), torch.float64)
    expected, average = ours.detach().clone(), torch.zeros(8, 5, dtype=torch.float64)
    optimizer = Muon([ours], lr=0.1, momentum=0.8, nesterov=nesterov)
    for _ in range(5):
        ours.grad = torch.randn(8, 5, dtype=torch.float64)
        average.lerp_(ours.grad, 0.2)
        ahead = ours.grad.lerp(average, 0.8) if nesterov else average
        expected -= 0.1 * (8 / 5) ** 0.5 * orthogonalize(ahead)
        optimizer.step()
    torch.testing.assert_close(ours.detach(), expected)


def test_the_first_step_without_momentum_is_one_of_shampoo():
    """Shampoo without accumulation: (G Gᵀ)^(−¼) G (Gᵀ G)^(−¼) = U Vᵀ."""
    matrix, exact = with_singular_values((9, 9), 0.2)

    def power(m, p):
        values, vectors = torch.linalg.eigh(m)
        return vectors * values**p @ vectors.mT

    shampoo = power(matrix @ matrix.mT, -0.25) @ matrix @ power(matrix.mT @ matrix, -0.25)
    torch.testing.assert_close(shampoo, exact)
    p = nn.Parameter(torch.zeros(9, 9, dtype=torch.float64))
    p.grad = matrix
    Muon([p], lr=1.0, momentum=0.0, ns_coefficients=(1.875, -1.25, 0.375), ns_steps=30).step()
    torch.testing.assert_close(-p.detach(), shampoo)


def test_matrices_of_one_shape_are_updated_together_as_each_alone():
    together = [nn.Parameter(torch.randn(s)) for s in ((6, 8), (8, 6), (6, 8), (3, 6, 8), (6, 8))]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, lr=0.1)] + [Muon([p], lr=0.1) for p in alone]
    for _ in range(3):
        for p, q in zip(together, alone):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        together[2].grad = alone[2].grad = None  # one that took no part
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q)
    stacked = together[3].detach().clone()
    for i in range(3):  # every matrix of a stack is one of its own
        one = nn.Parameter(torch.zeros(6, 8))
        one.grad = stacked[i]
        many = nn.Parameter(torch.zeros(3, 6, 8))
        many.grad = stacked
        Muon([one], lr=0.1).step()
        Muon([many], lr=0.1).step()
        torch.testing.assert_close(many[i], one)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_rows_are_evened_and_the_norm_is_kept(shape):
    """NorMuon: divided by the running root mean square of its longer axis' rows, at the norm it had."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Muon([p], lr=1.0, beta2=0.9, momentum=0.0)
    axis, second, expected = (1 if shape[0] > shape[1] else 0), 0.0, torch.zeros(shape, dtype=torch.float64)
    for _ in range(4):
        p.grad = torch.randn(shape, dtype=torch.float64) * torch.logspace(-2, 0, shape[0])[:, None]
        update = orthogonalize(p.grad)
        second = 0.9 * second + 0.1 * update.square().mean(axis, keepdim=True)
        even = update / second.sqrt()
        expected -= max(1, shape[0] / shape[1]) ** 0.5 * even * update.norm() / even.norm()
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected)
    zero = nn.Parameter(torch.ones(4, 4))
    zero.grad = torch.zeros(4, 4)
    Muon([zero], beta2=0.9).step()
    assert torch.equal(zero.detach(), torch.ones(4, 4))


def test_cautious_decay_spares_what_the_update_moves_away_from_zero():
    p = nn.Parameter(torch.randn(5, 5))
    before = p.detach().clone()
    p.grad = torch.randn(5, 5)
    update = orthogonalize(p.grad)
    Muon([p], lr=0.1, weight_decay=2.0, momentum=0.0, cautious=True).step()
    decayed = torch.where(update * before > 0, 0.8 * before, before)
    torch.testing.assert_close(p.detach(), decayed - 0.1 * update)


@pytest.mark.parametrize(
    "bad", [{"lr": -1}, {"momentum": 1.0}, {"beta2": 1.5}, {"eps": 0}, {"ns_steps": 0}, {"adjust_lr_fn": "x"}]
)
def test_numbers_out_of_range_are_named(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Muon([nn.Parameter(torch.zeros(2, 2))], **bad)


def test_vectors_are_refused_because_they_would_only_be_scaled():
    for shape in ((4,), ()):
        with pytest.raises(UsageError, match="no matrix"):
            Muon([nn.Parameter(torch.zeros(shape))])
    optimizer = Muon([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(UsageError, match="no matrix"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1


def test_it_is_an_optimizer_of_torch():
    p = nn.Parameter(torch.randn(4, 6, dtype=torch.bfloat16))
    optimizer = Muon([p], lr=0.1, beta2=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = p.float().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    schedule.step()
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.float32
    saved, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    q = nn.Parameter(weights.clone())
    other = Muon([q], lr=9.0)
    other.load_state_dict(saved)
    for name in ("momentum_buffer", "second_moment"):
        assert torch.equal(other.state[q][name], optimizer.state[p][name])
    for optim, tensor in ((optimizer, p), (other, q)):
        tensor.grad = weights
        optim.step()
    assert torch.equal(p, q)


def test_embedding_head_and_vectors_never_go_to_muon():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    optimizer = build_optimizer("muon", model, 0.02)
    names = {rule: [n for g in o.param_groups for n in g["param_names"]] for rule, o in optimizer.optimizers.items()}
    assert names == {"muon": ["1.weight"], "adamw": ["0.weight", "3.weight", "1.bias", "2.weight", "2.bias", "3.bias"]}

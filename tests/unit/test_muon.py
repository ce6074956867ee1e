"""Muon against exact orthogonalisation, torch's own, and its stated results for gradients of every kind."""

import copy

import pytest
import torch
from torch import nn

from reroll import Backprop, Muon, orthogonalize
from reroll.data.synthetic import Copy
from reroll.errors import UsageError
from reroll.optim.groups import MultiOptimizer, build_optimizer
from reroll.optim.muon import JORDAN, POLAR_EXPRESS
from reroll.optim.step import StepSettings, configure
from reroll.specs import optim as specs
from reroll.train import checkpoint
from reroll.train.session import Session

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


def test_coefficients_and_defaults_are_those_that_were_published():
    """Jordan's of the speedrun's record 8; those of five steps of Amsel et al., algorithm 1."""
    assert JORDAN == ((3.4445, -4.7750, 2.0315),)
    assert POLAR_EXPRESS == (
        (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
        (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324),
    )  # fmt: skip
    (group,) = Muon([nn.Parameter(torch.zeros(2, 2))]).param_groups
    expected = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.95, "nesterov": True, "ns_coefficients": JORDAN}
    expected |= {"eps": 1e-7, "ns_steps": 5, "adjust_lr_fn": None, "beta2": None, "cautious": False, "dtype": None}
    assert {name: value for name, value in group.items() if name != "params"} == expected
    matrix = torch.randn(4, 4, dtype=torch.float64) * 1e-6
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(matrix, eps=1e-7), rtol=0, atol=0)
    torch.testing.assert_close(orthogonalize(matrix * 1e-4), orthogonalize(matrix * 1e-4, eps=1e-7), rtol=0, atol=0)
    assert not torch.allclose(orthogonalize(matrix * 1e-4), orthogonalize(matrix * 1e-4, eps=1e-8))


@pytest.mark.parametrize("low, high", [(0.003, 1.203), (0.01, 1.135)])
def test_the_band_that_is_stated(low, high):
    values = torch.linspace(low, 1, 4001, dtype=torch.float64)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert values.min() > 0.68
    assert high - 0.01 < values.max() < high


@pytest.mark.parametrize("how", [copy.deepcopy, list, lambda c: [list(abc) for abc in c], tuple])
def test_a_copy_of_polar_express_keeps_its_margin(how, tmp_path):
    matrix = torch.randn(9, 6, dtype=torch.float64)
    torch.save(how(POLAR_EXPRESS), tmp_path / "c.pt")
    for coefficients in (how(POLAR_EXPRESS), torch.load(tmp_path / "c.pt")):
        expected = orthogonalize(matrix, coefficients=POLAR_EXPRESS)
        assert torch.equal(orthogonalize(matrix, coefficients=coefficients), expected)


def test_autocast_changes_nothing():
    matrix = torch.randn(30, 20)
    alone = orthogonalize(matrix, dtype=torch.float32)
    p = nn.Parameter(torch.zeros(30, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(matrix, dtype=torch.float32), alone)
        p.grad = matrix
        Muon([p], lr=1.0, momentum=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(p.detach(), -(1.5**0.5) * alone)


def test_vmap_goes_over_stacks():
    matrices = torch.randn(3, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(orthogonalize)(matrices), orthogonalize(matrices))


def test_it_is_one_graph():
    """No value decides what is computed, so that torch.compile has nothing to break at."""
    matrix = torch.randn(6, 4, dtype=torch.float64)
    compiled = torch.compile(orthogonalize, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(matrix), orthogonalize(matrix))


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


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (7, 7)])
def test_rows_are_evened_and_the_norm_is_kept(shape):
    """NorMuon: divided by the running root mean square of its longer axis' rows, at the norm it had."""
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Muon([p], lr=1.0, beta2=0.9, momentum=0.0)
    axis, second, expected = (1 if shape[0] >= shape[1] else 0), 0.0, torch.zeros(shape, dtype=torch.float64)
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
    "bad",
    [
        {"lr": -1}, {"momentum": 1.0}, {"beta2": 1.5}, {"eps": 0}, {"adjust_lr_fn": "x"}, {"ns_steps": 0},
        {"ns_steps": 2.5}, {"ns_steps": "5"}, {"ns_coefficients": ()}, {"ns_coefficients": (1.0, 2.0)},
        {"ns_coefficients": ((1.0, 2.0),)}, {"ns_coefficients": 3.0}, {"ns_coefficients": (("a", 1.0, 2.0),)},
        {"ns_coefficients": ((1.0, float("nan"), 2.0),)}, {"ns_coefficients": None},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        Muon([nn.Parameter(torch.zeros(2, 2))], **bad)
    if "ns_coefficients" in bad:
        with pytest.raises(UsageError, match="coefficients="):
            orthogonalize(torch.ones(2, 2), coefficients=bad["ns_coefficients"])


def test_gradients_that_are_sparse_and_matrices_without_numbers():
    p = nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(UsageError, match="sparse"):
        Muon([p]).step()
    for shape in ((3, 0), (0, 3), (2, 0, 0)):
        empty = nn.Parameter(torch.zeros(shape))
        empty.grad = torch.zeros(shape)
        Muon([empty]).step()
        assert empty.shape == shape


def test_the_state_of_torch_is_refused():
    p = nn.Parameter(torch.randn(3, 2))
    p.grad = torch.randn(3, 2)
    theirs = torch.optim.Muon([p])
    theirs.step()
    with pytest.raises(UsageError, match=r"not one of reroll.Muon: its groups lack beta2"):
        Muon([p]).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_rates_of_roles_hold_from_the_beginning(name):
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    optimizer = build_optimizer(name, model, 0.02, lr_scales={"embedding": 15, "head": 0.1, "matrix": 2})
    of = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    expected = {"0.weight": 0.3, "1.weight": 0.04, "1.bias": 0.02, "2.weight": 0.002, "2.bias": 0.02}
    assert of == pytest.approx(expected)
    if isinstance(optimizer, MultiOptimizer):
        inner = {n: g["lr"] for o in optimizer.optimizers.values() for g in o.param_groups for n in g["param_names"]}
        assert inner == of
    configure(optimizer, StepSettings(0.01))
    assert {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]} == pytest.approx(
        {n: lr / 2 for n, lr in expected.items()}
    )


def test_a_session_of_objects_keeps_the_rates_of_roles():
    task = Copy(length=3, batch=4)
    model = nn.Sequential(nn.Embedding(task.vocab, 4), nn.Linear(4, 4), nn.Linear(4, task.vocab))
    optimizer = build_optimizer("adamw", model, 0.02, lr_scales=dict.fromkeys(("matrix", "embedding", "head"), 3.0))
    before = [group["lr"] for group in optimizer.param_groups]
    session = Session.of(task, model, Backprop(), optimizer, steps=3)
    configure(session.optimizer, session.settings())
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(before)
    assert sorted(set(before)) == pytest.approx([0.02, 0.06])


def test_a_precision_can_be_saved(tmp_path):
    model = nn.Linear(3, 2, bias=False)
    optimizer = Muon(model.parameters(), dtype=torch.float32)
    checkpoint.save(tmp_path, 1, model, {"optimizer": optimizer.state_dict()}, 1)
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.state["optimizer"]["param_groups"][0]["dtype"] is torch.float32
    optimizer.load_state_dict(saved.state["optimizer"])


def test_the_momentum_rises_from_0_85_to_0_95():
    optim = specs.Muon(momentum=0.95, momentum_warmup=300)
    assert [optim.momentum_at(step) for step in (0, 150, 300, 9999)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert specs.Muon().momentum_at(0) is None


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

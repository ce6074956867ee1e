"""Muon against exact orthogonalisation, torch's own, and its stated results for gradients of every kind."""

import copy
from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from torch import nn

from reroll import GPT, Backprop, Muon, orthogonalize
from reroll.data.synthetic import Copy
from reroll.errors import UsageError
from reroll.optim.groups import MultiOptimizer, build_optimizer
from reroll.optim.muon import owners
from reroll.optim.orthogonal import JORDAN, METHODS, newton_schulz_flops
from reroll.optim.step import StepSettings, configure
from reroll.specs import optim as specs
from reroll.train import checkpoint
from reroll.train.session import Session


def test_defaults_are_those_that_were_published():
    (group,) = Muon([nn.Parameter(torch.zeros(2, 2))]).param_groups
    expected = {"lr": 0.02, "weight_decay": 0.0, "momentum": 0.95, "nesterov": True, "ns_coefficients": JORDAN}
    expected |= {"eps": 1e-7, "ns_steps": None, "adjust_lr_fn": None, "beta2": None, "cautious": False}
    expected |= {"normalize_rows": False, "dtype": None}
    assert {name: value for name, value in group.items() if name != "params"} == expected
    matrix = torch.randn(4, 4, dtype=torch.float64) * 1e-6
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(matrix, eps=1e-7), rtol=0, atol=0)
    torch.testing.assert_close(orthogonalize(matrix * 1e-4), orthogonalize(matrix * 1e-4, eps=1e-7), rtol=0, atol=0)
    assert not torch.allclose(orthogonalize(matrix * 1e-4), orthogonalize(matrix * 1e-4, eps=1e-8))


def test_autocast_changes_nothing():
    matrix = torch.randn(30, 20)
    alone = orthogonalize(matrix, dtype=torch.float32)
    p = nn.Parameter(torch.zeros(30, 20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonalize(matrix, dtype=torch.float32), alone)
        p.grad = matrix
        Muon([p], lr=1.0, momentum=0.0, dtype=torch.float32).step()
    torch.testing.assert_close(p.detach(), -(1.5**0.5) * alone)


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
    matrix = torch.randn(9, 9, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix)
    exact = u @ vh

    def power(m, p):
        values, vectors = torch.linalg.eigh(m)
        return vectors * values**p @ vectors.mT

    shampoo = power(matrix @ matrix.mT, -0.25) @ matrix @ power(matrix.mT @ matrix, -0.25)
    torch.testing.assert_close(shampoo, exact)
    p = nn.Parameter(torch.zeros(9, 9, dtype=torch.float64))
    for coefficients in ((1.875, -1.25, 0.375), "polar_express", "svd"):
        nn.init.zeros_(p).grad = matrix
        Muon([p], lr=1.0, momentum=0.0, ns_coefficients=coefficients, ns_steps=40).step()
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


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_speedruns_matrices_are_shared_out_evenly(processes):
    with torch.device("meta"):
        model = GPT(50_304)
    shapes = [p.shape for name, p in model.named_parameters() if name.startswith("blocks")]
    owned = owners(shapes, processes)
    assert sorted(index for indices in owned for index in indices) == list(range(72))
    costs = [sum(shapes[i].numel() * min(shapes[i]) for i in indices) for indices in owned]
    assert max(costs) == min(costs) == sum(costs) / processes


@pytest.mark.parametrize("normalize_rows", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_stated_results(name, normalize_rows):
    """Of gradients of every size: none, proportionally less, the same, and NaN; alone, and as one of a group."""
    options = {"ns_coefficients": name, "normalize_rows": normalize_rows}
    gradient, start = torch.randn(11, 7), torch.randn(11, 7)

    def stepped(factor, **also):
        p = nn.Parameter(start.clone())
        p.grad = gradient * factor
        Muon([p], lr=0.1, momentum=0.0, **options, **also).step()
        return p.detach()

    expected = start - 0.1 * (11 / 7) ** 0.5 * orthogonalize(gradient, coefficients=name, normalize_rows=normalize_rows)
    torch.testing.assert_close(stepped(1.0), expected, rtol=0, atol=1e-3)  # bf16 in one of them
    assert torch.equal(stepped(0.0), start)
    torch.testing.assert_close(stepped(1e-30), start, rtol=0, atol=1e-7)
    torch.testing.assert_close(stepped(1e30), stepped(1.0), rtol=0, atol=0.01)
    assert stepped(torch.nan).isnan().any()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(stepped(1.0, process_group=dist.group.WORLD), stepped(1.0))
    finally:
        dist.destroy_process_group()


def test_a_config_names_every_method():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    assert set(get_args(get_type_hints(specs.Muon)["ns_coefficients"])) == set(METHODS)
    for name in METHODS:
        spec = specs.Muon(ns_coefficients=name, ns_steps=3, normalize_rows=True)
        group = spec.build(model, 0.02).optimizers["muon"].param_groups[0]
        assert (group["ns_coefficients"], group["ns_steps"], group["normalize_rows"]) == (name, 3, True)


def test_the_state_is_half_of_adams():
    """M in fp32, of every number; Adam has two of them, and a count. NorMuon adds a number per row."""
    matrices = [nn.Parameter(torch.randn(shape)) for shape in ((24, 24), (96, 24), (24, 96))]

    def state(optimizer):
        for p in matrices:
            p.grad = torch.randn_like(p)
        optimizer.step()
        return sum(t.nbytes for of in optimizer.state.values() for t in of.values())

    numbers = sum(p.numel() for p in matrices)
    adam = state(torch.optim.AdamW(matrices))
    assert adam == 4 * (2 * numbers + len(matrices))
    assert state(Muon(matrices)) == 4 * numbers <= 0.55 * adam
    assert state(Muon(matrices, beta2=0.95)) == 4 * (numbers + 24 + 96 + 96) <= 0.55 * adam


def test_the_share_of_a_step_of_the_speedrun():
    """Operations of Newton–Schulz ÷ those of forward and backward passes, of 524,288 tokens in sequences of 1,024."""
    with torch.device("meta"):
        model = GPT(vocab=50_304)
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() == 2]
    share = sum(newton_schulz_flops(p.shape) for p in matrices) / (524_288 * model.flops_per_token(1024))
    assert len(matrices) == 72
    assert share == pytest.approx(0.00315, rel=0.01)  # what docs/methods/muon.md says


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
        {"ns_coefficients": ((1.0, float("nan"), 2.0),)}, {"ns_coefficients": None}, {"ns_coefficients": "jordon"},
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

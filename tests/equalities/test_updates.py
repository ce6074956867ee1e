"""Ways of taking a step that give the same weights, and ways of backpropagating that give the same gradient."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reroll import optim
from reroll.data.batch import START
from reroll.data.task import sequence_losses
from reroll.errors import RunError, UsageError
from reroll.grad import Backprop, CentralDifference, Dense
from reroll.grad.base import Seeded, row_blocks, trainable
from reroll.keys import Key
from reroll.models.roles import ROLES, roles
from reroll.optim import (
    CDRGE,
    OPTIMIZERS,
    SGD,
    Average,
    StepSettings,
    apply,
    build_optimizer,
    clip_norm,
    groups,
)
from reroll.optim.groups import RULES
from reroll.outcome import Outcome
from tests.models import a_batch, build

KEY = Key(5).at(1)


def steps(name, how, count=3, optimizer="sgd", **options):
    """Weights after a few steps of CD-RGE."""
    model, batch = build(name), a_batch()
    opt = build_optimizer(optimizer, model, 0.02, **options)
    for step in range(count):
        estimate = CentralDifference(6, 0.02)(model, sequence_losses, batch, Key(5).at(step))
        apply(estimate.gradient, opt, how)
        assert all(p.grad is None for p in model.parameters())
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["lstm", "lstm-heads", "gru", "foreign"])
def test_write_is_stream(name, optimizer):
    ways = ("write", "stream", "fused") if optimizer == "sgd" else ("write", "stream")
    write, *others = (steps(name, how, optimizer=optimizer, weight_decay=0.1) for how in ways)
    assert all(torch.equal(write[n], other[n]) for other in others for n in write)
    start = dict(build(name).named_parameters())
    moved = [n for n in write if not torch.equal(write[n], start[n])]
    assert set(moved) == set(trainable(build(name)))


@pytest.mark.parametrize("how", ["write", "stream", "fused", "dense"])
def test_what_an_earlier_backward_left_is_no_part_of_a_step(how):
    model, batch = build("lstm"), a_batch()
    beside = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), beside], lr=0.1)
    estimator = Backprop() if how == "dense" else CentralDifference(3, 0.02)
    estimate = estimator(model, sequence_losses, batch, KEY)
    beside.square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    apply(estimate.gradient, optimizer, "write" if how == "dense" else how)
    assert torch.equal(beside, torch.ones(3))
    assert beside.grad is None
    assert all(p.grad is None and not torch.equal(p, old) for p, old in zip(model.parameters(), before))


@pytest.mark.parametrize("how", ["write", "stream"])
def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(how):
    model = nn.Linear(3, 1)
    estimate = CentralDifference(2, 0.02)(model, lambda m, x: m(x).square().mean(), torch.ones(2, 3), KEY)
    with pytest.raises(UsageError, match="LBFGS evaluates the loss itself.*Use SGD or AdamW"):
        apply(estimate.gradient, torch.optim.LBFGS(model.parameters()), how)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fused_is_write(decay):
    options = dict(momentum=0.0, weight_decay=decay)
    write, fused = (steps("lstm-heads", how, **options) for how in ("write", "fused"))
    for n in write:
        torch.testing.assert_close(fused[n], write[n], rtol=1e-6, atol=1e-7)
    model, batch = build("lstm", torch.float64), a_batch()
    double = {}
    for how in ("write", "fused"):
        copied = copy.deepcopy(model)
        estimate = CentralDifference(6, 0.02)(copied, sequence_losses, batch, KEY)
        apply(estimate.gradient, torch.optim.SGD(copied.parameters(), lr=0.1, weight_decay=decay), how)
        double[how] = torch.cat([p.flatten() for p in copied.parameters()])
    torch.testing.assert_close(double["fused"], double["write"], rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_improves_with_either_estimator(optimizer):
    lr = {"sgd": 0.3, "adamw": 0.02, "muon": 0.02}[optimizer]
    for estimator in (Backprop(), CentralDifference(48, 0.05)):
        model, batch = build("gru"), a_batch(rows=16)
        opt = build_optimizer(optimizer, model, lr)
        losses = []
        for step in range(60):
            estimate = estimator(model, sequence_losses, batch, Key(0).at(step))
            losses.append(estimate.loss.item())
            apply(estimate.gradient, opt)
        assert losses[-1] < 0.9 * losses[0], (optimizer, estimator, losses[0], losses[-1])


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made; views do not count."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not func.is_view:
            self.bytes = max(self.bytes, made.numel() * made.element_size())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_needs_little_memory(dtype):
    model = nn.Linear(700, 900, dtype=dtype)
    weight, bias = model.weight, model.bias
    estimate = CentralDifference(2, 0.1)(model, lambda m, x: m(x).square().mean(), torch.ones(2, 700, dtype=dtype), KEY)
    made = [estimate.gradient.tensor(name).double() for name in ("weight", "bias")]
    expected = torch.cat([g.flatten() for g in made]).norm().item()
    with Largest() as largest:
        norm = estimate.gradient.norm()
    assert norm == pytest.approx(expected, rel=1e-12)
    assert 1 << 19 < largest.bytes <= 1 << 20
    weight.grad, bias.grad = (g.to(dtype) for g in made)
    with Largest() as largest:
        norm = Dense({"weight": weight, "bias": bias}).norm()
    assert norm == pytest.approx(
        torch.cat([p.grad.double().flatten() for p in (weight, bias)]).norm().item(), rel=1e-12
    )
    assert largest.bytes <= 1 << 20


def test_adamw_and_sgd_are_torchs():
    for name, make in [
        ("adamw", lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.0)),
        ("sgd", lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)),
    ]:
        model, batch = build("gru"), a_batch()
        other = copy.deepcopy(model)
        ours, theirs = build_optimizer(name, model, 0.01), make(list(other.parameters()))
        for _ in range(3):
            apply(Backprop()(model, sequence_losses, batch, KEY).gradient, ours)
            theirs.zero_grad()
            sequence_losses(other, batch).mean().backward()
            theirs.step()
        for a, b in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_sgd_is_torchs_bit_for_bit():
    model = build("gru")
    other = copy.deepcopy(model)
    ours, theirs = SGD(model.parameters(), 0.1, 0.9), torch.optim.SGD(other.parameters(), 0.1, 0.9)
    for seed in range(4):
        for m, o in ((model, ours), (other, theirs)):
            torch.manual_seed(seed)
            for p in m.parameters():
                p.grad = torch.randn_like(p)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_momentum_is_wider_than_the_weights():
    """In bf16, 1 + 2⁻⁹ is 1: the gradient would never be seen again."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = SGD([p], 0.1, momentum=0.5)
    for g in (2.0, 2.0**-9):
        p.grad = torch.full((1,), g, dtype=torch.bfloat16)
        optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].item() == 1 + 2.0**-9


@pytest.mark.parametrize("how", ["step", "write", "stream"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weight_decay_is_decoupled_and_for_matrices_only(momentum, how):
    model = build("lstm")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = build_optimizer("sgd", model, 0.5, weight_decay=0.1, momentum=momentum)
    for _ in range(2):
        if how == "step":
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            opt.step()
        else:
            apply(Seeded.of(KEY, torch.zeros(2), "rademacher", dict(trainable(model))), opt, how)
    for n, p in model.named_parameters():
        torch.testing.assert_close(p, before[n] * (0.95**2 if p.dim() >= 2 else 1.0))


class Misnamed(nn.Module):
    """Names that say the wrong thing, and a head tied to the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(9, 4), "head": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 3)}
        )
        self.embed = nn.Linear(4, 9, bias=False)
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
        if tied:
            self.embed.weight = self.transformer["wte"].weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": m})})])
def test_roles_are_of_types_and_shapes_not_of_names(wrap, tied):
    model = wrap(Misnamed(tied))
    expected = {
        "transformer.wte.weight": "embedding", "transformer.head.weight": "matrix", "transformer.head.bias": "vector",
        "transformer.conv.weight": "kernel", "transformer.conv.bias": "vector",
    }  # fmt: skip
    assert roles(model) == expected | ({} if tied else {"embed.weight": "head"})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("model", ["lstm", "stack", "dnc", "foreign"])
def test_every_parameter_is_in_exactly_one_group(name, model):
    model = build(model)
    made = groups(model, OPTIMIZERS[name], 0.1, {"head": 2.0, "vector": 0.5})
    placed = [(n, id(p)) for group in made for n, p in zip(group["param_names"], group["params"], strict=True)]
    assert sorted(placed) == sorted((n, id(p)) for n, p in trainable(model).items())
    role_of = roles(model)
    for group in made:
        for n in group["param_names"]:
            assert group["rule"] == OPTIMIZERS[name][role_of[n]]
            assert group["lr_scale"] == {"head": 2.0, "vector": 0.5}.get(role_of[n], 1.0)
            assert group["weight_decay"] == (0.0 if role_of[n] == "vector" else 0.1)


def test_muon_takes_the_matrices_of_the_recurrence_and_names_what_it_lacks():
    model = build("lstm")
    opt = build_optimizer("muon", model, 0.01)
    taken = {n for g in opt.param_groups if g["rule"] == "muon" for n in g["param_names"]}
    assert taken == {"cells.0.weight_ih", "cells.0.weight_hh"}
    for broken, message in [
        (lambda: build_optimizer("muon", trainable(model), 0.01), "pass the model itself"),
        (lambda: build_optimizer("muon", nn.Linear(3, 2), 0.01), 'use optimizer="adamw"'),
        (lambda: build_optimizer("sgd", model, 0.01, lr_scales={"haed": 1.0}), 'Did you mean "head"'),
        (lambda: build_optimizer("smuon", model, 0.01), 'Did you mean "muon"'),
        (lambda: build_optimizer("sgd", model, 0.01, momentun=0.5), 'momentun is no option.*Did you mean "momentum"'),
        (lambda: build_optimizer("sgd", model, 0.01, betas=(0.9, 0.9)), 'betas is no option of optimizer="sgd"'),
        (lambda: SGD(model.parameters(), lr="a"), "lr='a' must be a number"),
    ]:
        with pytest.raises(UsageError, match=message):
            broken()


def test_several_optimizers_are_one_to_torch():
    model, batch = build("gru"), a_batch()
    opt = build_optimizer("muon", model, 0.01)
    assert isinstance(opt, torch.optim.Optimizer)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append("hook"))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    def closure():
        calls.append("closure")
        opt.zero_grad()
        loss = sequence_losses(model, batch).mean()
        loss.backward()
        return loss

    assert opt.step(closure).item() == pytest.approx(closure().item(), rel=0.1)
    scheduler.step()
    assert calls == ["closure", "hook", "closure"]
    assert {g["lr"] for o in opt.optimizers.values() for g in o.param_groups} == {0.005}
    assert set(opt.state) == set(model.parameters())
    for copied in (copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))):
        twin, other = copied
        opt.zero_grad()
        other.zero_grad()
        states = []
        for m, o in ((copy.deepcopy(model), None), (twin, other)):
            for p in m.parameters():
                p.grad = torch.ones_like(p)
            if o is None:  # the same step, from the state as torch loads it
                o = build_optimizer("muon", m, 0.01)
                o.load_state_dict(copy.deepcopy(opt.state_dict()))
            o.step()
            assert all(g in [h for i in o.optimizers.values() for h in i.param_groups] for g in o.param_groups)
            states.append(list(m.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(*states))
    with pytest.raises(UsageError, match="of sgd; the optimizers are muon, adamw"):
        opt.load_state_dict({"sgd": {}})
    with pytest.raises(UsageError, match="one of .optimizers"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("budget, pieces", [(None, [1, 6]), (2048, [1, 2, 4]), (1 << 20, [7])])
def test_stream_holds_a_budget_of_gradients_and_keeps_shapes_together(budget, pieces):
    shapes = [(5,), (32, 32), (16, 16), (32,), (16, 16), (5,), (16, 16)]
    named = {f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
    optimizer, seen = torch.optim.AdamW(named.values(), lr=0.1), []
    optimizer.register_step_pre_hook(lambda *_: seen.append([p for p in named.values() if p.grad is not None]))
    apply(Seeded.of(KEY, torch.ones(2), "rademacher", named), optimizer, "stream", budget)
    assert [len(piece) for piece in seen] == pieces
    for piece in seen:
        assert sum(p.numel() * 4 for p in piece) <= max(budget or 0, 4096)
    assert {id(p) for piece in seen for p in piece} == {id(p) for p in named.values()}


def test_optimizer_state_survives_a_round_trip():
    for name in OPTIMIZERS:
        model, batch = build("gru"), a_batch()
        opt = build_optimizer(name, model, 0.01)
        apply(Backprop()(model, sequence_losses, batch, KEY).gradient, opt)
        other = copy.deepcopy(model)
        again = build_optimizer(name, other, 0.01)
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        for m, o in ((model, opt), (other, again)):
            apply(Backprop()(m, sequence_losses, batch, KEY).gradient, o)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_clipping_scales_either_gradient():
    model, batch = build("lstm"), a_batch()
    seeded = CentralDifference(6, 0.02)(model, sequence_losses, batch, KEY).gradient
    whole = torch.cat([seeded.tensor(n).flatten() for n in seeded.parameters]).double().norm().item()
    assert seeded.norm() == pytest.approx(whole, rel=1e-6)
    clipped, norm = clip_norm(seeded, whole / 4)
    assert norm == pytest.approx(whole)
    assert clipped.norm() == pytest.approx(whole / 4, rel=1e-5)
    assert clip_norm(seeded, whole * 2)[0] is seeded
    dense = Backprop()(model, sequence_losses, batch, KEY).gradient
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert dense.norm() == pytest.approx(expected, rel=1e-6)
    assert clip_norm(dense, 0.01)[0].norm() == pytest.approx(0.01, rel=1e-5)


def test_row_blocks_are_the_tensor():
    for shape in [(7,), (5, 40), (3, 4, 50), (6, 20)]:
        p = torch.arange(torch.Size(shape).numel()).float().view(shape)
        blocks = list(row_blocks(p, 400))
        assert torch.equal(torch.cat([rows.flatten() for rows, _ in blocks]), p.flatten())
        assert sum(rows.shape[0] for rows, _ in blocks if rows.dim() == 2) in (
            0,
            blocks[-1][1] + blocks[-1][0].shape[0],
        )


def test_illegal_pairs_name_the_remedy():
    model, batch = build("lstm"), a_batch()
    seeded = CentralDifference(2, 0.02)(model, sequence_losses, batch, KEY).gradient
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(UsageError, match='this AdamW is another rule. Use how="stream"'):
        apply(seeded, adam, "fused")
    with pytest.raises(UsageError, match=r'this SGD is another rule. Use how="stream"'):
        apply(seeded, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), "fused")
    with pytest.raises(UsageError, match='how="steam" is no way.*Did you mean "stream"'):
        apply(seeded, adam, "steam")
    with pytest.raises(UsageError, match=r"not in the optimizer, head.weight first"):
        apply(seeded, torch.optim.SGD([p for n, p in model.named_parameters() if n != "head.weight"], lr=0.1))
    dense = Backprop()(model, sequence_losses, batch, KEY).gradient
    with pytest.raises(UsageError, match='Use how="write"'):
        apply(dense, adam, "stream")


def test_average_follows_and_swaps():
    p = nn.Parameter(torch.zeros(3))
    average, expected = Average({"p": p}, 0.9), torch.zeros(3)
    for t in range(1, 6):
        with torch.no_grad():
            p += 1
        average.update({"p": p})
        beta = min(0.9, (1 + t) / (10 + t))
        expected = beta * expected + (1 - beta) * t
    torch.testing.assert_close(average.tensors["p"], expected)
    with average.swapped_in({"p": p}):
        torch.testing.assert_close(p.detach(), expected)
    assert p.tolist() == [5, 5, 5]
    torch.testing.assert_close(average.tensors["p"], expected)


# ---- backpropagation


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "lstm-heads", "dnc", "stack"])
@pytest.mark.parametrize("options", [dict(accumulate=3), dict(checkpoint=True), dict(accumulate=2, checkpoint=True)])
def test_backprop_in_parts_is_backprop(name, options):
    model, batch = build(name, torch.float64), a_batch(rows=7, time=11)
    whole = Backprop()(model, sequence_losses, batch, KEY)
    expected = {n: p.grad.clone() for n, p in trainable(model).items()}
    loss = sequence_losses(model, batch).mean()
    for p, g in zip(trainable(model).values(), torch.autograd.grad(loss, list(trainable(model).values()))):
        torch.testing.assert_close(p.grad, g)
    parts = Backprop(**options)(model, sequence_losses, batch, KEY)
    assert parts.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    for n, p in trainable(model).items():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-10, atol=1e-14)


def test_truncated_backprop_stops_at_the_borders():
    model, batch = build("gru", torch.float64), a_batch(time=9)
    Backprop(truncate=4)(model, sequence_losses, batch, KEY)
    found = {n: p.grad.clone() for n, p in trainable(model).items()}
    state, total = None, 0.0
    for begin in range(0, 9, 4):
        window = replace(batch.steps(begin, begin + 4), state=START if state is None else state)
        losses, after = sequence_losses(model, window)
        total = total + losses.mean()
        state = tuple(s.detach() for s in after)
    named = trainable(model)
    for (n, _), g in zip(named.items(), torch.autograd.grad(total, list(named.values()))):
        torch.testing.assert_close(found[n], g, rtol=1e-10, atol=1e-14)
    whole = Backprop(truncate=9)(model, sequence_losses, batch, KEY)
    exact = Backprop()(model, sequence_losses, batch, KEY)
    assert whole.loss.item() == pytest.approx(exact.loss.item())


def test_backprop_says_when_the_loss_is_not_finite():
    model = nn.Linear(2, 1)
    estimate = Backprop()(model, lambda m, x: m(x).sum() * float("nan"), torch.ones(1, 2), KEY)
    assert estimate.outcome is Outcome.not_finite
    assert not estimate.outcome


def test_backprop_draws_dropout_from_the_key():
    model, batch = build("noisy"), a_batch()
    generator = torch.get_rng_state()
    losses = [Backprop()(model, sequence_losses, batch, Key(s)).loss.item() for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), generator)
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(accumulate=0), "accumulate=0"),
        (dict(truncate=-1), "truncate=-1"),
        (dict(truncate=3, checkpoint=True), "exclude each other"),
    ],
)
def test_backprop_names_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        Backprop(**arguments)


def test_what_needs_a_recurrent_model_says_so():
    with pytest.raises(UsageError, match=r"truncate=4 needs a model that carries a state"):
        Backprop(truncate=4)(build("foreign"), sequence_losses, a_batch(), KEY)
    with pytest.raises(UsageError, match="accumulate=9 cannot split a batch of 6"):
        Backprop(accumulate=9)(build("gru"), sequence_losses, a_batch(), KEY)


# ---- CD-RGE as an optimizer


def test_the_facade_is_the_estimator_and_a_step():
    model, batch = build("lstm"), a_batch()
    other = copy.deepcopy(model)
    optimizer = CDRGE(model.named_parameters(), lr=0.05, probes=7, seed=3)
    for step in range(3):
        loss = optimizer.step(lambda: sequence_losses(model, batch).mean())
        estimate = CentralDifference(7, 0.05, evaluate="in_place")(other, sequence_losses, batch, Key(3).at(step))
        apply(estimate.gradient, torch.optim.SGD(other.parameters(), lr=0.05), "fused")
        assert loss.item() == pytest.approx(estimate.loss.item(), rel=1e-6)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_tied_step_is_the_tied_identity():
    """With ε = η the step is −(1/N) Σ (L⁺ − L⁻)/2 z: ε appears only in where the losses are taken."""
    model = nn.Linear(3, 1, bias=False)
    start, x, losses = model.weight.detach().clone(), torch.tensor([[1.0, -2.0, 0.5]]), []

    def closure():
        losses.append(model(x).square().sum().item())
        return model(x).square().sum()

    CDRGE([("w", model.weight)], lr=0.01, probes=4).step(closure)
    from reroll.kernels.noise_axpy import noise

    losses = losses[-8:]  # before, the closure is repeated with the same weights
    expected = start.clone().double()
    for k in range(4):
        expected -= (losses[2 * k] - losses[2 * k + 1]) / 2 / 4 * noise(Key(0).at(0), (1, 3), k, "w").double()
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_groups_may_have_their_own_epsilon_and_rate():
    """On a linear loss the estimate of each group is its gradient whatever ε it was probed with."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = CDRGE([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.5, "epsilon": 0.02}], lr=1.0, probes=4000)
    optimizer.step(lambda: (3 * a - 2 * b).squeeze())
    # The other number's slope is noise in each estimate: 2 · ε_b/ε_a for a, and 3 · ε_a/ε_b for b, over √N.
    assert a.item() == pytest.approx(-0.1 * 3, abs=4 * 0.1 * 2 * 0.2 / 4000**0.5)
    assert b.item() == pytest.approx(0.5 * 2, abs=4 * 0.5 * 3 / 0.2 / 4000**0.5)


def test_an_epsilon_of_a_group_that_its_weights_cannot_show_is_refused():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = CDRGE([{"params": [a]}, {"params": [b], "epsilon": 1e-9}], lr=0.1, probes=2)
    with pytest.raises(UsageError, match=r"epsilon=1e-09 is below two units in the last place of 1\.0"):
        optimizer.step(lambda: (a * b).sum())


def test_epsilon_follows_the_current_rate_down_to_its_floor():
    model = nn.Linear(2, 1)
    optimizer = CDRGE(model.parameters(), lr=0.1, probes=2, epsilon_min=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)
    seen = []
    for _ in range(4):
        optimizer.step(lambda: (model.weight * torch.tensor([1.0, 3.0])).sum())
        seen.append(optimizer.last.stats["epsilon"])
        scheduler.step()
    assert seen == pytest.approx([0.1, 0.01, 1e-3, 1e-3])


def test_the_facade_resumes_from_its_state():
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    loss_fn = lambda m: m(x).square().mean()
    optimizer = CDRGE(model.named_parameters(), lr=0.05, probes=5, momentum=0.9)
    for _ in range(3):
        optimizer.step(lambda: loss_fn(model))
    other = copy.deepcopy(model)
    again = CDRGE(other.named_parameters(), lr=0.05, probes=5, momentum=0.9)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, again)):
        for _ in range(2):
            o.step(lambda m=m: loss_fn(m))
    assert torch.equal(model.weight, other.weight)


def test_the_facade_resumes_a_momentum_wider_than_the_weights():
    model, x = nn.Linear(4, 3, dtype=torch.bfloat16), torch.randn(8, 4, dtype=torch.bfloat16)
    optimizer = CDRGE(model.named_parameters(), lr=0.05, probes=5, momentum=0.9)
    loss_fn = lambda m: m(x).float().square().mean()
    for _ in range(3):
        optimizer.step(lambda: loss_fn(model))
    other = copy.deepcopy(model)
    again = CDRGE(other.named_parameters(), lr=0.05, probes=5, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), other.parameters()):
        saved, loaded = optimizer.state[p]["momentum_buffer"], again.state[q]["momentum_buffer"]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, saved)
        assert loaded.data_ptr() != saved.data_ptr()
        assert not torch.equal(saved.bfloat16().float(), saved)
    for m, o in ((model, optimizer), (other, again)):
        for _ in range(3):
            o.step(lambda m=m: loss_fn(m))
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], again.state[q]["momentum_buffer"])


def test_two_tensors_of_one_name_are_refused():
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    groups = [{"params": list(m.named_parameters()), "lr": 0.1} for m in (first, second)]
    with pytest.raises(UsageError, match='Two parameters are named "weight"'):
        CDRGE(groups, lr=0.1)
    optimizer = CDRGE(first.named_parameters(), lr=0.1)
    with pytest.raises(UsageError, match='Two parameters are named "weight"'):
        optimizer.add_param_group({"params": list(second.named_parameters())})
    assert len(optimizer.param_groups) == 1
    renamed = [(f"second.{name}", p) for name, p in second.named_parameters()]
    optimizer.add_param_group({"params": renamed})
    before = second.weight.detach().clone()
    optimizer.step(lambda: second(first.weight).square().mean())
    assert not torch.equal(second.weight, before)


def test_a_name_under_a_wrapper_is_the_name_of_another_tensor():
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model.module = nn.Linear(2, 2, bias=False)
    with pytest.raises(UsageError, match='Two parameters are named "weight"'):
        trainable(model)


def test_the_facade_trains_what_torch_would_train_and_nothing_else():
    model = build("foreign")
    frozen = model.frozen.clone()
    batch = a_batch()
    optimizer = CDRGE(model.parameters(), lr=0.02, probes=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(lambda: sequence_losses(model, batch).mean())
    assert torch.equal(model.frozen, frozen)
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if p.requires_grad)


def test_tiles_leave_the_weights_untouched_while_the_closure_runs():
    model, batch, seen = build("lstm"), a_batch(), []

    def closure():
        seen.append(model.head.bias.tolist())
        return sequence_losses(model, batch).mean()

    start = model.head.bias.tolist()
    CDRGE(model.named_parameters(), lr=0.02, probes=3, evaluate="tiles").step(closure)
    assert len(seen) == 2 + 6 + 4  # repeated in place before; a probe of its own in both ways afterwards
    # Asked inside the closure, a weight is what this branch perturbs it to …
    assert len({tuple(s) for s in seen[2:8]}) == 6
    # … while the memory of the weight was changed by the update alone.
    assert model.head.bias.tolist() != start


def test_the_facade_names_its_mistakes():
    model = nn.Linear(2, 1)
    optimizer = CDRGE(model.parameters(), lr=0.1, probes=2)
    with pytest.raises(UsageError, match=r"loss = optimizer.step\(lambda"):
        optimizer.step()

    def with_backward():
        loss = model(torch.ones(1, 2)).sum()
        loss.backward()
        return loss

    with pytest.raises(UsageError, match=r"does not call backward"):
        optimizer.step(with_backward)
    before = model.weight.detach().clone()
    with pytest.raises(RunError, match="Lower epsilon"):
        optimizer.step(lambda: model.weight.sum() * float("nan"))
    assert torch.equal(model.weight, before)
    with pytest.raises(UsageError, match="params is empty"):
        CDRGE([], lr=0.1)
    with pytest.raises(UsageError, match="lr=-1 must lie in"):
        CDRGE(model.parameters(), lr=-1)
    for probes in (0, 2.5, True):
        with pytest.raises(UsageError, match=f"probes={probes}"):
            CDRGE(model.parameters(), lr=0.1, probes=probes)
    for name in ("lr", "momentum", "weight_decay", "epsilon"):
        with pytest.raises(UsageError, match=f"{name}='a' must be a number"):
            CDRGE(model.parameters(), **{"lr": 0.1, name: "a"})
    with pytest.raises(UsageError, match="nothing to train"):
        CDRGE([torch.zeros(2)], lr=0.1)
    with pytest.raises(UsageError, match="epsilon_min=None must be a number"):
        CDRGE(model.parameters(), lr=0.1, epsilon_min=None)
    with pytest.raises(UsageError, match="model=3 must be the torch.nn.Module"):
        CDRGE(model.parameters(), lr=0.1, model=3)


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"accumulate": 2}], ids=str)
def test_backpropagation_says_that_numpy_has_no_gradient(options):
    model, batch = build("lstm"), a_batch()
    with pytest.raises(UsageError, match=r"went through .*NumPy.*Use CentralDifference"):
        Backprop(**options)(model, lambda m, b: m.head.weight.sum().numpy(), batch, KEY)


@pytest.mark.parametrize("evaluate", ["auto", "tiles"])
def test_the_facade_moves_no_padding_row(evaluate):
    """Only the module says which row that is: without it such an embedding is refused, unless its weight is tied."""
    ids = torch.tensor([[0, 1, 2], [2, 2, 5]])
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 6, bias=False))
    before = copy.deepcopy(model.state_dict())
    step = lambda **options: CDRGE(model.named_parameters(), 0.05, 4, evaluate=evaluate, **options).step(
        lambda: model(ids).square().mean()
    )
    with pytest.raises(UsageError, match=r"row 2 of 0.weight, its padding_idx; pass CDRGE\(model=") as error:
        step()
    assert "\n" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    step(model=model)
    moved = (model[0].weight != before["0.weight"]).any(1)
    assert moved.tolist() == [True, True, False, True, True, True]
    model[1].weight = model[0].weight
    step()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_the_facade_falls_back_from_what_nobody_asked_for():
    """Nothing intercepts the operations of a ScriptModule, so that in bf16 too it is evaluated in place."""
    x, coefficients = torch.randn(5, 3).bfloat16(), []
    for script in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
        model = torch.jit.script(model) if script else model
        evaluate = "auto" if script else "in_place"
        optimizer = CDRGE(model.named_parameters(), 0.05, 4, model=model, evaluate=evaluate)
        optimizer.step(lambda model=model: model(x).float().square().mean())
        assert optimizer.last.stats["evaluate"] == "in_place"
        coefficients.append(optimizer.last.gradient.coefficients)
    torch.testing.assert_close(*coefficients, rtol=0.1, atol=0.05)


# ---- one step


UNBOUNDED = {
    "infinite": (Backprop(), lambda m, x: m["b"].sqrt().sum() + m["a"].sum()),
    "nan": (Backprop(), lambda m, x: (0 * m["b"].sqrt()).sum() + m["a"].sum()),
    # Losses in fp64, whose differences no coefficient in fp32 can hold, or only ones whose sum it cannot.
    "coefficients": (CentralDifference(4, 1e-2), lambda m, x: 1e300 * m["a"].double().sum()),
    "sum": (CentralDifference(4, 1e-2), lambda m, x: 3e38 * m["a"].double().sum()),
}


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("case", UNBOUNDED)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(name, case, clip):
    estimator, loss_fn = UNBOUNDED[case]
    model = nn.ParameterDict({"a": torch.ones(4, 40), "b": torch.zeros(3)})
    before, recorded = copy.deepcopy(model.state_dict()), []
    optimizer = build_optimizer(name, model, 1e-3)
    result = optim.step(
        model, loss_fn, estimator, optimizer, None, StepSettings(1e-3), KEY, clip=clip, record=recorded.append
    )
    assert result.outcome is Outcome.gradient_not_finite
    assert torch.isfinite(result.loss)
    assert not recorded
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("estimator", [Backprop(), CentralDifference(4, 1e-2)], ids=["backprop", "probes"])
@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.Adafactor])
def test_neither_weights_nor_moments_become_infinite_by_squares(rule, estimator):
    """(10²⁵)² overflows fp32; clipped first, or in fp64, it does not."""
    cases = {(None, torch.float32): 0, (1.0, torch.float32): 3, (None, torch.float64): 3}
    for (clip, dtype), taken in cases.items():
        model = nn.ParameterDict({"a": torch.ones(4, 3, dtype=dtype)})
        optimizer, before = rule(model.parameters(), lr=1e-3), model["a"].clone()
        steps = [
            optim.step(model, lambda m, x: 1e25 * m["a"].sum(), estimator, optimizer, None, None, KEY.at(i), clip=clip)
            for i in range(3)
        ]
        assert sum(bool(result.outcome) for result in steps) == taken
        moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        assert all(bool(t.isfinite().all()) for t in [model["a"], *moments])
        assert torch.equal(model["a"], before) is (taken == 0)


@pytest.mark.parametrize("name", ["dense", "seeded"])
def test_squares_count_up_to_the_largest_number_with_or_without_the_norm(name):
    """The bound by the largest entry decides at once; beyond it the norm does."""
    for size, finite in ((0.7e18, True), (1.1e18, True), (2.4e18, False)):  # 64 entries: ‖g‖ = 8 sizes, below 2⁶⁴
        w = torch.zeros(64)
        w.grad = torch.full((64,), size)
        seeded = Seeded.of(Key(0), torch.tensor([size]), "rademacher", {"w": w})
        gradient = seeded if name == "seeded" else Dense({"w": w})
        assert gradient.is_finite() is gradient.is_finite(gradient.norm()) is finite
        assert bool(torch.tensor(gradient.norm() ** 2).isfinite()) is finite


def test_a_gradient_is_finite_in_the_dtype_of_its_weights():
    key, coefficients = Key(0), torch.full((3,), 3e4)
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True)):
        gradient = Seeded.of(key, coefficients, "rademacher", {"w": torch.zeros(64, 64, dtype=dtype)})
        assert gradient.is_finite() is finite
        assert bool(gradient.tensor("w").to(dtype).isfinite().all()) is finite


def test_a_step_sets_rate_momentum_and_epsilon_and_records_before_it_moves():
    model, batch = build("lstm"), a_batch()
    matrix, rest = ([p for p in model.parameters() if (p.dim() > 1) is wide] for wide in (True, False))
    groups = [{"params": matrix, "lr_scale": 0.5}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9)
    start, seen = copy.deepcopy(model.state_dict()), []

    def record(result):
        seen.append(result)
        assert all(torch.equal(p, start[n]) for n, p in model.named_parameters())

    settings = StepSettings(0.1, momentum=0.8, epsilon=0.03)
    result = optim.step(
        model, sequence_losses, CentralDifference(3, 1.0), optimizer, batch, settings, KEY, record=record
    )
    assert seen == [result]
    assert result.norm is None
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(0.05, 0.8), (0.1, 0.8)]
    other = build("lstm")
    gradient = CentralDifference(3, 0.03)(other, sequence_losses, batch, KEY).gradient
    for name, p in other.named_parameters():
        expected = p - (0.05 if p.dim() > 1 else 0.1) * gradient.tensor(name)
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=1e-6, atol=1e-7)


def test_the_facade_resumes_with_the_seed_probes_and_noise_of_the_run():
    x = torch.randn(8, 4)
    straight, halves = nn.Linear(4, 2), nn.Linear(4, 2)
    halves.load_state_dict(straight.state_dict())

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: model(x).square().mean())

    options = dict(momentum=0.9, weight_decay=0.1)
    first = CDRGE(straight.named_parameters(), 0.05, 5, seed=3, noise="normal", epsilon_min=0.07, **options)
    run(straight, first, 5)
    second = CDRGE(halves.named_parameters(), 0.05, 5, seed=3, noise="normal", epsilon_min=0.07, **options)
    run(halves, second, 2)
    again = CDRGE(halves.named_parameters(), 1.0)
    again.load_state_dict(copy.deepcopy(second.state_dict()))
    for model, optimizer in (copy.deepcopy((halves, second)), pickle.loads(pickle.dumps((halves, second)))):
        run(model, optimizer, 3)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), straight.parameters()))
    run(halves, again, 3)
    assert all(torch.equal(p, q) for p, q in zip(halves.parameters(), straight.parameters()))


def test_the_facade_refuses_the_state_of_others():
    model = nn.Linear(4, 2)
    optimizer = CDRGE(model.named_parameters(), 0.05)
    with pytest.raises(UsageError, match="of another optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    with pytest.raises(UsageError, match=r"named 0\.0, 0\.1; these are weight, bias"):
        optimizer.load_state_dict(CDRGE(model.parameters(), 0.05).state_dict())


def test_a_parameter_frozen_after_construction_is_left_alone():
    model, x = nn.Linear(4, 2), torch.randn(8, 4)
    optimizer = CDRGE(model.named_parameters(), 0.05, 4, momentum=0.9)
    closure = lambda: model(x).square().mean()
    optimizer.step(closure)
    bias = model.bias.detach().clone()
    weight = model.weight.detach().clone()
    model.bias.requires_grad_(False)
    optimizer.step(closure)
    assert torch.equal(model.bias, bias)
    assert not torch.equal(model.weight, weight)
    model.weight.requires_grad_(False)
    with pytest.raises(UsageError, match="every parameter is frozen"):
        optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:The same weights and random numbers")
def test_buffers_of_the_model_of_a_closure_come_back_and_else_a_warning_names_them():
    x = torch.randn(8, 4)
    for change in (lambda: nn.BatchNorm1d(4), lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))):
        model = nn.Sequential(change(), nn.Linear(4, 1))
        before = copy.deepcopy(dict(model.named_buffers()))
        closure = lambda model=model: model(x).square().mean()
        optimizer = CDRGE(model.named_parameters(), 0.05, 3, model=model)
        optimizer.step(closure)
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
        optimizer = CDRGE(model.named_parameters(), 0.05, 3)
        with pytest.warns(UserWarning, match=r"changes (BatchNorm1d\.running_mean|_SpectralNorm\._u)"):
            optimizer.step(closure)
        optimizer.step(closure)  # said once


def test_the_facade_evaluates_in_another_dtype():
    model, x = nn.Linear(64, 1), torch.randn(8, 64)
    seen = set()
    closure = lambda: (seen.add(model(x).dtype), model(x).float().square().mean())[1]
    CDRGE(model.named_parameters(), 0.05, 3, dtype=torch.bfloat16, model=model).step(closure)
    assert seen == {torch.bfloat16}
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("evaluate", ["in_place", "tiles"])
def test_the_facade_under_autocast_is_itself_with_weights_rounded(evaluate):
    """Autocast keeps the weights it has cast: of the first branch for all, were they not dropped."""
    x, models = torch.randn(16, 32), [nn.Linear(32, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, autocast in zip(models, (True, False)):
        optimizer = CDRGE(model.named_parameters(), 0.1, 8, epsilon=0.25, evaluate=evaluate)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            optimizer.step(lambda model=model: model(x).float().square().mean())
        assert optimizer.last.stats["spread"] > 0
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=0.02, atol=0.02)


def test_an_epsilon_tied_to_a_falling_rate_stops_where_the_weights_cannot_show_it():
    model, x = nn.Linear(16, 4, dtype=torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    optimizer = CDRGE(model.named_parameters(), lr=0.1, probes=4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    used = []

    def run(count):
        for _ in range(count):
            optimizer.step(lambda: model(x).float().square().mean())
            used.append((optimizer.param_groups[0]["lr"], optimizer.last.stats["epsilon"]))
            scheduler.step()

    with pytest.warns(UserWarning, match="the smallest they can resolve"):
        run(11)
    assert used[0][0] == used[0][1]
    ulp = torch.finfo(torch.bfloat16).eps
    for rate, epsilon in used:
        typical = model.weight.detach().square().mean().sqrt().item()
        assert epsilon == rate or ulp * typical / 4 < epsilon < ulp * typical * 8
    fixed = CDRGE(model.named_parameters(), lr=0.1, probes=4, epsilon=1e-5)
    with pytest.raises(UsageError, match="epsilon=1e-05 is below two units in the last place"):
        fixed.step(lambda: model(x).float().square().mean())


class Output(dict):
    """What a Hugging Face model returns."""

    @property
    def loss(self):
        return self["loss"]


@pytest.mark.parametrize(
    "kind", [float, lambda t: t.numpy(), lambda t: np.float32(t), lambda t: Output(loss=t, logits=t), lambda t: t[None]]
)
def test_the_facade_takes_every_kind_of_loss(kind):
    x, models = torch.randn(8, 4, dtype=torch.float64), [nn.Linear(4, 1, dtype=torch.float64) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, of in zip(models, (kind, lambda t: t)):
        optimizer = CDRGE(model.named_parameters(), 0.1, 4, model=model)
        optimizer.step(lambda model=model, of=of: of(model(x).square().mean().detach()))
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-4, atol=1e-6)


def test_two_parameters_on_one_memory_are_refused():
    shared = torch.ones(3)
    pair = [(name, nn.Parameter(shared)) for name in ("a", "b")]
    with pytest.raises(UsageError, match='"a" and "b" are two parameters that share memory'):
        CDRGE(pair, 0.1).step(lambda: (pair[0][1] * pair[1][1]).sum())


def test_a_rule_and_an_optimizer_are_a_row_each(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    monkeypatch.setitem(RULES, "toy", lambda groups, lr: torch.optim.Rprop(groups, lr))
    monkeypatch.setitem(OPTIMIZERS, "mixed", dict.fromkeys(ROLES, "sgd") | {"matrix": "toy"})
    optimizer = build_optimizer("mixed", model, 0.01)
    assert {rule: type(o).__name__ for rule, o in optimizer.optimizers.items()} == {"sgd": "SGD", "toy": "Rprop"}
    assert [g["param_names"] for g in optimizer.optimizers["toy"].param_groups] == [["0.weight"]]

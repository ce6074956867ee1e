"""Central differences: the theory they obey, and the ways of computing them that must agree."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from reroll.data.batch import START
from reroll.data.task import sequence_losses
from reroll.errors import UsageError
from reroll.grad import Backprop, CentralDifference, Seeded
from reroll.grad.base import trainable
from reroll.grad.evaluate.base import ProbeContext
from reroll.grad.evaluate.in_place import InPlace, snap_to_grid
from reroll.grad.evaluate.tiles import Perturbed, Tiles
from reroll.grad.probes import coefficients, expected_relative_error
from reroll.grad.units import Unit
from reroll.kernels import dispatch
from reroll.kernels.noise_axpy import Stream, noise, noise_axpy, noise_of
from reroll.keys import Key
from reroll.optim import CDRGE, apply
from reroll.outcome import Outcome
from tests.models import BUILDERS, a_batch, build

KEY = Key(3).at(7)
MODES = ["in_place", "tiles", "batched"]
UNMAPPED = {"noisy": "batch statistics cannot be written under vmap", "torch-lstm": "torch's LSTM has no rule for vmap"}


class Quadratic(nn.Module):
    """L(θ) = ½ θᵀ A θ + bᵀ θ over two tensors, in fp64: central differences are exact on it, whatever ε."""

    def __init__(self, size=30, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.matrix, self.slope = root @ root.T / size, torch.randn(size, generator=generator, dtype=torch.float64)
        self.first = nn.Parameter(torch.randn(size - 4, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(2, 2, generator=generator, dtype=torch.float64))

    def forward(self, batch=None):
        theta = torch.cat([self.first, self.second.flatten()])
        return 0.5 * theta @ self.matrix @ theta + self.slope @ theta


def quadratic_loss(model, batch):
    return model()


def true_gradient(model, loss_fn, batch):
    loss = loss_fn(model, batch)
    loss = loss.mean() if loss.dim() else loss
    named = trainable(model)
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True)))


def dense(gradient):
    return {name: gradient.tensor(name) for name in gradient.parameters}


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse"])
def test_on_a_quadratic_a_coefficient_is_the_slope_along_its_probe(epsilon, kind):
    model = Quadratic()
    g = true_gradient(model, quadratic_loss, None)
    estimate = CentralDifference(9, epsilon, kind)(model, quadratic_loss, None, KEY)
    for k, c in enumerate(estimate.gradient.coefficients.tolist()):
        slope = sum((g[n] * noise(KEY, p.shape, k, n, kind=kind)).sum().item() for n, p in trainable(model).items())
        assert c == pytest.approx(slope / 9, rel=1e-6)


def test_the_mean_of_all_sign_vectors_is_the_gradient():
    """Σ over all 2^P signs of (gᵀz) z / 2^P = g, so probes that happen to cover all signs give g exactly."""
    model = nn.Linear(3, 1, bias=False).double()
    loss_fn = lambda m, x: (m.weight.square().sum() + m.weight @ x).squeeze()
    x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    g = true_gradient(model, loss_fn, x)["weight"]
    wanted, found = {}, CentralDifference(200, 0.1)(model, loss_fn, x, KEY).gradient
    for k in range(200):
        wanted.setdefault(tuple(noise(KEY, (1, 3), k, "weight").flatten().tolist()), k)
    assert len(wanted) == 8
    mean = sum(200 * found.coefficients[k] * noise(KEY, (1, 3), k, "weight") for k in wanted.values()).double() / 8
    torch.testing.assert_close(mean, g, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse", "sparse:0.25"])
def test_error_and_cosine_follow_the_theory(kind):
    model, probes, draws = Quadratic(), 40, 150
    g = torch.cat([t.flatten() for t in true_gradient(model, quadratic_loss, None).values()])
    errors, cosines, mean = [], [], torch.zeros_like(g)
    for step in range(draws):
        gradient = CentralDifference(probes, 0.1, kind)(model, quadratic_loss, None, Key(0).at(step)).gradient
        found = torch.cat([t.flatten() for t in dense(gradient).values()])
        errors.append(((found - g).square().sum() / g.square().sum()).item())
        cosines.append(nn.functional.cosine_similarity(found, g, 0).item())
        mean += found / draws
    expected = expected_relative_error(len(g), probes, kind)
    spread = torch.tensor(errors).std().item() / draws**0.5
    assert abs(sum(errors) / draws - expected) < 4 * spread + 0.02 * expected
    assert abs(sum(cosines) / draws - math.sqrt(probes / (probes + len(g) - 1))) < 0.03
    assert ((mean - g).norm() / g.norm()).item() < 3 * math.sqrt(expected / draws)


@pytest.mark.parametrize("name", BUILDERS)
def test_all_modes_give_the_same_losses(name):
    """in place == in place on a grid == tiles == pieces of tiles == replicas == batched, in fp64."""
    model, batch = build(name, torch.float64), a_batch()
    options = [dict(evaluate=mode) for mode in MODES]
    if name in UNMAPPED:
        options.pop()
    options += [dict(evaluate="tiles", threads=1, workers=2), dict(evaluate="in_place", difference="central")]
    found = [CentralDifference(6, 1e-2, chunk=2, **o)(model, sequence_losses, batch, KEY) for o in options]
    for estimate in found[1:]:
        torch.testing.assert_close(estimate.gradient.coefficients, found[0].gradient.coefficients, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(estimate.loss, found[0].loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["lstm-heads", "gru", "rnn", "foreign", "dnc", "torch-lstm", "stack"])
@pytest.mark.parametrize("budget", [100, 3_000, 40_000])
def test_weights_in_pieces_are_the_weights(name, budget):
    """With a budget of a few rows every product is cut, heads are cut, and the losses do not change."""
    model, batch = build(name, torch.float64), a_batch()
    probes = ProbeContext(trainable(model), sequence_losses, KEY, 0.05, model=model)
    unit = Unit(range(2, 4), batch)
    with torch.no_grad():
        with InPlace(probes) as evaluator:
            expected = evaluator.losses(unit).losses
        with Tiles(probes, budget) as evaluator:
            torch.testing.assert_close(evaluator.losses(unit).losses, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, budget", [("wide", 20_000), ("wide", 60_000), ("lstm-heads", 20_000), ("lstm-heads", 76_000)]
)
def test_what_is_held_of_many_layers_is_within_the_budget(name, budget):
    """Layers are cut, or one is kept and the others are cut; heads are cut, or one group comes after the other."""
    layers = [layer for _ in range(9) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers) if name == "wide" else build(name)
    batch = torch.randn(3, 64) if name == "wide" else a_batch()
    loss_fn = (lambda m, x: m(x).square().mean()) if name == "wide" else sequence_losses
    assert sum(p.numel() * 4 for p in model.parameters()) > budget
    probes = ProbeContext(trainable(model), loss_fn, KEY, 0.05, model=model)
    evaluator, held = Tiles(probes, budget), []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        fill = Perturbed._fill

        def noting(self, *args):
            made = fill(self, *args)
            held.append(sum(t.nbytes for t in (*self.scratch.whole.values(), self.scratch.tiles) if t is not None))
            return made

        patch.setattr(Perturbed, "_fill", noting)
        losses = evaluator.losses(Unit(range(3), batch)).losses
    assert budget // 4 < max(held) <= budget
    with torch.no_grad(), InPlace(probes) as other:
        torch.testing.assert_close(losses, other.losses(Unit(range(3), batch)).losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_wide_layers_in_pieces(mode):
    """A model above the budget of 8 MB, so that the public path cuts it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(3000, 600), nn.Linear(600, 1700), nn.Tanh(), nn.Linear(1700, 40))
    ids = torch.randint(3000, (4, 3))
    loss_fn = lambda m, x: m(x).square().mean()
    estimate = CentralDifference(2, 1e-2, evaluate=mode)(model, loss_fn, ids, KEY)
    reference = CentralDifference(2, 1e-2, evaluate="in_place")(model, loss_fn, ids, KEY)
    torch.testing.assert_close(estimate.gradient.coefficients, reference.gradient.coefficients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_a_step_leaves_no_trace(name, mode):
    if name in UNMAPPED and mode == "batched":
        pytest.skip(f"{UNMAPPED[name]}; the error says so (test_what_vmap_cannot_run_is_named)")
    model, batch = build(name), a_batch()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = {n: m.training for n, m in model.named_modules()}
    requires = {n: p.requires_grad for n, p in model.named_parameters()}
    generator = torch.get_rng_state()
    seen = []

    def loss_fn(model, batch):
        losses = sequence_losses(model, batch)
        seen.append((losses.requires_grad, torch.is_grad_enabled()))
        return losses

    estimate = CentralDifference(5, 1e-2, evaluate=mode)(model, loss_fn, batch, KEY)
    assert seen
    assert not any(requires_grad or enabled for requires_grad, enabled in seen)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert {n: m.training for n, m in model.named_modules()} == flags
    assert {n: p.requires_grad for n, p in model.named_parameters()} == requires
    assert torch.equal(torch.get_rng_state(), generator)
    assert "frozen" not in estimate.gradient.parameters


def test_both_signs_see_the_same_dropout():
    """With ε so small that ± differ by next to nothing, so do the losses, although dropout makes them random."""
    model, batch = build("noisy", torch.float64), a_batch(rows=32)
    losses = []

    def loss_fn(model, batch):
        loss = sequence_losses(model, batch).mean()
        losses.append(loss.item())
        return loss

    CentralDifference(4, 1e-9)(model, loss_fn, batch, KEY)
    assert max(losses) - min(losses) < 1e-6
    CentralDifference(1, 1e-9)(model, loss_fn, batch, Key(3).at(8))
    assert abs(losses[-1] - losses[0]) > 1e-3  # another step draws another mask


@pytest.mark.parametrize("name", UNMAPPED)
def test_what_vmap_cannot_run_is_named(name):
    model, batch = build(name), a_batch()
    with pytest.raises(UsageError, match='evaluate="batched" cannot .* Use evaluate="in_place"'):
        CentralDifference(2, 1e-2, evaluate="batched")(model, sequence_losses, batch, KEY)


@pytest.mark.parametrize("name", ["lstm", "lstm-heads", "gru"])
@pytest.mark.parametrize("mode", MODES)
def test_workers_do_not_change_a_bit(name, mode):
    model, batch = build(name), a_batch()
    results = [
        CentralDifference(7, 1e-2, evaluate=mode, chunk=2, threads=1, workers=workers)(
            model, sequence_losses, batch, KEY
        ).gradient.coefficients
        for workers in (1, 2, 3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", MODES)
def test_a_micro_batch_changes_nothing_but_memory(mode):
    model, batch = build("lstm", torch.float64), a_batch(rows=7)
    whole = CentralDifference(5, 1e-2, evaluate=mode)(model, sequence_losses, batch, KEY)
    parts = CentralDifference(5, 1e-2, evaluate=mode, micro_batch=3)(model, sequence_losses, batch, KEY)
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.gradient.coefficients, whole.gradient.coefficients, rtol=1e-5, atol=1e-7)
    assert parts.stats["forward_passes"] == 3 * whole.stats["forward_passes"]


@pytest.mark.parametrize("probes, rows", [(6, 6), (3, 6), (8, 6), (4, 7)])
@pytest.mark.parametrize("mode", MODES)
def test_split_gives_every_probe_its_own_sequences(probes, rows, mode):
    model, batch = build("lstm", torch.float64), a_batch(rows=rows)
    found = CentralDifference(probes, 1e-2, batch="split", evaluate=mode)(model, sequence_losses, batch, KEY)
    groups = min(probes, rows)
    for k, c in enumerate(found.gradient.coefficients.tolist()):
        g = next(g for g in range(groups) if probes * g // groups <= k < probes * (g + 1) // groups)
        part = batch.rows(rows * g // groups, rows * (g + 1) // groups)
        alone = CentralDifference(probes, 1e-2, evaluate=mode)(model, sequence_losses, part, KEY)
        assert c == pytest.approx(alone.gradient.coefficients[k].item(), rel=1e-5, abs=1e-8)


def test_split_with_one_sequence_each_needs_losses_per_sequence():
    model, batch = build("lstm"), a_batch(rows=4)
    scalar = lambda m, b: sequence_losses(m, b).mean()
    with pytest.raises(UsageError, match="Return one loss per sequence"):
        CentralDifference(4, 1e-2, batch="split")(model, scalar, batch, KEY)
    CentralDifference(2, 1e-2, batch="split")(model, scalar, batch, KEY)


def test_batches_of_any_kind_are_cut():
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(4, 3).double(), torch.randint(2, (4,))
    per_row = lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"], reduction="none")
    whole = CentralDifference(4, 1e-2)(model, per_row, {"x": x, "y": y}, KEY)
    parts = CentralDifference(4, 1e-2, micro_batch=1)(model, per_row, {"x": x, "y": y}, KEY)
    torch.testing.assert_close(whole.loss, parts.loss)
    with pytest.raises(UsageError, match="cannot be cut|no first axis"):
        CentralDifference(4, 1e-2, batch="split")(model, lambda m, b: m.weight.sum(), None, KEY)


@pytest.mark.parametrize("evaluate", MODES)
def test_one_sided_differences(evaluate):
    model, calls = Quadratic(), []

    def loss_fn(model, batch):
        calls.append(1)
        return model()

    g = true_gradient(model, loss_fn, None)
    estimate = CentralDifference(4, 1e-5, difference="one_sided", evaluate=evaluate)(model, loss_fn, None, KEY)
    assert estimate.stats["forward_passes"] == 5
    assert estimate.loss.item() == pytest.approx(model().item(), rel=1e-12)
    for k, c in enumerate(estimate.gradient.coefficients.tolist()):
        slope = sum((g[n] * noise(KEY, p.shape, k, n)).sum().item() for n, p in trainable(model).items())
        assert c == pytest.approx(slope / 4, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("evaluate", ["tiles", "batched"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_unperturbed_loss_is_that_of_the_dtype_and_the_parts_of_branches(evaluate, micro_batch):
    model, seen = nn.Linear(40, 30, bias=False), []
    x = torch.randn(7, 40).bfloat16()

    def loss_fn(m, b):
        y = m(b)
        seen.append((len(b), y.dtype))
        return y.double().square().mean(1)

    options = dict(evaluate=evaluate, micro_batch=micro_batch, dtype=torch.bfloat16, difference="one_sided", workers=1)
    estimate = CentralDifference(2, 0.1, **options)(model, loss_fn, x, KEY)
    rows = [7] if micro_batch is None else [3, 3, 1]
    assert seen[-len(rows) :] == [(count, torch.bfloat16) for count in rows]
    assert estimate.stats["forward_passes"] == 3 * len(rows)
    with torch.no_grad():
        low = loss_fn(copy.deepcopy(model).bfloat16(), x).mean().item()
    assert estimate.loss.item() == pytest.approx(low, rel=1e-6)


def test_the_unperturbed_model_is_evaluated_in_micro_batches():
    model, batch, seen = build("gru", torch.float64), replace(a_batch(rows=7), state=START), []

    def loss_fn(m, b):
        losses, state = sequence_losses(m, b)
        seen.append(len(losses))
        return losses, state

    options = dict(difference="one_sided", evaluate="in_place")
    whole = CentralDifference(2, 0.1, **options)(model, loss_fn, batch, KEY)
    seen.clear()
    parts = CentralDifference(2, 0.1, micro_batch=3, **options)(model, loss_fn, batch, KEY)
    assert seen == [3, 3, 3, 3, 1, 1, 3, 3, 1]
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.state, whole.state, rtol=1e-12, atol=1e-14)


def test_non_differentiable_losses_work():
    model, batch = build("lstm"), a_batch(rows=32, time=20)

    def errors(model, batch):
        return (model(batch.inputs).argmax(-1) != batch.targets).float().mean(1)

    estimate = CentralDifference(16, 0.3)(model, errors, batch, KEY)
    assert estimate.outcome is Outcome.ok
    assert estimate.gradient.coefficients.abs().max() > 0


# ---- probes that fail


def test_lost_probes_are_counted_and_the_mean_is_over_the_others():
    model = Quadratic()
    calls = []

    def loss_fn(model, batch):
        calls.append(1)  # twice to see that it can be repeated
        return model() + (math.nan if len(calls) in (3, 6) else 0.0)  # probes 0 and 1, one side each

    whole = CentralDifference(8, 0.1, evaluate="in_place")(model, quadratic_loss, None, KEY)
    found = CentralDifference(8, 0.1, evaluate="in_place")(model, loss_fn, None, KEY)
    assert found.outcome is Outcome.some_probes_lost
    assert found.outcome
    assert found.stats["lost_probes"] == 2
    assert found.gradient.coefficients[:2].tolist() == [0, 0]
    torch.testing.assert_close(found.gradient.coefficients[2:], whole.gradient.coefficients[2:] * 8 / 6)
    assert math.isfinite(found.loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_all_probes_lost_is_an_outcome_that_says_what_to_change(bad):
    estimate = CentralDifference(4, 0.1)(Quadratic(), lambda m, b: m() * bad, None, KEY)
    assert not estimate.outcome
    assert "Lower epsilon" in estimate.outcome.value
    assert estimate.gradient.coefficients.abs().max() == 0


def test_an_interrupted_step_puts_the_weights_back():
    for restore in ("copy", "grid"):
        model, calls = nn.Linear(4, 1), []
        snap_to_grid(dict(model.named_parameters()), 0.1)
        before = model.weight.detach().clone()

        def loss_fn(model, batch, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return model(torch.ones(1, 4)).sum()

        with pytest.raises(KeyboardInterrupt):
            CentralDifference(4, 0.1, evaluate="in_place", restore=restore)(model, loss_fn, None, KEY)
        assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "loss_fn, message",
    [
        (lambda m, b: "3.0", "the loss is of type str"),
        (lambda m, b: m.weight, r"loss_fn returned shape \(1, 3\)"),
    ],
)
def test_losses_of_another_form_are_named(loss_fn, message):
    with pytest.raises(UsageError, match=message):
        CentralDifference(2, 0.1)(nn.Linear(3, 1), loss_fn, None, KEY)


# ---- shaping and sums


def test_shapings():
    losses = torch.tensor([[3.0, 1.0, 9.0, 2.0], [1.0, 2.0, 1.0, 2.0]], dtype=torch.float64)
    raw = coefficients(losses, 0.5).values.double() * 4
    assert raw.tolist() == [2, -1, 8, 0]
    z = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(coefficients(losses, 0.5, "zscore").values.double() * 4, z, rtol=1e-6, atol=1e-7)
    assert (coefficients(losses, 0.5, "sign").values * 4).tolist() == [1, -1, 1, 0]
    torch.testing.assert_close(
        coefficients(losses, 0.5, "rank").values * 4, torch.tensor([2 / 3 - 0.5, -0.5, 0.5, 1 / 3 - 0.5])
    )
    # The scale of the losses matters for "raw" only.
    for shaping in ("zscore", "rank", "sign"):
        a, b = (coefficients(losses * s, 0.5, shaping).values for s in (1.0, 100.0))
        torch.testing.assert_close(a, b)
    assert coefficients(torch.ones(2, 3), 0.1, "zscore").values.tolist() == [0, 0, 0]


def test_bf16_sums_lose_the_update_and_fp32_sums_do_not():
    """512 probes whose terms are each below half a unit of a bf16 weight: summed in bf16 none of them arrives."""
    probes, stream = 512, Stream(KEY, "w")
    alphas = (torch.rand(probes, generator=torch.Generator().manual_seed(0)) * 1.8e-3).tolist()
    start = torch.ones(40, 50, dtype=torch.bfloat16)
    terms = [a * noise(KEY, (40, 50), k, "w") for k, a in enumerate(alphas)]
    exact = 1 + sum(term.double() for term in terms)

    low = start.clone()
    for term in terms:
        low += term.bfloat16()
    assert torch.equal(low, start)

    high = start.clone()
    noise_axpy(high, stream, range(probes), alphas)
    assert (exact - 1).abs().mean() > 0.015
    assert torch.equal(high, exact.bfloat16())

    wide = torch.ones(40, 50)
    noise_axpy(wide, stream, range(probes), alphas)
    assert (wide.double() - exact).abs().max() < 1e-6


def test_sums_are_fp32_whatever_the_weights_are():
    """The same update reaches bf16 weights as fp32 weights, up to one rounding of the result."""
    torch.manual_seed(0)
    wide = nn.Linear(64, 64)
    narrow = nn.Linear(64, 64).bfloat16()
    narrow.load_state_dict({n: t.bfloat16() for n, t in wide.state_dict().items()})
    x = torch.randn(8, 64)
    loss_fn = lambda m, x: m(x.to(m.weight.dtype)).float().square().mean()
    estimate = CentralDifference(512, 0.05)(wide, loss_fn, x, KEY)
    step = estimate.gradient.tensor("weight")
    low = Seeded.of(KEY, estimate.gradient.coefficients, "rademacher", dict(narrow.named_parameters()))
    assert torch.equal(low.tensor("weight"), step)
    start = narrow.weight.detach().clone()
    low.add_to(narrow.weight.detach(), "weight", -1.0)
    assert torch.equal(narrow.weight.detach(), (start.float() - step).bfloat16())


# ---- precision


def test_an_epsilon_the_weights_cannot_show_is_refused():
    model = nn.Linear(8, 8)
    with pytest.raises(UsageError, match=r"epsilon=1e-08 is below two units in the last place of weight .* float32"):
        CentralDifference(2, 1e-8)(model, lambda m, b: m.weight.sum(), None, KEY)
    with pytest.raises(UsageError, match="in bfloat16"):
        CentralDifference(2, 1e-4, dtype=torch.bfloat16)(model, lambda m, b: m.weight.sum(), None, KEY)
    with pytest.raises(UsageError, match='use evaluate="tiles"'):
        CentralDifference(2, 1e-2, dtype=torch.bfloat16, evaluate="in_place")(
            model, lambda m, b: m.weight.sum(), None, KEY
        )


@pytest.mark.parametrize("name", ["lstm", "lstm-heads", "gru", "dnc", "foreign"])
@pytest.mark.parametrize("mode", ["tiles", "batched"])
def test_bf16_evaluation_follows_fp32(name, mode):
    if name in ("foreign", "dnc") and mode == "batched":
        pytest.skip("mixes its own fp32 numbers with bf16 products; tiles is the mode for such models")
    if name == "foreign":
        pytest.skip("adds fp32 buffers to bf16 products, which torch refuses")
    model, batch = build(name), a_batch(rows=16, time=12)
    high = CentralDifference(24, 0.05)(model, sequence_losses, batch, KEY)
    low = CentralDifference(24, 0.05, dtype=torch.bfloat16, evaluate=mode)(model, sequence_losses, batch, KEY)
    together = torch.stack([high.gradient.coefficients, low.gradient.coefficients])
    assert torch.corrcoef(together)[0, 1] > 0.98
    assert next(model.parameters()).dtype == torch.float32


def test_on_the_grid_adding_and_removing_is_exact():
    torch.manual_seed(1)
    p = torch.randn(1000) * torch.logspace(-6, 2, 1000)
    q = p.clone()
    epsilon = snap_to_grid({"q": q}, 0.0123)
    assert (p - q).abs().max() <= 2.0**-24 * 2 * p.abs().max()
    assert epsilon == pytest.approx(0.0123, rel=1e-3)
    for sign in (epsilon, -2 * epsilon, epsilon):
        q2 = q + sign
        assert torch.equal(q2 - sign, q)
    model, batch = build("lstm"), a_batch()
    named = trainable(model)
    snap_to_grid(named, 0.01)
    before = {n: p.clone() for n, p in named.items()}
    estimate = CentralDifference(6, 0.01, evaluate="in_place", restore="grid")(model, sequence_losses, batch, KEY)
    assert all(torch.equal(p, before[n]) for n, p in named.items())
    assert estimate.stats["drift"] == 0
    copy = CentralDifference(6, estimate.stats["epsilon"], evaluate="in_place")(model, sequence_losses, batch, KEY)
    assert torch.equal(estimate.gradient.coefficients, copy.gradient.coefficients)


def test_the_grid_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match='needs noise="rademacher"'):
        snap_to_grid({"p": torch.ones(2)}, 0.1, noise_of("normal"))
    with pytest.raises(UsageError, match="needs fp32 weights; p is torch.float64"):
        snap_to_grid({"p": torch.ones(2).double()}, 0.1)
    with pytest.raises(UsageError, match="below the grid of the weights"):
        snap_to_grid({"p": torch.full((2,), 2.0**20)}, 1e-3)


# ---- carried state


def test_state_is_carried_from_the_unperturbed_model():
    model, batch = build("gru", torch.float64), a_batch(time=8)
    first, second = batch.steps(0, 4), batch.steps(4, 8)
    start = replace(first, state=START)
    for estimator in (CentralDifference(3, 1e-2), Backprop()):
        after = estimator(model, sequence_losses, start, KEY).state
        _, expected = model.advance(first.inputs)
        torch.testing.assert_close(after[0], expected[0])
        seen = estimator(model, sequence_losses, replace(second, state=after), KEY).loss
        with torch.no_grad():
            losses, _ = sequence_losses(model, replace(second, state=expected))
        assert seen.item() == pytest.approx(losses.mean().item(), rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_states_per_branch_make_windows_one_long_sequence(mode):
    """NRES: with one probe per episode and a state per branch, the windows of a branch are one perturbed sequence."""
    model, batch = build("lstm", torch.float64), a_batch(time=9)
    estimator = CentralDifference(4, 1e-2, evaluate=mode, per_branch_state=True, chunk=2)
    state, total = START, torch.zeros(4, dtype=torch.float64)
    for begin in range(0, 9, 3):
        window = replace(batch.steps(begin, begin + 3), state=state)
        estimate = estimator(model, sequence_losses, window, KEY)
        state = estimate.state
        total += estimate.gradient.coefficients
    whole = CentralDifference(4, 1e-2, evaluate=mode)(model, sequence_losses, batch, KEY)
    torch.testing.assert_close(total.float(), whole.gradient.coefficients, rtol=1e-4, atol=1e-6)


# ---- what decides


def test_static_rules():
    small, batch = build("lstm"), a_batch()
    assert CentralDifference(8, 0.01).plan(small, trainable(small), batch).evaluate == "batched"
    foreign = build("foreign")
    plan = CentralDifference(8, 0.01).plan(foreign, trainable(foreign), batch)
    assert (plan.evaluate, plan.workers) == ("in_place", 1)
    assert CentralDifference(8, 0.01, dtype=torch.bfloat16).plan(foreign, trainable(foreign)).evaluate == "tiles"
    large = nn.Linear(1000, 1000)
    assert CentralDifference(8, 0.01).plan(large, trainable(large), batch).evaluate == "tiles"
    assert CentralDifference(8, 0.01).plan(None, trainable(small)).evaluate == "in_place"


def test_a_forced_implementation_holds_in_the_workers():
    model, batch = build("lstm-heads"), a_batch()
    with dispatch.use("lstm_scan", "reference"):
        CentralDifference(4, 0.01, evaluate="tiles", threads=1, workers=2)(model, sequence_losses, batch, KEY)
        assert dispatch.report()["lstm_scan"].name == "reference"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(probes=0, epsilon=0.1), "probes=0 must lie in"),
        (dict(probes=4, epsilon=0), "epsilon=0.0 must lie in"),
        (dict(probes=4, epsilon=0.1, noise="uniform"), 'noise="uniform" is not a kind'),
        (dict(probes=4, epsilon=0.1, density=0.5), 'density=0.5 is for noise="sparse"'),
        (dict(probes=4, epsilon=0.1, noise="sparse", density=0.3), "density must be"),
        (dict(probes=4, epsilon=0.1, batch="shard"), "batch='shard' must be shared, split"),
        (dict(probes=4, epsilon=0.1, shaping="softmax"), "shaping=.softmax. must be"),
        (dict(probes=4, epsilon=0.1, chunk=-1), "chunk=-1"),
        (
            dict(probes=4, epsilon=0.1, batch="split", difference="one_sided"),
            "exclude each other: a probe's loss",
        ),
        (
            dict(probes=4, epsilon=0.1, per_branch_state=True, micro_batch=2),
            "a state per branch and micro_batch=2 exclude each other",
        ),
        (
            dict(probes=4, epsilon=0.1, per_branch_state=True, difference="one_sided"),
            'a state per branch and difference="one_sided" exclude each other',
        ),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        CentralDifference(**arguments)


def test_bad_mode_is_named():
    with pytest.raises(UsageError, match="evaluate='vmap' must be auto"):
        CentralDifference(2, 0.1, evaluate="vmap")(nn.Linear(2, 1), lambda m, b: m.weight.sum(), None, KEY)


@pytest.mark.parametrize("number", [float, np.float32, lambda loss: round(1e6 * float(loss))])
def test_a_plain_number_is_a_loss(number):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(3, 1).double(), torch.randn(5, 3).double()
    estimates = [
        CentralDifference(8, 0.1, evaluate="in_place")(model, loss_fn, None, KEY)
        for loss_fn in (lambda m, b: m(x).square().mean(), lambda m, b: number(m(x).square().mean()))
    ]
    scale = 1e6 if number(2e-6) == 2 else 1
    tensor, plain = (estimate.gradient.tensor("weight") for estimate in estimates)
    torch.testing.assert_close(plain / scale, tensor, rtol=1e-5, atol=1e-5)


def test_mistakes_in_calls_are_named():
    model = torch.nn.Linear(3, 1)
    loss_fn = lambda m, b: m.weight.sum()
    estimate = CentralDifference(4, 0.1)(model, loss_fn, None, KEY)
    said = f"Estimate(loss {float(estimate.loss):.6g}, outcome ok, Seeded of 2 tensors, 8 forward passes)"
    assert repr(estimate) == said
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call, message in (
        (lambda: CentralDifference(4, 0.1)(model, loss_fn, None, 0), "key=0 must be a Key"),
        (lambda: apply(estimate, optimizer), "pass estimate.gradient"),
        (lambda: estimate.gradient.tensor("wight"), 'no tensor "wight". Did you mean "weight"'),
        (lambda: CDRGE(model, lr=0.1), r"model.named_parameters\(\)"),
        (lambda: CDRGE(model.parameters(), lr=0.1, noise="gauss"), "gauss"),
        (lambda: CentralDifference(4, 0.1, evaluate="batchd"), "evaluate='batchd'"),
    ):
        with pytest.raises(UsageError, match=message):
            call()

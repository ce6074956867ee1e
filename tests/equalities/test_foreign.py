"""Modules and losses that read weights in ways of their own: evaluators give a plain loop's slopes, or refuse."""

import copy
import functools
import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from reroll.cells import LSTM
from reroll.data.synthetic import Copy
from reroll.errors import EpsilonTooSmall, UsageError
from reroll.grad import Backprop, CentralDifference
from reroll.grad.base import trainable
from reroll.grad.checks import floors
from reroll.grad.evaluate import plan, verify
from reroll.grad.evaluate.batched import attention
from reroll.grad.evaluate.identity import identity
from reroll.grad.evaluate.in_place import snap_to_grid
from reroll.grad.evaluate.snapshot import seed_of
from reroll.grad.probes import RULES, Rule, Slopes
from reroll.kernels.noise_axpy import NOISES, Noise, layout, noise
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import CDRGE
from reroll.outcome import Outcome

KEY, EPSILON, PROBES = Key(3).at(1), 1e-3, 3
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.tensor([[0, 1, 2], [2, 2, 5]])


def mlp(*between):
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2))


def mean_square(model, batch):
    return model(batch).square().mean()


class Stateful(nn.Module):
    """Keeps its last output, sets one buffer anew and edits another in place, all of which its output contains."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.kept = nn.Linear(3, 3), how, torch.zeros(3)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        y = self.layer(x) + self.kept + self.total
        if self.how == "attribute":
            self.kept = y.mean(0)
        elif self.how == "reassigned":
            self.total = self.total + y.mean(0)
        else:
            self.total.add_(y.detach().mean(0))
        return y


def closing_over(build):
    model = build().double()
    return model, lambda m, b: mean_square(model, b)


def patched():
    model = mlp().double()
    layer = model[0]
    layer.forward = lambda x: functional.linear(x, layer.weight, layer.bias).sin()
    return model, mean_square


def regularised():
    model = mlp().double()
    outer = list(model.parameters())
    return model, lambda m, b: mean_square(m, b) + sum(p.square().sum() for p in outer)


def encoder(wrap):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).double().eval()
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[0, 2:] = True
    inputs = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = nn.Sequential(model) if wrap else model
    loss = lambda m, b: (m[0] if wrap else m)(inputs, src_key_padding_mask=padding).square().mean()
    return model, loss


def noisy(draw):
    return mlp().double(), lambda m, b: (m(b) + draw(m(b))).square().mean()


def embedding(**options):
    return nn.Sequential(nn.Embedding(6, 4, **options), nn.Linear(4, 2)).double(), lambda m, b: mean_square(m, IDS)


CASES = {
    "plain": lambda: (mlp().double(), mean_square),
    "closure": lambda: closing_over(mlp),
    "closure over a GRU": lambda: (lambda g: (g, lambda m, b: g(b)[0].square().mean()))(nn.GRU(3, 4).double()),
    "closure over statistics": lambda: closing_over(lambda: mlp(nn.BatchNorm1d(4))),
    "patched forward": patched,
    "outer parameters": regularised,
    "script": lambda: (torch.jit.script(mlp().double()), mean_square),
    "script inside": lambda: (nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh()).double(), mean_square),
    "trace": lambda: (torch.jit.trace(mlp().double(), X), mean_square),
    "encoder": lambda: encoder(wrap=False),
    "encoder alone in a Sequential": lambda: encoder(wrap=True),
    "randn_like in the loss": lambda: noisy(torch.randn_like),
    "dropout in the loss": lambda: noisy(lambda y: functional.dropout(y, 0.5)),
    "dropout": lambda: (mlp(nn.Dropout(0.5)).double(), mean_square),
    "statistics": lambda: (mlp(nn.BatchNorm1d(4)).double(), mean_square),
    "spectral norm": lambda: (nn.Sequential(spectral_norm(nn.Linear(3, 4))).double(), mean_square),
    "kept output": lambda: (Stateful("attribute").double(), mean_square),
    "reassigned buffer": lambda: (Stateful("reassigned").double(), mean_square),
    "edited buffer": lambda: (Stateful("edited").double(), mean_square),
    "padding": lambda: embedding(padding_idx=2),
    "max_norm": lambda: embedding(max_norm=0.5),
    "item": lambda: (mlp().double(), lambda m, b: mean_square(m, b).item()),
    "numpy": lambda: (mlp().double(), lambda m, b: np.square(m(b).numpy()).mean()),
    "value-dependent if": lambda: (mlp().double(), lambda m, b: mean_square(m, b) * (2 if m(b).sum() > 0 else 3)),
    "data": lambda: (mlp().double(), lambda m, b: mean_square(m, b) + m[0].weight.data.square().sum()),
    "mapping": lambda: (mlp().double(), lambda m, b: {"loss": mean_square(m, b), "logits": m(b)}),
}  # fmt: skip


def by_hand(model, loss_fn, batch):
    """c_k in float64: weights overwritten by p ± ε z, the same random numbers and the same buffers for every branch."""
    named = trainable(model)
    start = {n: p.detach().clone() for n, p in named.items()}
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    kept = getattr(model, "kept", None)
    found = []
    with torch.no_grad(), torch.random.fork_rng():
        for k in range(PROBES):
            losses = []
            for side in (1, -1):
                for n, p in named.items():
                    z = noise(KEY, p.shape, k, n, dtype=torch.float64)
                    if (
                        isinstance(model, nn.Sequential)
                        and getattr(model[0], "padding_idx", None) is not None
                        and n[0] == "0"
                    ):
                        z[model[0].padding_idx] = 0
                    p.copy_(start[n] + side * EPSILON * z)
                torch.manual_seed(seed_of(KEY))
                loss = loss_fn(model, batch)
                losses.append(float(loss["loss"] if isinstance(loss, dict) else loss))
                for n, b in buffers.items():
                    owner = model.get_submodule(n.rpartition(".")[0])
                    setattr(owner, n.rpartition(".")[2], b.clone())
                if kept is not None:
                    model.kept = kept
            found.append((losses[0] - losses[1]) / (2 * EPSILON * PROBES))
        for n, p in named.items():
            p.copy_(start[n])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # what falls back, or differs nowhere, says so
def test_every_evaluator_gives_the_slopes_of_a_plain_loop_or_refuses(name):
    for mode in ("in_place", "tiles", "batched", "auto"):
        torch.manual_seed(0)
        model, loss_fn = CASES[name]()
        expected = by_hand(model, loss_fn, X)
        before = {n: t.clone() for n, t in model.state_dict().items()}
        generator = torch.get_rng_state()
        estimator, refusal = CentralDifference(PROBES, EPSILON, evaluate=mode), ""
        try:
            estimate = estimator(model, loss_fn, X, KEY)
        except UsageError as error:
            refusal = str(error)
        if refusal:
            assert mode in ("tiles", "batched")
            assert f'evaluate="{mode}" cannot ' in refusal
            assert "\n" not in refusal
        else:
            assert estimate.outcome is Outcome.ok
            torch.testing.assert_close(estimate.gradient.coefficients.double(), expected, rtol=1e-6, atol=1e-9)
            assert torch.equal(estimator(model, loss_fn, X, KEY).gradient.coefficients, estimate.gradient.coefficients)
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert not getattr(model, "kept", torch.zeros(3)).numpy().any()


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:The PyTorch API of nested tensors")
def test_a_way_that_would_be_wrong_is_said_once():
    model, loss_fn = encoder(wrap=False)
    estimator = CentralDifference(PROBES, EPSILON)
    with pytest.warns(UserWarning, match='evaluate="batched" would be wrong here.*"in_place" is used'):
        estimator(model, loss_fn, X, KEY)
    again = estimator(model, loss_fn, X, KEY)  # warnings are errors here
    assert again.stats["evaluate"] == "in_place"
    assert "batched cannot" in again.stats["reason"]


def test_where_a_way_raises_auto_takes_another_without_a_word():
    model, loss_fn = mlp().double(), lambda m, b: mean_square(m, b).item()
    estimate = CentralDifference(PROBES, EPSILON)(model, loss_fn, X, KEY)
    assert estimate.stats["evaluate"] == "in_place"
    assert "item" in estimate.stats["reason"]


@pytest.mark.parametrize("mode", ["in_place", "tiles", "batched"])
def test_losses_that_do_not_differ_are_an_outcome_and_a_warning(mode):
    other = mlp().double()
    with pytest.warns(UserWarning, match="exactly equal"):
        estimate = CentralDifference(2, EPSILON, evaluate=mode)(
            mlp().double(), lambda m, b: mean_square(other, b), X, KEY
        )
    assert estimate.outcome is Outcome.no_difference


@pytest.mark.parametrize("workers", [1, 2])
def test_autocast_reaches_workers_and_caches_no_weights(workers):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)), torch.randn(64, 16)
    loss_fn = lambda m, b: m(b).float().square().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        places, tiles = (
            CentralDifference(6, 0.02, evaluate=mode, threads=1, workers=workers)(model, loss_fn, x, KEY)
            for mode in ("in_place", "tiles")
        )
    full = CentralDifference(6, 0.02)(model, loss_fn, x, KEY)
    assert torch.equal(places.gradient.coefficients, tiles.gradient.coefficients)
    assert not torch.equal(places.gradient.coefficients, full.gradient.coefficients)
    torch.testing.assert_close(places.gradient.coefficients, full.gradient.coefficients, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("mode", ["batched", "tiles"])
def test_under_autocast_a_mode_is_judged_without_its_rounding(mode):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 10)), torch.randn(32, 3)
    loss = lambda m, b: mean_square(m, b).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = CentralDifference(8, 0.05, evaluate=mode)(model, loss, x, KEY)
    expected = CentralDifference(8, 0.05)(model, loss, x, KEY).gradient.coefficients
    assert found.stats["evaluate"] == mode
    torch.testing.assert_close(found.gradient.coefficients, expected, rtol=0.2, atol=0.02)


@pytest.mark.parametrize("mode", ["in_place", "tiles", "batched"])
@pytest.mark.parametrize("drawn", ["by a module", "by the loss"])
def test_two_threads_that_draw_do_not_meet(mode, drawn):
    models = [(mlp(nn.Dropout(0.5)) if drawn == "by a module" else mlp()).double() for _ in range(12)]
    loss = mean_square if drawn == "by a module" else lambda m, b: mean_square(m, b + torch.randn(5, 3))
    estimator = CentralDifference(8, EPSILON, evaluate=mode)

    def run(some):  # every model for the first time, when it is not known yet whether the loss draws
        return [estimator(model, loss, X, Key(0).at(k)).gradient.coefficients for k, model in enumerate(some)]

    alone = [run(copy.deepcopy(models[i::2])) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, (models[0::2], models[1::2])))
    assert all(torch.equal(a, b) for x, y in zip(alone, together) for a, b in zip(x, y))


def test_a_rescaled_embedding_comes_back_from_the_grid():
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Linear(4, 2))
    estimator = CentralDifference(4, EPSILON, evaluate="in_place", restore="grid")
    first, weight = estimator(model, lambda m, b: mean_square(m, IDS), X, KEY), model[0].weight.detach().clone()
    again = estimator(model, lambda m, b: mean_square(m, IDS), X, KEY)
    assert torch.equal(model[0].weight, weight)
    assert torch.equal(first.gradient.coefficients, again.gradient.coefficients)


def test_where_another_way_was_planned_weights_come_back_without_a_grid():
    model = mlp()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def loss_fn(model, batch):
        loss = mean_square(model, batch)
        return loss if loss.item() >= 0 else -loss

    for step in range(2):  # the first time, and once it is known
        found = CentralDifference(8, 0.013, restore="grid")(model, loss_fn, X.float(), KEY.at(step))
        copied = CentralDifference(8, 0.013, evaluate="in_place")(model, loss_fn, X.float(), KEY.at(step))
        assert found.stats["evaluate"] == "in_place"
        assert torch.equal(found.gradient.coefficients, copied.gradient.coefficients)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_epsilon_below_the_grid_moves_nothing_and_names_one_that_is_not():
    p = torch.tensor([8 - 2**-20, 0.3, 1e-7])  # so close to a power of two that ε itself makes the grid coarser
    before = p.clone()
    with pytest.raises(EpsilonTooSmall) as error:
        snap_to_grid({"p": p}, 1e-8)
    assert torch.equal(p, before)
    assert snap_to_grid({"p": p}, error.value.least) == error.value.least


@pytest.mark.parametrize("width", [4, 40])
def test_padding_rows_stay(width):
    model = nn.Sequential(nn.Embedding(6, width, padding_idx=2), nn.Linear(width, 2))
    gradient = CentralDifference(4, 0.01)(model, lambda m, b: mean_square(m, IDS), X, KEY).gradient
    moved = gradient.tensor("0.weight").abs().sum(1) > 0
    assert moved.tolist() == [True, True, False, True, True, True]
    loss_fn = lambda m, b: model(IDS).square().mean()  # not a copy of it, so that operations are intercepted
    modes = [CentralDifference(4, 0.01, evaluate=mode)(model, loss_fn, X, KEY) for mode in ("in_place", "tiles")]
    torch.testing.assert_close(modes[0].gradient.coefficients, modes[1].gradient.coefficients, rtol=1e-3, atol=1e-5)


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor))


def test_weights_on_one_memory_are_refused_by_name():
    w = torch.randn(6, 4)
    probe = lambda **weights: CentralDifference(2, 0.1)(
        Holder(**weights), lambda m, b: sum(p.sum() for p in trainable(m).values()), None, KEY
    )  # fmt: skip
    with pytest.raises(UsageError, match='"a" and "b" are two parameters that share memory'):
        probe(a=w, b=w)
    with pytest.raises(UsageError, match="two parameters that share memory"):
        probe(a=w, b=w.view(-1)[4:9])
    with pytest.raises(UsageError, match="a is an expanded tensor"):
        probe(a=torch.ones(1).expand(3))
    assert probe(a=w[:3], b=w[3:], c=w.new_ones(2)).outcome is Outcome.ok
    assert probe(a=w[:, :2], b=w[:, 2:]).outcome is Outcome.ok
    assert probe(a=w[:, :1], b=w[:, 2:], c=w[1:4, 1:2]).outcome is Outcome.ok
    with pytest.raises(UsageError, match='"a" and "b" are two parameters that share memory'):
        probe(a=w[:, :3], b=w[:, 2:])
    with pytest.raises(UsageError, match='"a" and "c" are two parameters that share memory'):
        probe(a=w[:, :2], b=w[:, 2:], c=w[2:, 1:2])


IMPOSSIBLE = {
    "lazy": (lambda: nn.LazyLinear(3), {}, "weight has no shape yet .* evaluate the model once"),
    "meta": (lambda: nn.Linear(3, 2, device="meta"), {}, 'weight is on the device "meta"'),
    "float8": (lambda: nn.Linear(3, 2).to(torch.float8_e4m3fn), {}, "weight is torch.float8_e4m3fn.* bf16 or wider"),
    "script": (lambda: torch.jit.script(mlp()), {"dtype": torch.bfloat16}, "dtype=torch.bfloat16 .* ScriptModule"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:Lazy modules")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_perturbed_is_one_line_with_a_remedy(case):
    build, options, message = IMPOSSIBLE[case]
    with pytest.raises(UsageError, match=message) as error:
        CentralDifference(2, 0.1, **options)(build(), mean_square, X.float(), KEY)
    assert "\n" not in str(error.value)


def test_a_weight_of_zeros_has_no_last_place():
    model = nn.Linear(3, 3).bfloat16()
    for p in model.parameters():
        nn.init.zeros_(p)
    loss_fn = lambda m, b: m(b).float().sum()
    assert CentralDifference(2, 1e-4)(model, loss_fn, X.bfloat16(), KEY).outcome is Outcome.ok


def test_an_epsilon_tied_to_a_falling_rate_stays_where_the_weights_show_it():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3).bfloat16(), X.bfloat16()
    loss_fn = lambda: model(x).float().square().mean()
    optimizer = CDRGE(model.named_parameters(), lr=0.02, probes=4, seed=1)
    optimizer.step(loss_fn)
    assert optimizer.last.stats["epsilon"] == 0.02
    for lr in (1e-3, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        least = max(floors(dict(model.named_parameters())).values())
        with pytest.warns(UserWarning, match="two units in the last place"):
            optimizer.step(loss_fn)
        assert optimizer.last.stats["epsilon"] == least > lr


def test_of_groups_with_an_epsilon_of_their_own_only_a_tied_one_is_raised():
    a, b = (nn.Parameter(torch.full((3,), 0.3, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = CDRGE([{"params": [a], "epsilon": 0.25}, {"params": [b], "lr": 1e-4}], lr=0.01, probes=2)
    with pytest.warns(UserWarning, match="two units in the last place"):
        optimizer.step(lambda: (a * b).float().sum())
    scales = optimizer.last.gradient.scales
    assert optimizer.last.stats["epsilon"] == 0.25
    assert 0.25 / scales["1.0"] == pytest.approx(floors({"b": b})["b"])
    assert "0.0" not in scales


@pytest.mark.parametrize("mode", ["tiles", "batched", "auto"])
def test_floating_inputs_are_cast_to_the_dtype_of_the_evaluation(mode):
    model = copy.deepcopy(mlp()).float()
    low = CentralDifference(4, 0.1, dtype=torch.bfloat16, evaluate=mode)(model, mean_square, X.float(), KEY)
    high = CentralDifference(4, 0.1)(model, mean_square, X.float(), KEY)
    torch.testing.assert_close(low.gradient.coefficients, high.gradient.coefficients, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("value", [2.5, True])
def test_a_number_of_probes_that_is_none_is_named(value):
    with pytest.raises(UsageError, match=f"probes={value!r} must be an integer"):
        CentralDifference(value, 0.1)


@pytest.mark.parametrize(
    "loss, message", [(lambda y: y.detach().mean(), "no gradient"), (lambda y: y.mean() * 1j, "a complex tensor")]
)
def test_losses_that_backprop_cannot_use_are_named(loss, message):
    with pytest.raises(UsageError, match=message):
        Backprop()(nn.Linear(3, 1).double(), lambda m, b: loss(m(b)), X, KEY)


@pytest.mark.parametrize("mode", ["in_place", "tiles", "batched"])
@pytest.mark.parametrize("loss", [lambda y: y[:, 0] > 0, lambda y: (y[:, 0] > 0).int()])
def test_booleans_and_counts_per_sequence_are_losses(mode, loss):
    model = mlp().double()
    estimate = CentralDifference(8, 0.5, evaluate=mode)(model, lambda m, b: loss(m(b)), X, KEY)
    expected = CentralDifference(8, 0.5, evaluate=mode)(model, lambda m, b: loss(m(b)).double().mean(), X, KEY)
    assert torch.equal(estimate.gradient.coefficients, expected.gradient.coefficients)


class Waves(Noise):
    """A noise of another kind: cos of place and probe, made of torch operations alone."""

    name = "waves"
    fourth_moment = 1.5

    def add(self, p, out, stream, first_row, probes, alphas, sums):
        rows, columns = layout(p.shape)
        place = (torch.arange(rows).add(first_row).unsqueeze(1) * columns + torch.arange(columns)).view(p.shape)
        phase = sum(stream.name.encode())
        moved = sum(float(a) * 2**0.5 * torch.cos(place * 1.7 + phase + int(k)) for k, a in zip(probes, alphas))
        out.copy_(p + moved.to(p.dtype))


def curvature(losses, clean, epsilon):
    """L⁺ + L⁻ − 2 L_0 over ε²."""
    differences = losses[0] + losses[1] - 2 * clean
    return Slopes(differences, losses.mean(0), differences / epsilon**2)


def test_a_noise_and_a_rule_are_a_row_each(monkeypatch):
    monkeypatch.setitem(NOISES, "waves", Waves)
    monkeypatch.setitem(RULES, "curvature", Rule(curvature, (1, -1), clean=True))
    model = nn.Sequential(nn.Linear(3, 40), nn.Linear(40, 1)).double()
    for difference in ("central", "curvature"):
        found = [
            CentralDifference(3, 1e-2, "waves", evaluate=mode, difference=difference)(model, mean_square, X, KEY)
            for mode in ("in_place", "tiles", "batched")
        ]
        slopes = [estimate.gradient.coefficients * 3 for estimate in found]
        for other in slopes[1:]:
            torch.testing.assert_close(other, slopes[0], rtol=1e-6, atol=0)
        z = {n: noise(KEY, p.shape, 1, n, kind="waves", dtype=torch.float64) for n, p in model.named_parameters()}
        at = lambda t, z=z: mean_square(lambda x: torch.func.functional_call(
            model, {n: p + t * 1e-2 * z[n] for n, p in model.named_parameters()}, (x,)), X)  # fmt: skip
        expected = (at(1) - at(-1)) / 2e-2 if difference == "central" else (at(1) + at(-1) - 2 * at(0)) / 1e-4
        assert slopes[0][1].item() == pytest.approx(expected.item(), rel=1e-5)
    name, p = next(iter(model.named_parameters()))
    gradient = found[0].gradient
    expected = sum(c * noise(KEY, p.shape, k, name, kind="waves") for k, c in enumerate(gradient.coefficients))
    torch.testing.assert_close(gradient.tensor(name).float(), expected, rtol=1e-4, atol=1e-5)


def test_rounding_of_a_loss_near_zero_is_no_weight_out_of_reach(monkeypatch):
    """A model that has learned its data has losses that are small differences of large logits."""

    def loss_fn(model, batch):
        return functional.cross_entropy(model(batch).float(), torch.zeros(5, dtype=torch.int64))

    def run(size):
        model = mlp().float()
        with torch.no_grad():
            model[2].bias.copy_(torch.tensor([6.0, 0.0]))
        once = verify.Evaluation._once

        def rounded(self, probes, unit, plan):
            losses = once(self, probes, unit, plan)
            return losses + size if probes.epsilon and plan.evaluate == "in_place" else losses

        monkeypatch.setattr(verify.Evaluation, "_once", rounded)
        return CentralDifference(3, 0.1, evaluate="batched")(model, loss_fn, X.float(), KEY).outcome

    assert run(3e-7)
    with pytest.raises(UsageError, match="not everything that the loss reads"):
        run(3e-5)


def of(gru, batch):
    return gru(batch)[0].square().mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda net: functools.partial(lambda net, m, b: of(net or m, b), net),
        lambda net: lambda m, b, net=net: of(net or m, b),
        lambda net: (lambda nets: lambda m, b: of(nets[0] or m, b))([net]),
    ],
    ids=["partial", "default", "list"],
)
def test_a_loss_of_the_same_code_and_another_model_is_another_loss(loss):
    model, batch = nn.GRU(3, 4, batch_first=True).double(), torch.randn(5, 6, 3, dtype=torch.float64)
    expected = CentralDifference(4, EPSILON, evaluate="in_place")(model, loss(None), batch, KEY).gradient.coefficients
    for net in (None, model):
        found = CentralDifference(4, EPSILON, evaluate="tiles")(model, loss(net), batch, KEY).gradient.coefficients
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("criterion", [None, nn.MSELoss, nn.SmoothL1Loss])
def test_a_loss_made_anew_at_every_step_is_looked_at_ever_more_rarely(monkeypatch, criterion):
    looked, zeros = [], torch.zeros(5, 2, dtype=torch.float64)
    once = verify.Evaluation._once
    monkeypatch.setattr(verify.Evaluation, "_once", lambda *args: looked.append(step) or once(*args))
    model = mlp().double()
    for step in range(1, 10):
        weight, c = torch.tensor(1.0 + step), criterion and criterion()
        loss = lambda m, b, w=weight, c=c: w * (c(m(b), zeros) if c else mean_square(m, b))
        CentralDifference(4, EPSILON)(model, loss, X, KEY.at(step))
    assert looked == [1, 1, 1, 1, 2, 2, 4, 4, 8, 8]  # the first time, it is also repeated


def test_modules_that_may_differ_are_different_losses():
    def key(module):
        return identity(lambda m, b, module=module: module(m(b)))[0]

    bare, hooked = nn.MSELoss(), nn.MSELoss()
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    others = [bare, hooked, nn.MSELoss(reduction="sum"), nn.L1Loss(), nn.Linear(2, 1), nn.Sequential(nn.Tanh())]
    others += [nn.SmoothL1Loss(beta=0.0), nn.SmoothL1Loss(), nn.TripletMarginWithDistanceLoss(distance_function=min)]
    assert len({key(module) for module in others}) == len(others)
    assert key(bare) == key(nn.MSELoss())
    assert key(nn.SmoothL1Loss()) == key(nn.SmoothL1Loss(beta=0.5))
    assert key(others[4]) != key(copy.deepcopy(others[4]))


def slopes(model, loss, mode, seed=0, batch=X):
    return CentralDifference(4, EPSILON, evaluate=mode)(model, loss, batch, Key(seed).at(0)).gradient.coefficients


def test_a_term_whose_probe_of_signs_often_cancels_is_missed_in_no_seed():
    for seed in range(8):
        model = mlp(nn.LayerNorm(4)).double()
        outer = [model[1].weight]
        loss = lambda m, b, outer=outer: mean_square(m, b) + outer[0].sum()
        torch.testing.assert_close(slopes(model, loss, "tiles", seed), slopes(model, loss, "in_place", seed))


class Scaled(nn.Module):
    """Its scale must be positive."""

    def __init__(self):
        super().__init__()
        self.mean, self.scale = nn.Linear(3, 2), nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x):
        return torch.distributions.Normal(self.mean(x), self.scale)


class Tanh(nn.Module):
    """A recurrence, chaotic at weights far from where it begins."""

    def __init__(self, width=48):
        super().__init__()
        self.input, self.out = nn.Linear(3, width), nn.Linear(width, 1)
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        h = x.new_zeros(len(x), len(self.weight))
        for u in self.input(x).unbind(1):
            h = torch.tanh(u + h @ self.weight)
        return self.out(h)


@pytest.mark.parametrize("mode", ["tiles", "batched"])
@pytest.mark.parametrize("undefined", ["an error", "no number"])
def test_where_a_loss_is_undefined_far_away_nothing_is_concluded(mode, undefined):
    torch.manual_seed(0)
    model, y = Scaled().bfloat16(), torch.randn(5, 2)
    logs = lambda m, b: -m(b).log_prob(y) if undefined == "an error" else (m(b).loc - y).square() + m.scale.log()
    found = CentralDifference(4, 0.05, evaluate=mode)(model, lambda m, b: logs(m, b).mean(), X.bfloat16(), KEY)
    assert found.stats["evaluate"] == mode


def test_where_a_recurrence_is_chaotic_far_away_nothing_is_concluded():
    for seed in range(2):
        torch.manual_seed(seed)
        model, x = Tanh().bfloat16(), torch.randn(4, 100, 3).bfloat16()
        loss = lambda m, b: m(b).float().square().mean()
        assert CentralDifference(2, 0.02, evaluate="batched")(model, loss, x, KEY).stats["evaluate"] == "batched"


@pytest.mark.parametrize("mode", ["tiles", "batched"])
def test_what_bf16_hides_near_by_is_seen_far_away(mode):
    torch.manual_seed(1)
    model, x = mlp().bfloat16(), X.bfloat16()
    outer = model[2].bias.detach()  # on the memory of a weight, which in_place alone perturbs
    loss = lambda m, b: (m(b).float() * 1e-2 - 1).square().mean() + 0.2 * outer.float().square().sum()
    with pytest.raises(UsageError, match="not everything that the loss reads"):
        CentralDifference(4, 0.02, evaluate=mode)(model, loss, x, KEY)


@pytest.mark.parametrize("size", [1e-4, 3e-4, 1e-3])
def test_a_term_whose_effect_is_no_larger_than_rounding_may_be_is_not_missed(size):
    torch.manual_seed(1)
    model = mlp()
    outer = list(model.parameters())
    loss = lambda m, b: (m(b) * 1e-3 - 1).square().mean() + size * sum(p.square().sum() for p in outer)
    found, expected = (slopes(model, loss, mode, 3, X.float()) for mode in ("tiles", "in_place"))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("closed_over", [True, False])
def test_a_term_that_begins_later_is_seen_at_once_or_soon(closed_over):
    weight = 0.0
    model, weights = mlp().double(), [weight]
    outer = list(model.parameters())
    loss = (
        (lambda m, b: mean_square(m, b) + weight * sum(p.square().sum() for p in outer))
        if closed_over
        else (lambda m, b: mean_square(m, b) + weights[0] * sum(p.square().sum() for p in outer))
    )
    for _ in range(2):
        slopes(model, loss, "tiles")
    weight = weights[0] = 1.0
    found = [slopes(model, loss, "tiles") for _ in range(2)]
    expected = slopes(model, loss, "in_place")
    torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-9)
    assert torch.allclose(found[0], expected, rtol=1e-5) == closed_over


def test_tensors_that_do_not_fit_the_budget_are_compared_in_turn(monkeypatch):
    monkeypatch.setattr(plan, "TILE_BYTES", 64)

    def estimate(probes, times):
        model = mlp().double()
        alias = model[2].weight.detach()  # on the memory of the second largest, which in_place alone perturbs
        for _ in range(times):
            found = CentralDifference(probes, EPSILON, evaluate="tiles")
            found(model, lambda m, b: mean_square(m, b) + alias.sin().sum(), X, KEY)

    estimate(2, times=1)
    for probes, times in ((2, 2), (6, 1)):  # a look at a step takes no longer than the step
        with pytest.raises(UsageError, match="not everything that the loss reads"):
            estimate(probes, times)


def test_no_tensor_above_the_budget_is_copied_to_compare(monkeypatch):
    monkeypatch.setattr(plan, "TILE_BYTES", 1024)
    copied, once = [], verify.Evaluation._once

    def watched(self, probes, unit, plan):
        copied.append(sum(p.nbytes for p in probes.parameters.values()))
        return once(self, probes, unit, plan)

    monkeypatch.setattr(verify.Evaluation, "_once", watched)
    model = nn.Sequential(nn.Linear(3, 500), nn.Linear(500, 2))
    for step in range(4):
        CentralDifference(2, 0.01, evaluate="tiles")(model, mean_square, X.float(), KEY.at(step))
    assert copied
    assert max(copied) == model[1].bias.nbytes


@pytest.mark.parametrize("mode", ["tiles", "auto"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_no_memory_to_compare_says_nothing_about_a_mode(monkeypatch, mode, error):
    def full(self, units, look):
        raise error("full")

    monkeypatch.setattr(verify.Evaluation, "_agrees", full)
    with pytest.raises(error, match="full"):
        slopes(mlp().double(), mean_square, mode)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("mode", ["tiles", "batched"])
def test_compiled_code_that_reads_its_weights_by_itself_is_refused_whatever_its_size(mode):
    model = nn.Sequential(nn.Linear(3, 4), torch.jit.script(nn.Linear(4, 2)))
    with pytest.raises(UsageError, match=f'evaluate="{mode}" cannot follow this model: .*torch.jit.*Use "in_place"'):
        CentralDifference(4, EPSILON, evaluate=mode).plan(model, trainable(model))
    assert CentralDifference(4, EPSILON).plan(model, trainable(model)).evaluate == "in_place"


class Impure(nn.Module):
    """Its output depends on what no snapshot of torch's generators and of buffers holds."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(3, 3, dtype=torch.float64), how
        self.seen, self.tensor = {}, torch.zeros(3, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        y = self.layer(x)
        if self.how == "generator":
            return y + torch.randn(5, 3, generator=self.generator, dtype=torch.float64)
        if self.how in ("numpy", "random"):
            drawn = np.random.rand() if self.how == "numpy" else random.random()  # noqa: NPY002 (the global generator is the point)
            return y * (1 + drawn)
        kept = self.tensor if self.how == "tensor" else self.seen.get("y", 0)
        y = y + kept
        if self.how == "tensor":
            self.tensor.add_(y.detach().mean(0))
        else:
            self.seen["y"] = y.detach().mean(0)
        return y


@pytest.mark.parametrize("how", ["generator", "numpy", "random", "tensor", "dict"])
def test_a_loss_that_cannot_be_repeated_is_said_or_refused(how):
    for mode in ("tiles", "batched"):
        model = Impure(how)
        with pytest.raises(UsageError, match=f'evaluate="{mode}" cannot .* same weights and random numbers') as error:
            slopes(model, mean_square, mode)
        assert "\n" not in str(error.value)
        mean_square(model, X).item()  # nothing of vmap is left in it
    for mode in ("auto", "in_place"):
        model = Impure(how)
        with pytest.warns(UserWarning, match="numpy, random, a torch.Generator.*state kept between calls"):
            slopes(model, mean_square, mode)
        slopes(model, mean_square, mode)  # it is said once; warnings are errors here


@pytest.mark.parametrize("loss_dtype", [torch.bfloat16, torch.float32])
def test_noise_is_not_taken_for_the_rounding_of_bf16(loss_dtype):
    model, factors = mlp().bfloat16(), itertools.cycle([1.0, 1.05])
    loss = lambda m, b: mean_square(m, b).to(loss_dtype) * next(factors)
    with pytest.raises(UsageError, match="same weights and random numbers"):
        CentralDifference(4, 0.05, evaluate="tiles")(model, loss, X.bfloat16(), KEY)


def test_a_loss_that_cannot_be_repeated_in_another_dtype_is_said_or_refused():
    def run(mode):
        return CentralDifference(4, 0.1, evaluate=mode, dtype=torch.bfloat16)(model, loss, X.float(), KEY)

    factors = itertools.cycle([1.0, 1.5, 2.0])
    model, loss = mlp(), lambda m, b: mean_square(m, b) * next(factors)
    with pytest.raises(UsageError, match='same weights and random numbers.* Use evaluate="auto"[.]'):
        run("tiles")
    with pytest.warns(UserWarning, match="same weights and random numbers"):
        run("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_any_order_on_a_card_repeat_a_loss(dtype):
    loss, eps = torch.ones(1, dtype=dtype), torch.finfo(dtype).eps
    for device, nearly in (("cuda", True), ("cpu", False)):
        found = [verify.repeats(loss, loss * (1 + off), eps, device) for off in (0, max(1e-3, eps), 0.05)]
        assert found == [True, nearly, False]


def test_what_is_reroll_s_own_needs_no_second_look():
    class Mine(Copy):
        """Its loss may close over anything."""

    model = Recurrent(cell=LSTM(4, 8), vocab=Copy(3, 2).vocab)
    assert verify.is_ours(model, Copy(3, 2).loss)
    assert not verify.is_ours(model, Mine(3, 2).loss)
    assert not verify.is_ours(model, lambda model, batch: Copy(3, 2).loss(model, batch))
    assert not verify.is_ours(nn.Sequential(model, nn.TransformerEncoderLayer(4, 1)), Copy(3, 2).loss)


def hooked(layer, embed):
    layer.register_forward_hook(lambda module, inputs, output: output * (1 + embed.weight.square().sum()))


def replaced(layer, embed):
    layer.forward = lambda x: functional.linear(x, layer.weight * (1 + embed.weight.square().sum()), layer.bias)


@pytest.mark.parametrize("change", [hooked, replaced])
@pytest.mark.parametrize("mode", ["tiles", "batched", "auto"])
def test_reroll_s_own_model_is_verified_where_code_of_another_is_hooked_into_it(change, mode):
    task = Copy(length=3, batch=2)
    model, batch = Recurrent(LSTM(4, 8), vocab=task.vocab).double(), task.batch(0)
    estimator = CentralDifference(4, EPSILON, evaluate=mode)
    plain = estimator(model, task.loss, batch, KEY).gradient.coefficients  # and is trusted
    change(model.head, model.embed)
    expected = CentralDifference(4, EPSILON, evaluate="in_place")(model, task.loss, batch, KEY).gradient.coefficients
    assert not torch.allclose(expected, plain, rtol=0.01)
    found = estimator(model, task.loss, batch, KEY).gradient.coefficients
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


class Counting(nn.Module):
    """Each call is another function: the number of calls before is a factor."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.warm = nn.Linear(4, 2, dtype=torch.float64), 0, 1.0

    def forward(self, x):
        self.calls += 1
        self.warm *= 0.5
        return self.layer(x) * (self.calls + self.warm)


@pytest.mark.parametrize("evaluate", ["auto", "in_place", "tiles", "batched"])
def test_numbers_that_a_forward_pass_counts_up_are_the_same_for_every_probe(evaluate):
    model, x = Counting(), torch.randn(3, 4, dtype=torch.float64)
    loss = lambda m, b: m(b).square().mean()
    estimator = CentralDifference(probes=4, epsilon=0.01, evaluate=evaluate)
    gradient = estimator(model, loss, x, Key(0).at(0)).gradient
    assert (model.calls, model.warm) == (0, 1.0)
    fixed = lambda m, b: (m.layer(b) * 1.5).square().mean()
    expected = estimator(model, fixed, x, Key(0).at(0)).gradient
    for term, other in zip(gradient.terms, expected.terms):
        torch.testing.assert_close(term.coefficients, other.coefficients, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", [None, "causal", "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("new, all_", [(5, 5), (3, 7)])
def test_attention_by_its_formula_is_torchs(mask, scale, new, all_):
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (new, all_, all_))
    options = {"scale": scale, "is_causal": mask == "causal"}
    if mask in ("bool", "float"):
        seen = (torch.rand(new, all_) < 0.6).index_fill(1, torch.tensor([0]), True)
        options["attn_mask"] = seen if mask == "bool" else torch.randn(new, all_, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(attention(q, k, v, **options), expected)

"""The experiments on parallel evaluation, at tiny sizes: what they count is what is there to count."""

import math
import sys

import numpy as np
import pytest
import torch

from reroll.bench import claims
from reroll.bench.experiments import agreement, convergence, generator, lorenz, predictable, scaling, sweep, worms
from reroll.cells import GRU
from reroll.cells.dynamics import ARState, Lorenz96
from reroll.rollout import Newton, Sequential
from reroll.rollout.monitor import monitoring
from reroll.train.measure import Measurement

FOUND = {
    "elk-fig2": lambda: {"batch": 1, "memory_ratio": 2.0, "speed_against_loop": 3.0, "rows": [ROW, ROW | {"steps": 9}]},
    "elk-fig3": lambda: worms.measure(False, WORMS, updates=2),
    "elk-fig4": lambda: generator.measure(False, updates=1, steps=8, limit=9),
    "elk-fig5": lambda: agreement.measure(False, steps=20),
    "elk-fig7": lambda: sweep.measure(False, steps=(5, 7), updates=1, limits=(9, 9)),
    "elk-fig8": lambda: lorenz.measure(False, steps=5, count=1),
    "predictability": lambda: predictable.measure(False, size=4, steps=9, seeds=1, lengths=(5,)),
}
"""A small result of every experiment that has a figure."""
ROW = {"method": "loop", "size": 3, "steps": 7, "seconds": 0.5, "bytes": 8e6}
WORMS = {"layers": 1, "hidden": 3, "stride": 500, "batch": 3}


@pytest.fixture
def soon(monkeypatch):
    """Initial conditions of a short run: the published one takes seconds."""
    conditions = lorenz.initial_conditions
    monkeypatch.setattr(lorenz, "initial_conditions", lambda count: conditions(count, spin_up=500, between=100))


def test_a_watch_sees_every_iterate_and_the_last_one_is_the_result():
    torch.manual_seed(1)
    inputs, state = torch.zeros(2, 37, 1).double(), 8 + torch.randn(2, 5).double()
    inner, outer = [], []
    with monitoring(observe=lambda x: outer.append(x.clone())), monitoring(observe=lambda x: inner.append(x.clone())):
        found = Newton(window=None, max_iterations=60)(Lorenz96(), inputs, state)
    assert len(inner) == len(outer) == int(found.iterations.max()) > 3
    assert torch.equal(inner[-1].permute(2, 1, 0), found.states)
    assert not torch.equal(inner[0].permute(2, 1, 0), found.states)


def test_windows_show_their_iterates_one_after_the_other():
    shapes = []
    with monitoring(observe=lambda x: shapes.append(tuple(x.shape))):
        Newton(window=5)(Lorenz96(), torch.zeros(1, 8, 1).double(), torch.arange(5.0).double()[None])
    assert sorted(set(shapes)) == [(5, 3, 1), (5, 5, 1)]


def test_initial_conditions_are_states_of_one_run():
    found = lorenz.initial_conditions(3, spin_up=4, between=7)
    start = torch.tensor([[8.01, 8, 8, 8, 8]], dtype=torch.float64)
    run = Sequential()(Lorenz96(), torch.zeros(1, 18, 1).double(), start).states[0]
    torch.testing.assert_close(found, run[[3, 10, 17]], rtol=1e-13, atol=0)


def test_arrivals_count_from_one():
    assert [convergence.arrival(curve, 1e-3) for curve in ([1.0, 1e-4, 1e-9], [1.0, 1.0, 1e-2])] == [2, None]


def test_lorenz_arrives_by_every_convergent_method(soon):
    found = lorenz.measure(False, steps=60, count=2)
    assert len(found["methods"]) == 5
    assert all(1 < count <= 61 for count in found["methods"]["quasi-DEER"]["counts"])
    assert found["methods"]["ELK(300)"]["counts"] != found["methods"]["Scale(0.2)"]["counts"]
    for name in lorenz.METHODS:
        assert name in lorenz.report(found)


@pytest.mark.parametrize(
    "elk, scale, expected",
    [
        (152.0, 249.0, True),
        (106.0, 249.0, False),
        (213.0, 249.0, False),
        (200.0, 180.0, False),
        (152.0, math.inf, False),
    ],
)
def test_lorenz_holds_only_within_its_bounds(elk, scale, expected):
    assert lorenz.holds({"elk": elk, "scale": scale}) is expected


def test_sweep_tells_the_best_variance_and_where_none_arrives(soon, monkeypatch):
    monkeypatch.setattr(sweep, "LORENZ", (1e-3, 30.0))
    monkeypatch.setattr(sweep, "GENERATOR", (1e-6, 1e5))
    found = sweep.measure(False, steps=(40, 30), updates=5, limits=(30, 30))
    for swept in found["swept"].values():
        assert swept["counts"]["ELK"][0] is None
        assert swept["counts"]["ELK"][1] <= 30
    assert (found["best_elk"], found["best_elk_generator"]) == (30.0, 1e5)
    assert "–" in sweep.report(found)
    assert not sweep.holds(found)  # the best lies on the edge of these grids


def test_a_sweep_holds_where_the_best_lies_inside():
    grid = {"variances": [1.0, 300.0, 1e6], "best": {"ELK": 300.0, "quasi-ELK": 300.0}}
    found = {"best_elk": 300.0, "swept": {"Lorenz-96": grid, "generator": grid | {"best": {"ELK": 300.0}}}}
    assert sweep.holds(found)
    assert not sweep.holds(found | {"best_elk": 1e4})
    assert not sweep.holds(found | {"swept": {"Lorenz-96": grid, "generator": grid | {"best": {"ELK": 1.0}}}})


def test_parallel_trajectories_agree_with_the_sequential_one():
    found = agreement.measure(False, steps=129)
    assert agreement.holds(found)
    loose = [row["deviation"] for row in found["rows"] if row["dtype"] == "float64"]
    assert max(loose) < 1e-8
    assert found["deviation"] > max(loose)


def test_iterations_follow_the_exponent():
    found = predictable.measure(False, size=40, steps=60, seeds=1, lengths=(50,))
    first, last = found["networks"][0], found["networks"][-1]
    assert first["exponent"] < -0.3 < last["exponent"]
    assert first["newton"] < last["newton"] <= 61
    assert predictable.rank_correlation([1, 2, 3, 4], [4, 3, 2, 2]) == pytest.approx(-0.9486832980505138)


def test_training_by_the_library_kernel_is_training_of_the_cell():
    torch.manual_seed(3)
    cell = generator.ARGRU(3).double()
    with torch.no_grad():
        cell.bias_new.normal_()
        cell.bias.normal_()
    x = torch.randn(2, 9, 1).double()
    state = cell.init_state((2,))
    hidden = []
    for t in range(9):
        *_, h = cell.predict(ARState(x[:, t], state.h))
        state = ARState(x[:, t], h)
        hidden.append(h)
    torch.testing.assert_close(generator.hidden_states(cell, x), torch.stack(hidden, 1), rtol=1e-12, atol=1e-12)


def test_the_likelihood_is_that_of_the_generator():
    torch.manual_seed(4)
    cell = generator.ARGRU(3).double()
    series = torch.randn(2, 6, 1).double()
    state, total = cell.init_state((2,)), 0.0
    for t in range(5):
        mean, spread, h = cell.predict(ARState(series[:, t], state.h))
        total = total - torch.distributions.Normal(mean, spread).log_prob(series[:, t + 1]).mean() / 5
        state = ARState(series[:, t], h)
    torch.testing.assert_close(generator.loss(cell, series), total, rtol=1e-12, atol=1e-12)


def test_the_generator_learns_and_every_method_is_reported():
    found = generator.measure(False, updates=30, steps=80, limit=81)
    untrained = generator.measure(False, updates=1, steps=8, limit=9)
    assert found["best_loss"] < found["loss"] < untrained["loss"]
    assert found["methods"]["DEER"]["deviation"] < 1e-4
    for name in generator.METHODS:
        assert name in generator.report(found)


def test_training_is_the_same_by_every_rollout(tmp_path, monkeypatch):
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path))
    found = worms.measure(False, WORMS, updates=3)
    assert found["source"] == "generated"
    assert 0 < found["loss_deviation"] < 1e-5
    assert len(set(found["methods"]["DEER"]["losses"])) == 3
    assert found["methods"]["DEER"]["iterations"] >= 2
    assert found["methods"]["sequential"]["iterations"] <= 1
    assert not worms.holds(found | {"loss_deviation": 0.1})
    assert "quasi-DEER" in worms.report(found)


def test_prepared_series_are_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path))
    values = 7 + 2 * np.random.default_rng(0).normal(size=(5, 40, 2))
    np.savez(tmp_path / "eigenworms.npz", inputs=values, targets=np.array([0, 1, 2, 1, 0]))
    inputs, classes, source = worms.series(4)
    assert inputs.shape == (5, 10, 2)
    assert classes.tolist() == [0, 1, 2, 1, 0]
    assert "eigenworms" in source
    kept = values[:, [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]]
    assert np.corrcoef(inputs[..., 0].flatten(), kept[..., 0].flatten())[0, 1] == pytest.approx(1)
    torch.testing.assert_close(inputs.mean((0, 1)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs.std((0, 1)), torch.ones(2), atol=1e-5, rtol=0)


def test_memory_is_compared_at_the_largest_size(monkeypatch):
    def weigh(call, warmup):
        call()
        method, size, steps, _ = call.arguments
        floats = size if method == "quasi-DEER" else size**2
        return Measurement(1.0 if method == "loop" else 0.5, floats * steps, 0)

    monkeypatch.setattr(scaling, "weigh", weigh)
    found = scaling.measure(False, 2, ((3, 6), (5, 9)))
    assert len(found["rows"]) == 4 * 4
    assert (found["memory_ratio"], found["speed_against_loop"]) == (6, 2)
    assert scaling.holds(found)
    assert not scaling.holds(found | {"memory_ratio": 4.9})
    assert "quasi-DEER" in scaling.report(found)


@pytest.mark.parametrize("method", scaling.METHODS)
def test_what_is_weighed_is_one_trajectory(method):
    result = scaling.prepare(method, 3, 11, 2)()
    states = result[0] if method == "torch GRU" else result.states
    torch.manual_seed(0)
    cell, inputs = GRU(3, 3), torch.randn(2, 11, 3)
    torch.testing.assert_close(states, Sequential()(cell, inputs).states, rtol=1e-4, atol=1e-4)


def test_tables_and_figures_are_written(tmp_path, monkeypatch):
    found = agreement.measure(False, steps=20)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if the extra were not there
    lines = claims.write("elk-fig5", found, tmp_path)
    assert "quasi-DEER" in (tmp_path / "elk-fig5.txt").read_text()
    assert lines[1] == "no figure: matplotlib is not installed (pip install 'reroll[plot]')."
    assert not (tmp_path / "elk-fig5.png").exists()


@pytest.mark.parametrize(
    "name", ["elk-fig5", "elk-fig8", "elk-fig7", "predictability", "elk-fig4", "elk-fig2", "elk-fig3"]
)
def test_figures_are_drawn_where_matplotlib_is(soon, tmp_path, name):
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    found = FOUND[name]()
    claims.write(name, found, tmp_path)
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_claim_is_callable_and_named_once():
    for name, claim in claims.CLAIMS.items():
        assert claim.name == name
        assert callable(claim.experiment.measure)
        assert name in {row[0] for row in claims.rows()}


def test_a_claim_is_measured_kept_and_listed(tmp_path, monkeypatch):
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path))
    monkeypatch.setattr(agreement, "measure", lambda full, measure=agreement.measure: measure(full, steps=9))
    found = claims.reproduce("elk-fig5", full=True)
    assert found["full"] is True
    assert found["status"] == "holds"
    assert claims.measured()["elk-fig5"]["value"] == found["deviation"]
    assert sum("in full)\n" in claims.details(claim) for claim in claims.CLAIMS.values()) == 1

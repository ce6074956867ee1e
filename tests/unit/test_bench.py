"""The benchmarks at tiny sizes: what they time is what they say, and what they write has the names others rely on."""

import gc
import json
import math
from pathlib import Path

import pytest
import torch

from reroll.bench import cases as cases_module
from reroll.bench import claims, demo, estimator, grid, harness, rollouts, zeroth
from reroll.bench.cases import Case
from reroll.bench.experiments import memorise, memory
from reroll.cli.bench import BENCHES
from reroll.data.text import Text
from reroll.grad import CentralDifference
from reroll.grad.probes import expected_relative_error
from reroll.models import Interface
from reroll.optim import SGD
from reroll.passes import count_forward_passes
from reroll.recipes import RECIPES
from reroll.train.config import resolve
from reroll.train.measure import Measurement, measure
from reroll.train.records import read_metrics

SMALL = {512: 16, 240: 24, 66_000: 24}
"""Features of the models here, for those of the benchmark."""


@pytest.fixture
def small(monkeypatch):
    """The benchmark's models and sequences made small; what is weighed is called here, and its weight made up."""
    torch.set_num_threads(1)  # models this small only wait for a second thread
    of, weighed = Case.lstm, []

    def smaller(hidden, heads, rows, time, **options):
        return of(SMALL.get(hidden, hidden), min(heads, 12), 2, 3, **options)

    def in_process(function):
        function()
        weighed.append(function)
        return Measurement(0.1, 1000 * len(weighed), 1)

    monkeypatch.setattr(Case, "lstm", smaller)
    monkeypatch.setattr(zeroth, "measure", in_process)
    return weighed


def test_what_is_measured_in_turn_is_divided_round_by_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    durations = {"a": iter([50, 1, 2, 9]), "b": iter([70, 4, 4, 3])}  # the first of each warms up

    def take(name):
        clock[0] += next(durations[name])

    seconds = harness.in_turn({"a": lambda: take("a"), "b": lambda: take("b")}, rounds=3)
    assert seconds == {"a": [1, 2, 9], "b": [4, 4, 3]}
    assert harness.ratio(seconds, "b", "a") == 2
    assert harness.spread(seconds, "b", "a") == (1 / 3, 4)


def test_a_step_is_held_against_as_many_forward_passes(small, monkeypatch):
    """Both sides of every ratio are 2N passes over the same batch."""
    counted = []

    def counting(functions, rounds):
        for name, function in functions.items():
            with count_forward_passes() as passes:
                function()
            counted.append((name, passes.count))
        return {name: [1.0] for name in functions}

    monkeypatch.setattr(zeroth, "in_turn", counting)
    monkeypatch.setattr(zeroth, "PROBES", 8)
    monkeypatch.setattr(zeroth, "FULL", CentralDifference(8, 0.01))
    monkeypatch.setattr(zeroth, "HALF", CentralDifference(8, 0.01, dtype=torch.bfloat16))
    zeroth._dense(1)
    zeroth._tiny(1)
    assert [name for name, _ in counted] == ["forwards", "fp32", "bf16", "eager", "fastest", "step"]
    assert {count for _, count in counted} == {2 * 8}


def test_the_large_model_has_the_published_number_of_weights():
    assert zeroth._large_weights() == 112_606_100


def test_a_step_of_the_benchmark_changes_nothing_to_speak_of():
    case, probes = Case.lstm(16, 4, 2, 3), CentralDifference(8, 0.01)
    before = [p.clone() for p in case.model.parameters()]
    coefficients = case.step(probes).coefficients
    assert coefficients.shape == (8,)
    assert all(torch.allclose(p, b, atol=1e-9) for p, b in zip(case.model.parameters(), before))
    again = case.step(probes).coefficients
    assert torch.equal(again, Case.lstm(16, 4, 2, 3).step(probes).coefficients)


def test_steps_of_a_run_are_timed_beside_the_same_steps_by_themselves(small, monkeypatch):
    """The run is a whole one: it keeps its journal, metrics and checkpoints, and counts by its own clock."""
    runs = []

    def train(session, path, report):
        summary = real(session, path, report=report)
        runs.append((summary, sorted(p.name for p in path.iterdir()), len(list((path / "checkpoints").iterdir()))))
        return summary

    real = harness.train
    monkeypatch.setattr(harness, "train", train)
    with count_forward_passes() as passes:
        result = zeroth._trained(1)
    ((summary, files, checkpoints),) = runs
    assert (summary["state"], summary["steps"]) == ("done", zeroth.PAIRS + 1)
    assert {"config.toml", "journal", "metrics.jsonl", "status.json"} <= set(files)
    assert checkpoints
    assert summary["forward_passes"] == summary["steps"] * 2 * zeroth.PROBES
    assert passes.count >= 2 * summary["forward_passes"]
    assert result["train_range"][0] <= result["train"] <= result["train_range"][1]
    assert result["train_of_sums"] > 0


def test_zeroth_writes_the_names_others_rely_on(small, tmp_path, capsys):
    path = tmp_path / "deep" / "zeroth.json"
    path.parent.mkdir()
    found = zeroth.run(1, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(found))
    assert set(found["step_over_forwards"]) == {"dense", "tiny", "bf16"}
    assert set(found["noise"]) == {"perturb_speedup", "replay_speedup"}
    assert all(value > 0 for value in (*found["step_over_forwards"].values(), *found["noise"].values()))
    assert found["memory_overhead_bytes"] == 2000 - 1000  # a step's peak over inference's
    assert [call.arguments for call in small] == [("inference",), ("step",)]
    assert found["train_over_step"] == found["details"]["train"]["train"] > 0
    assert found["hardware"]
    assert found["commit"] is None or len(found["commit"]) >= 12
    assert found["details"]["memory"]["bar"] == int(0.01 * 4 * 112_606_100) + (8 << 20)
    assert found["details"]["dense"]["bf16_correlation"] > 0.99
    table = capsys.readouterr().out
    for bar in ("≤ 1.10", "≤ 0.62", "≥ 0.99", "≤ 1.02", "≤ 0.40", "≥ 8 ×", "≥ 80 ×"):
        assert bar in table


# The estimator


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse"])
def test_errors_are_those_of_theory(kind):
    torch.manual_seed(5)
    model, batch = small_problem()
    found = estimator._error(model, batch, probes=16, kind=kind, draws=60)
    weights = sum(p.numel() for p in model.parameters())
    assert found["error_theory"] == expected_relative_error(weights, 16, kind)
    # ĝ is unbiased: over draws of a few hundred weights its error is near what is expected.
    assert found["error"] == pytest.approx(found["error_theory"], rel=0.2)
    assert found["cosine"] == pytest.approx(found["cosine_theory"], rel=0.2)
    assert found["drift"] == 0


def small_problem():
    from reroll import Recurrent, cells
    from reroll.data.batch import Batch

    model = Recurrent(cell=cells.LSTM(4, 6), vocab=7)
    ids = torch.randint(7, (5, 7))
    return model, Batch(ids[:, :-1], ids[:, 1:], torch.ones(5, 6, dtype=torch.bool))


def test_the_window_of_epsilon():
    window = {w["epsilon"]: w for w in estimator._window(*small_problem())}
    assert math.isnan(window[1e-6]["slope"])
    assert window[1e-2]["slope"] == pytest.approx(1, abs=0.05)
    # Lost in rounding, halving ε does not halve what is measured.
    assert abs(window[1e-5]["slope"] - 1) > 0.05


def test_bench_estimator(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(estimator, "_problem", small_problem)
    found = cli("bench", "estimator", "--rounds", 2, "--json", "deep/estimator.json")
    assert (found.code, found.err) == (0, "")
    written = json.loads((tmp_path / "deep" / "estimator.json").read_text())
    assert [(e["noise"], e["probes"]) for e in written["errors"]] == [
        (kind, probes) for kind in ("rademacher", "normal", "sparse") for probes in (16, 96, 512)
    ]
    assert {"weights", "hardware", "commit", "window"} <= set(written)
    assert found.out.count("rademacher") == 3


def test_unknown_names_exit_with_2_and_the_nearest(cli):
    for command, name, nearest in (("bench", "zerot", "zeroth"), ("reproduce", "memorize", "memorise")):
        found = cli(command, name)
        assert found.code == 2
        assert f'"{name}" is unknown. Did you mean "{nearest}"?' in found.error
    assert {"zeroth", "estimator"} <= set(BENCHES)


# Memory


@pytest.mark.parametrize("method", memory.METHODS)
def test_a_step_that_is_weighed_is_a_step(method, monkeypatch):
    cases = []
    monkeypatch.setattr(Case, "lstm", lambda *args, real=Case.lstm: cases.append(real(*args)) or cases[-1])
    monkeypatch.setattr(cases_module, "SGD", lambda parameters, lr: SGD(parameters, lr=0.1))
    step = memory.prepare(method, time=4, hidden=8, rows=2)
    parameters = list(cases[0].model.parameters())
    before = [p.clone() for p in parameters]
    step()
    assert any(not torch.equal(p, b) for p, b in zip(parameters, before)) == (method != "inference")
    assert all(p.grad is None for p in parameters)


def test_what_is_prepared_is_prepared_once():
    made = []
    call = harness.Prepared(lambda name: made.append(name) or (lambda: made.append(1)), "it")
    call()
    call()
    assert made == ["it", 1, 1]


def test_the_reduction_is_of_the_overheads_at_the_long_sequence(monkeypatch):
    def weigh(call):
        method, time, heads = call.arguments
        return Measurement(0.0, {"BPTT": 100, "CD-RGE": 3}.get(method, 50) * time * heads, 1)

    monkeypatch.setattr(memory, "weigh", weigh)
    found = memory.measure(False)
    assert found["overhead_reduction"] == pytest.approx(0.97)
    assert set(found["reductions"]) == {f"T={t}, heads={h}" for t in (32, 1024) for h in (1, 8)}
    assert found["overhead_bytes"]["T=32, heads=8"]["BPTT"] == 25600
    report = memory.report(found)
    assert all(method in report for method in memory.METHODS)


@pytest.mark.slow
def test_probes_need_a_fraction_of_the_memory_of_backpropagation():
    """In fresh processes, at a size between the claim's two."""
    peak = {m: measure(harness.Prepared(memory.prepare, m, 256, 1, 128)).peak_bytes for m in ("BPTT", "CD-RGE")}
    assert peak["CD-RGE"] < 0.2 * peak["BPTT"]


# The claims


@pytest.fixture
def claim(monkeypatch, tmp_path):
    """The claim `memory`, measured at once, with a result that can be chosen."""
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(claims, "SHIPPED", tmp_path / "measured.json")
    result = {"overhead_reduction": 0.97, "reductions": {}, "overhead_bytes": {}}
    monkeypatch.setattr(memory, "measure", lambda full: {**result, "asked": full})
    return result


def test_the_list_shows_each_claim_with_its_status(cli, claim):
    for arguments in (("reproduce", "--list"), ("reproduce",)):
        found = cli(*arguments)
        assert (found.code, found.err) == (0, "")
        for row in claims.CLAIMS.values():
            assert [line for line in found.out.splitlines() if line.startswith(row.name) and line.endswith(row.says)]
            details = cli("reproduce", row.name, "--list").out
            assert all(words in details for words in (row.published, row.tolerance, "not measured yet"))
        assert found.out.count("not measured yet") == len(claims.CLAIMS)


def test_reproduce_keeps_what_it_measured(cli, claim, tmp_path):
    found = cli("reproduce", "memory", "--json", "deep/memory.json")
    assert (found.code, found.err) == (0, "")
    assert "overhead_reduction = 0.97, holds" in found.out
    written = json.loads((tmp_path / "deep" / "memory.json").read_text())
    assert written["overhead_reduction"] == 0.97
    assert written["status"] == "holds"
    assert {"hardware", "commit", "seconds", "published", "tolerance"} <= set(written)
    assert written["asked"] is written["full"] is False
    assert (tmp_path / "cache" / "reproduce" / "memory.txt").read_text().startswith(claims.CLAIMS["memory"].says)
    listed = cli("reproduce", "memory", "--list").out
    assert f"overhead_reduction = 0.97, holds ({written['commit']}, {written['hardware']})" in listed
    assert cli("reproduce", "--list").out.count("not measured yet") == len(claims.CLAIMS) - 1
    claim["overhead_reduction"] = 0.5
    failed = cli("reproduce", "memory", "--full", "--to", "tables")
    assert failed.code == 1
    assert (tmp_path / "tables" / "memory.txt").is_file()
    assert "does not hold" in failed.out
    assert "0.5, does not hold" in cli("reproduce", "--list").out


def test_what_cannot_be_written_is_refused_before_anything_is_measured(cli, claim, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(claims, "reproduce", lambda *_: pytest.fail("it was measured"))
    for flags in (("--json", "file/x"), ("--json", "."), ("--to", "file"), ("--to", "file/x")):
        found = cli("reproduce", "memory", *flags)
        assert found.code == 2
        assert f"{flags[0]} {flags[1]}" in found.error.replace("'", "")


def test_what_was_measured_may_be_damaged(cli, claim, tmp_path):
    (tmp_path / "cache").mkdir()
    for content in ("", "[]", '{"memory": 3}', '{"memory": {"value": "x"}}', "\x00", '{"memory": {"value": 0.5}}'):
        (tmp_path / "cache" / "reproduce.json").write_text(content)
        found = cli("reproduce", "--list")
        assert (found.code, found.err) == (0, "")
        assert found.out.count("not measured yet") == len(claims.CLAIMS)
        assert cli("reproduce", "memory").code == 0


def test_memorise_counts_the_steps_of_its_worst_seed(monkeypatch):
    shrunk = RECIPES["memorise"]().replace(
        model={"hidden": 16, "heads": 2, "embed": 8}, gradient={"probes": 16}, run={"steps": 3, "threads": 1}
    )
    monkeypatch.setitem(RECIPES, "memorise", lambda: shrunk)
    found = memorise.measure(False)
    assert [len(losses) for losses in found["losses"]] == [3, 3, 3]
    assert len({losses[0] for losses in found["losses"]}) == 3  # three seeds
    assert found["steps"] == math.inf
    assert not memorise.holds(found)
    assert "below 0.1 at steps [inf, inf, inf]" in memorise.report(found)


def test_the_recipes_of_claims_exist():
    for row in claims.CLAIMS.values():
        assert set(row.recipes) <= set(RECIPES)


# The demo


def test_the_demo_weighs_what_it_compares(monkeypatch, tmp_path):
    (tmp_path / "text").write_text("the cat sat on the mat. " * 80)
    task = Text(tmp_path / "text", "char", length=8, batch=2, max_vocab=20)
    config = resolve(RECIPES["demo"]().replace(model={"hidden": 8, "embed": 4})).model
    weighed = []

    def weigh(call):
        what, _, sizes, _, time = call.arguments
        assert sizes == Interface.of(task)
        weighed.append((what, time))
        if time == 8:
            call()
            call()
        return Measurement(0.0, {"inference": 10, "probes": 12, "batched": 30, "backprop": 9}[what] * time, 1)

    monkeypatch.setattr(demo, "measure", weigh)
    told = []
    found = demo.memory_over_inference(config, task, 2, 8, measured=lambda *case: told.append(case))
    assert len(weighed) == 6
    assert sorted(case[:2] for case in told) == sorted(weighed)
    assert ("batched", 8, 240) in told
    assert found == {"probes": [None, 2 * demo.LONG], "batched": [160, None], "backprop": [0, 0]}
    assert set(map(tuple, demo.memory_over_inference(config, task, 2, 8, 0.0).values())) == {(None, None)}
    summary = {"valid_bits": 2.0, "forward_passes": 5, "total_seconds": 1.0}
    rows = demo.rows_of(task, summary, summary | {"valid_bits": 1.0}, found)
    assert [row.bits for row in rows[:3]] == list(task.baselines("valid")[:3])
    assert [row.bits for row in rows[3:]] == [2.0, pytest.approx(math.nan, nan_ok=True), 1.0]
    assert rows[3].memory == found["batched"]


@pytest.mark.slow
@pytest.mark.parametrize("ended", [["stopped"], ["done", "stopped"]])
def test_a_demo_that_is_stopped_says_how_to_go_on_and_ends(monkeypatch, capsys, tmp_path, ended):
    from reroll.cli import demo as command

    states = iter(ended)
    monkeypatch.setattr(demo, "steps_in", lambda *arguments: 3)
    summary = {"reason": "Interrupted. To resume: reroll train …", "total_seconds": 1.0}
    monkeypatch.setattr("reroll.train.loop.train", lambda config, path, report: {"state": next(states), **summary})
    assert command.run("demo", ["--run-dir", str(tmp_path / "demo")]) == 1
    said = capsys.readouterr().out
    assert "To resume: reroll train" in said
    assert "Measuring" not in said
    assert ("3 steps took 1 seconds, not 45 seconds: a step took 0.33 seconds" in said) == (len(ended) == 2)
    assert next(states, None) is None


def test_the_verdict_is_what_was_measured():
    from reroll.cli.demo import _missing, _verdict

    def row(bits, seconds):
        return demo.Row("", bits, 5, seconds)

    memory = {"backprop": [1_000_000, None], "probes": [None, None], "batched": [3, None]}
    better = _verdict(row(2.0, 31.2), row(3.0, 30.9), 4.0, memory)[0]
    assert better.startswith("In the same 31 seconds CD-RGE reached 2.000 bits and backprop 3.000. CD-RGE is below")
    worse = _verdict(row(5.0, 2.0), row(3.0, 2.0), 4.0, memory)[0]
    assert worse.startswith("In the same 2 seconds backprop reached 3.000 bits and CD-RGE 5.000. CD-RGE is NOT below")
    apart = _verdict(row(5.0, 31.0), row(3.0, 45.0), 4.0, memory)[0]
    assert apart.startswith("CD-RGE reached 5.000 bits in 31 seconds, backprop 3.000 in 45 seconds.")
    rows = row(5.0, 2.0), row(3.0, 2.0)
    assert len(_verdict(*rows, 4.0, memory)) + 1 == len(_verdict(*rows, 4.0, {"backprop": [1, 2]}))
    assert _missing(memory, 32) == ["not measured, for want of time: backprop at T=2048, CD-RGE in place at T=2048"]
    assert _missing({"backprop": [1, 2], "probes": [None, 3], "batched": [4, None]}, 32) == []


def test_a_slow_machine_is_named_as_the_reason():
    from reroll.cli.demo import _slow

    readme = (Path(__file__).parents[2] / "README.md").read_text()
    steps, seconds = demo.USUAL
    assert f"{steps * 2 * 96:,}       {seconds:.0f} " in readme  # forward passes: two of each of 96 probes
    assert _slow(steps, seconds) == _slow(10, 1.5) == _slow(steps, 300.0) == []
    (line,) = _slow(38, 33.0)
    assert "38 steps" in line
    assert line.endswith(": reroll demo --seconds 360")  # 397 × 33 ÷ 38 = 345


def test_the_demo_plans_by_the_speed_of_several_steps(monkeypatch):
    clock, durations = [0.0], iter([9.0, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0])

    def step():
        clock[0] += next(durations)

    monkeypatch.setattr("reroll.bench.harness.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(demo, "prepare", lambda *arguments: step)
    monkeypatch.setattr(demo.Interface, "of", lambda task: None)
    assert demo.steps_in(20, *[None] * 4) == 20


def test_the_demo_ends_with_a_table_and_a_sample(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("reroll.cli.demo.MEASURING", 0.0)  # what memory takes is measured elsewhere
    found = cli("demo", "--seconds", 0.3, "--run-dir", "demo")
    assert (found.code, found.err) == (0, "")
    for words in ("unigram entropy", "bigram entropy", "gzip -9", "CD-RGE", "backprop", "memory*", "a sample of what"):
        assert words in found.out
    assert "not measured, for want of time: " in found.out
    assert "Timing a few steps" in found.out
    assert "Planned: " in found.out
    times = [list(read_metrics(tmp_path / name))[-1]["total_seconds"] for name in ("demo", "demo-backprop")]
    assert times[0] <= times[1]  # backprop ends with its first step after that time
    assert "NOT below the unigram entropy" in found.out  # after so little: said as it is
    assert "reroll sample demo" in found.out
    assert (tmp_path / "demo" / "journal").is_file()
    assert (tmp_path / "demo-backprop" / "config.toml").is_file()


# ---- rollouts


def test_ways_along_time_are_compared_at_a_small_size(monkeypatch, capsys, tmp_path):
    cpu = rollouts.cpu
    small = [cpu.Case(3, 2, 60, methods=tuple(cpu.METHODS)), cpu.Case(4, 2, 60, gradient=True)]
    monkeypatch.setattr(cpu, "cases", lambda steps: small)
    monkeypatch.setattr(cpu, "LEAST_SECONDS", 0.0)
    weighed = []
    monkeypatch.setattr(cpu, "measure", lambda call: weighed.append(call) or Measurement(0.1, 4 * 32 * 16 * 300, 1))
    found = rollouts.run(1, tmp_path / "out" / "rollouts.json", steps=300)
    assert json.loads((tmp_path / "out" / "rollouts.json").read_text())["rows"] == found["rows"]
    assert [row["cell"] for row in found["rows"]] == 2 * ["user", "GRUCell", "LSTMCell", "not writable"]
    for row, case in zip(found["rows"], [small[0]] * 4 + [small[1]] * 4):
        assert row["gradient"] == case.gradient
        assert set(case.methods) == set(row["seconds"]) - {"library"}
        assert 0 < max(row["deviation"].values()) < 1e-3
        assert row["deviation"]["loop"] == 0
        assert row["best"] in row["seconds"]
        assert set(row["fell_back"]) <= {"picard", "jacobi", "quasi_elk", "elk"}
        assert ("library" in row["seconds"]) == (row["cell"] != "not writable")
    assert set(found["memory_floats"].values()) == {1.0}
    assert len(weighed) == 2
    said = capsys.readouterr().out
    assert "auto ÷ best: at most" in said
    assert found["lengths"]["deviation"] < 1e-3
    assert "lengths 1 … 30, D = 32, B = 64, forward and backward: packed" in said
    assert "D = 3, B = 2, T = 60, forward: LSTMCell" in said
    assert "D = 4, B = 2, T = 60, forward and backward: user" in said


def test_the_cases_hold_the_sizes_that_bars_are_about():
    every = rollouts.cpu.cases(10_000)
    forward = {(case.size, case.batch) for case in every if not case.gradient and case.steps == 10_000}
    assert {(8, 16), (32, 4), (32, 16)} <= forward
    assert {case.methods for case in every if case.steps == 10_000} == {tuple(rollouts.cpu.METHODS)}
    assert any(case.gradient for case in every)


def test_the_points_of_a_card_are_told():
    found = grid.point(3, 300, True, 1, "cpu")
    assert max(found["deviation"].values()) < 1e-4
    table = {"rows": [], "steps": 300, "auto_over_best": {"largest": 1, "geometric_mean": 1}, "memory_floats": {}}
    told = rollouts.report({**table, "gpu": [found]})
    assert "GPU, D = 3, B = 16, T = 300, forward and backward: quasi_deer" in told


def test_the_grid_of_deer_has_the_published_times_beside_ours(capsys, tmp_path):
    found = grid.run(1, tmp_path / "grid.json", sizes=((1, 3), (300,)))
    assert json.loads((tmp_path / "grid.json").read_text())["rows"] == found["rows"]
    assert [(row["D"], row["gradient"]) for row in found["rows"]] == [(1, False), (3, False), (1, True), (3, True)]
    for row in found["rows"]:
        assert set(row["seconds"]) == {"loop", "library", "deer", "quasi_deer", "auto"}
        assert max(row["deviation"].values()) < 1e-4
    found["rows"][0]["T"] = 1000
    assert "9.96, 0.557" in grid.report(found)
    assert "milliseconds, batch 16" in capsys.readouterr().out


def test_what_the_grid_leaves_out_and_extrapolates(monkeypatch):
    monkeypatch.setattr(grid, "JACOBIANS", 1)
    monkeypatch.setattr(grid, "LOOPED", 100)
    monkeypatch.setattr(grid, "in_turn", lambda calls, rounds: {n: [call()[0].shape[1]] for n, call in calls.items()})
    row = grid.point(2, 400, False, 1, "cpu")
    # A second per step: the loop runs 100 of them, and its time is multiplied.
    assert row["seconds"] == dict.fromkeys(("library", "quasi_deer", "auto", "loop"), 400)
    assert "–" in grid.report({"rows": [row]})


def test_what_is_short_is_called_several_times(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])

    def take():
        calls.append(clock[0])
        clock[0] += 2

    assert harness.in_turn({"a": take}, rounds=2, least=5) == {"a": [2, 2]}
    assert len(calls) == 2 + 2 * 3


def test_nothing_is_collected_while_it_is_timed():
    seen = []
    harness.in_turn({"a": lambda: seen.append(gc.isenabled())}, rounds=2)
    assert seen == [False] * 3
    assert gc.isenabled()

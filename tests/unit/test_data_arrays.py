"""Series: what is predicted from what, in which units, and what is missing."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from reroll.data.arrays import Arrays
from reroll.data.series import Series, missing, moments
from reroll.data.windows import cut
from reroll.errors import UsageError

RANDOM = np.random.default_rng(0)


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def saved(path, array):
    np.save(path, array)
    return path


def every(task, split):
    """All windows of a split, in order; for training by many draws."""
    steps = task.batches(split) if split != "train" else 40
    return [task.batch(step, split) for step in range(steps)]


def raw(task, values):
    """Standardised inputs in the units of the file."""
    return values.double().numpy() * task.std[: task.inputs] + task.mean[: task.inputs]


def rows_of(task, split, inputs):
    """Which sequences of a file are in a split, by what they hold."""
    seen = set()
    for batch in every(task, split):
        for row in raw(task, batch.inputs):
            match = np.abs(inputs[:, : row.shape[0]] - row).max((1, 2))
            assert match.min() < 1e-3
            seen.add(int(match.argmin()))
    return seen


@pytest.mark.parametrize("shape", [(40, 12, 3), (40, 12, 1)])
def test_without_targets_the_next_value_is_predicted(tmp_path, shape):
    values = RANDOM.normal(5, 3, shape)
    task = Arrays(saved(tmp_path / "a.npy", values), batch=8)
    values = values.reshape(40, 12, -1)
    assert (task.inputs, task.outputs, task.vocab) == (values.shape[2], values.shape[2], None)
    assert (task.readout, task.length) == ("every", 11)
    for split in ("train", "valid"):
        for batch in every(task, split):
            assert batch.inputs.shape == batch.targets.shape == (len(batch), 11, values.shape[2])
            assert batch.inputs.dtype == torch.float32
            assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
            assert batch.mask.all()
            assert batch.present is None
    training, held_out = rows_of(task, "train", values), rows_of(task, "valid", values)
    assert training | held_out == set(range(40))
    assert not training & held_out
    assert len(held_out) == 4
    assert held_out != {36, 37, 38, 39}


def test_inputs_are_in_units_of_the_training_part(tmp_path):
    values = RANDOM.normal(5, 3, (50, 20, 2)) * [1, 100]
    task = Arrays(saved(tmp_path / "a.npy", values))
    training = values[sorted(rows_of(task, "train", values))].reshape(-1, 2)
    assert len(training) == 45 * 20
    assert task.mean == pytest.approx(training.mean(0))
    assert task.std == pytest.approx(training.std(0))
    assert task.standardise(training).std(0) == pytest.approx(1)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_moments_do_not_depend_on_the_blocks(monkeypatch, rows):
    monkeypatch.setattr("reroll.data.series.ROWS", rows)
    values = RANDOM.normal(1e6, 1e-2, (500, 3))
    values[:, 1] = 0.1
    values[3, 0], values[9, 2] = np.nan, np.inf
    used = RANDOM.random(500) < 0.7
    mean, std = moments(values, used)
    kept = np.ma.masked_invalid(values[used])
    assert mean == pytest.approx(kept.mean(0))
    assert std[[0, 2]] == pytest.approx(kept.std(0)[[0, 2]])
    assert std[1] == 1  # a constant feature is not divided by its rounding errors
    series = Series(values, np.array([4, 496]))
    with pytest.raises(UsageError, match="series 1, step 5, feature 2 is infinite"):
        missing("a.npy", series, None)
    assert missing("a.npy", series, np.arange(500) != 9) == 1
    assert missing("a.npy", series, ~np.isin(np.arange(500), (3, 9))) == 0


def test_a_constant_feature_becomes_zero(tmp_path):
    values = np.concatenate([np.full((20, 6, 1), 0.1), RANDOM.normal(size=(20, 6, 1))], 2)
    batch = Arrays(saved(tmp_path / "a.npy", values)).batch(0)
    assert batch.inputs[:, :, 0].abs().max() < 1e-6
    assert batch.inputs.isfinite().all()


def test_a_long_series_is_held_out_at_its_end(tmp_path):
    values = np.arange(1000.0)
    task = Arrays(saved(tmp_path / "a.npy", values), length=20, batch=16)
    training, held_out = (
        np.concatenate([raw(task, batch.targets)[batch.mask] for batch in every(task, split)]).ravel().round().tolist()
        for split in ("train", "valid")
    )
    # 999 pairs in 50 windows; the last 5 are held out, their last one has a step less.
    assert held_out == list(range(901, 1000))
    assert set(training) == set(range(1, 901))
    assert task.mean == pytest.approx(np.arange(900).mean())
    assert Arrays(tmp_path / "a.npy").length == 99
    reseeded = Arrays(tmp_path / "a.npy", length=20, batch=16, seed=5)
    assert torch.equal(reseeded.batch(0, "valid").inputs, task.batch(0, "valid").inputs)


def test_windows_are_cut_so_that_every_step_is_in_one():
    lengths = np.array([7, 1, 2, 10])
    for length in (1, 3, 5, 20):
        for shift in (0, 1):
            windows = cut(lengths, length, shift)
            steps = [
                place
                for begin, end in zip(windows.begin, windows.end)
                for place in range(begin, min(begin + length, end - shift))
            ]
            ends = np.cumsum(lengths)
            wanted = [place for begin, end in zip(ends - lengths, ends) for place in range(begin, end - shift)]
            assert steps == wanted


def test_batches_are_a_function_of_seed_and_step(tmp_path):
    path = saved(tmp_path / "a.npy", RANDOM.normal(size=(60, 9)))
    usual = Arrays(path).batch(3).inputs
    assert torch.equal(Arrays(path).batch(3).inputs, usual)
    assert not torch.equal(Arrays(path, seed=1).batch(3).inputs, usual)
    assert not torch.equal(Arrays(path).batch(4).inputs, usual)
    assert torch.equal(Arrays(path).batch(3, length=4).inputs, usual[:, :4])
    assert Arrays(path, seed=1).batch(0, "valid").inputs.equal(Arrays(path).batch(0, "valid").inputs)


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("kind", [np.int64, np.uint8, bool])
def test_one_class_for_a_sequence(tmp_path, readout, kind):
    inputs, classes = RANDOM.normal(size=(30, 7, 2)), (np.arange(30) % (2 if kind is bool else 5)).astype(kind)
    task = Arrays(save(tmp_path / "a.npz", x=inputs, y=classes), readout=readout, batch=6)
    assert (task.outputs, task.readout, task.length) == (classes.max() + 1, readout, 7)
    for split in ("train", "valid"):
        for batch in every(task, split)[:9]:
            assert batch.targets.shape == batch.mask.shape == (len(batch),)
            assert batch.targets.dtype == torch.int64
            assert batch.scored == len(batch)
            found = [int(np.abs(inputs - row).max((1, 2)).argmin()) for row in raw(task, batch.inputs)]
            assert batch.targets.tolist() == classes[found].tolist()
            logits = 1000.0 * torch.nn.functional.one_hot(batch.targets, task.outputs).float()
            assert task.score(lambda inputs, logits=logits: logits, batch).exact == len(batch)
            assert task.loss(lambda inputs, logits=logits: logits, batch).tolist() == [0.0] * len(batch)


@pytest.mark.parametrize("shape", [(30,), (30, 4), (30, 7)])
def test_values_for_a_sequence(tmp_path, shape):
    inputs, targets = RANDOM.normal(size=(30, 7, 2)), RANDOM.normal(size=shape)
    task = Arrays(save(tmp_path / "a.npz", inputs=inputs, targets=targets))
    batch = task.batch(0)
    assert task.outputs == batch.targets.shape[1] == (shape[1] if len(shape) > 1 else 1)
    found = [int(np.abs(inputs - row).max((1, 2)).argmin()) for row in raw(task, batch.inputs)]
    in_units = batch.targets.double().numpy() * task.std[2:] + task.mean[2:]
    assert in_units == pytest.approx(targets.reshape(30, -1)[found], abs=1e-5)
    training = np.isin(np.arange(30), list(rows_of(task, "train", inputs)))
    assert task.std[2:] == pytest.approx(targets.reshape(30, -1)[training].std(0))
    assert task.loss(lambda inputs: batch.targets, batch).tolist() == [0.0] * 32
    assert task.loss(lambda inputs: batch.targets + 2, batch).mean().item() == pytest.approx(4)


@pytest.mark.parametrize("kind", ["classes", "values", "one value"])
def test_targets_of_every_step(tmp_path, kind):
    inputs = RANDOM.normal(size=(30, 7, 2))
    targets = {
        "classes": RANDOM.integers(0, 3, (30, 7)),
        "values": RANDOM.normal(size=(30, 7, 4)),
        "one value": RANDOM.normal(size=(30, 7)),
    }[kind]
    readout = "every" if kind == "one value" else "last"
    mask = RANDOM.random((30, 7)) < 0.5
    task = Arrays(
        save(tmp_path / "a.npz", inputs=inputs, targets=targets, mask=mask), length=3, readout=readout, batch=9
    )
    assert (task.readout, task.length) == ("every", 3)
    assert task.outputs == {"classes": 3, "values": 4, "one value": 1}[kind]
    targets = targets.reshape(30, 7, -1)
    for split in ("train", "valid"):
        for batch in every(task, split):
            for row in range(len(batch)):
                # The mask is about targets: inputs that are not scored are there, and tell the place.
                distance = [
                    (np.abs(inputs[n, t : t + 3] - raw(task, batch.inputs)[row, : 7 - t]).max(), n, t)
                    for n in range(30)
                    for t in (0, 3, 6)
                ]
                _, n, t = min(distance)
                there = min(3, 7 - t)
                assert batch.mask[row].tolist() == [*mask[n, t : t + there].tolist(), *[False] * (3 - there)]
                given = batch.targets[row].reshape(3, -1)[:there][batch.mask[row, :there]].double().numpy()
                given = given if kind == "classes" else given * task.std[2:] + task.mean[2:]
                assert given == pytest.approx(targets[n, t : t + there][mask[n, t : t + there]], abs=1e-5)
    assert batch.present is None


def test_a_mask_says_which_steps_of_a_sequence_there_are(tmp_path):
    lengths = RANDOM.integers(1, 8, 30)
    mask = np.arange(7) < lengths[:, None]
    mask[4] = False
    inputs = np.where(mask[:, :, None], np.arange(30)[:, None, None] + np.zeros((30, 7, 2)), np.nan)
    task = Arrays(save(tmp_path / "a.npz", x=inputs, y=np.arange(30), mask=mask), batch=200)
    batch = task.batch(0)
    for row in range(200):
        n = batch.targets[row].item()
        if not batch.mask[row]:
            assert not batch.present[row].any()
            continue
        assert batch.present[row].tolist() == mask[n].tolist()
        assert raw(task, batch.inputs[row])[mask[n]] == pytest.approx(n, abs=1e-4)
        assert (batch.inputs[row][~batch.present[row]] == 0).all()


def test_a_mask_of_sequences_leaves_some_out(tmp_path):
    inputs, mask = RANDOM.normal(size=(30, 7)), np.arange(30) % 3 > 0
    classes = np.where(mask, np.arange(30), -1)
    batch = Arrays(save(tmp_path / "a.npz", x=inputs, y=classes, mask=mask), batch=300).batch(0)
    assert batch.present is None
    assert set(batch.targets[batch.mask].tolist()) <= set(classes[mask].tolist())
    assert 0 < batch.mask.float().mean() < 1
    assert (batch.targets >= 0).all()
    series = Arrays(save(tmp_path / "b.npz", x=inputs, mask=mask), batch=300).batch(0)
    assert series.mask.all(1).sum() == series.mask.any(1).sum() == series.mask[:, 0].sum()
    assert 0 < series.mask.float().mean() < 1


def test_a_missing_value_is_the_mean_and_not_scored(tmp_path):
    values = RANDOM.normal(9, 2, (20, 8, 2))
    mask = RANDOM.random((20, 8)) < 0.7
    values[~mask] = np.inf
    batch = Arrays(save(tmp_path / "a.npz", x=values, mask=mask), batch=100).batch(0)
    assert batch.inputs.isfinite().all()
    assert batch.targets.isfinite().all()
    assert torch.equal(batch.mask, (batch.targets != 0).any(-1))
    assert 0.5 < batch.mask.float().mean() < 0.9


def test_units_are_those_of_what_is_there(tmp_path):
    values, mask = RANDOM.normal(9, 2, (50, 8, 1)), RANDOM.random((50, 8)) < 0.7
    values[~mask] = 1e6
    task = Arrays(save(tmp_path / "a.npz", x=values, mask=mask))
    assert task.mean == pytest.approx(9, abs=0.5)
    assert task.std == pytest.approx(2, abs=0.5)
    # A mask over targets says nothing about the inputs.
    task = Arrays(save(tmp_path / "b.npz", x=values, y=np.zeros((50, 8), int), mask=mask))
    assert task.mean > 1e5


def test_a_table_is_one_series_in_every_format(tmp_path):
    table = RANDOM.normal(size=(300, 3))
    (tmp_path / "a.csv").write_text("a,b,c\n" + "\n".join(",".join(map(repr, row)) for row in table.tolist()))
    paths = [tmp_path / "a.csv", saved(tmp_path / "a.npy", table), save(tmp_path / "a.npz", x=table)]
    tasks = [Arrays(path, length=20) for path in paths]
    for task in tasks:
        assert (task.inputs, task.outputs, task.length, task.batches("valid")) == (3, 3, 20, 1)
        assert torch.equal(task.batch(3).inputs, tasks[0].batch(3).inputs)
    # One target or mask a row makes every row a series.
    for beside in ({"y": np.arange(300) % 2}, {"mask": np.ones((300, 3))}):
        assert Arrays(save(tmp_path / "b.npz", x=table, **beside)).inputs == 1


def test_what_was_read_is_said_in_a_line(tmp_path):
    rows = [f"2020-01-{n % 28 + 1:02},{n * n / 10},{'' if n in (5, 9) else n * n}" for n in range(2000)]
    (tmp_path / "a.csv").write_text("date,p,h\n" + "\n".join(rows))
    said = Arrays(tmp_path / "a.csv", length=20).describe()
    for part in ("1 series × 2,000 steps × 2 features (p, h); ", "next row, 199 rows (9.95 %) held out", "date", "(2)"):
        assert part in said
    assert "\n" not in said
    labels = np.array(["one", "two", "three", "four", "\x1b[2J"])
    path = save(tmp_path / "a.npz", x=RANDOM.normal(size=(30, 7)), y=np.arange(30) % 5, labels=labels)
    said = Arrays(path).describe()
    assert "30 series × 7 steps × 1 feature; predicts one of 5 classes (one, two, three, four, �[2J) for" in said


def test_the_whole_of_a_file_is_scored_in_given_units(tmp_path):
    values = RANDOM.normal(5, 3, (40, 2))
    path = saved(tmp_path / "a.npy", values)
    task = Arrays(path, length=6, whole=True, units=([1.0, 2.0], [4.0, 8.0]))
    assert task.splits == ("valid",)
    targets = np.concatenate([batch.targets[batch.mask] for batch in every(task, "valid")])
    assert targets == pytest.approx((values[1:] - [1, 2]) / [4, 8], rel=1e-5)
    assert "all of it scored" in task.describe()
    assert torch.equal(pickle.loads(pickle.dumps(task)).batch(0, "valid").inputs, task.batch(0, "valid").inputs)
    with pytest.raises(UsageError, match="has 2 features, but the model was trained on 1"):
        Arrays(path, whole=True, units=([1.0], [1.0]))
    # A sequence with one target is not cut, however long it is.
    one = save(tmp_path / "a.npz", x=values[None], y=np.zeros(1, dtype=int))
    assert Arrays(one, length=6, whole=True).batch(0, "valid").inputs.shape == (1, 40, 2)


def test_lengths_cut_the_padding_off(tmp_path):
    """Padding of any content touches neither units, inputs nor scores; the same as a mask says it, or other files."""
    lengths, padding = RANDOM.integers(2, 8, 30), 1e6
    there = np.arange(8) < lengths[:, None]
    values = np.where(there[:, :, None], RANDOM.normal(3, 2, (30, 8, 2)), padding)
    task = Arrays(save(tmp_path / "a.npz", x=values, lengths=lengths), batch=64)
    assert task.mean == pytest.approx(3, abs=0.6)
    batch = task.batch(0)
    assert batch.inputs.abs().max() < 6
    assert set(batch.mask.sum(1).tolist()) <= set((lengths - 1).tolist())
    classes = save(tmp_path / "b.npz", x=values, y=np.arange(30), lengths=lengths)
    batch = Arrays(classes, batch=64).batch(0)
    assert batch.present.sum(1).tolist() == lengths[batch.targets].tolist()
    assert batch.mask.all()
    each = save(tmp_path / "c.npz", x=values, y=np.where(there, np.arange(8), -5), lengths=lengths)
    batch = Arrays(each, batch=64).batch(0)
    assert torch.equal(batch.targets[batch.mask], torch.arange(8).expand(64, 8)[:, : batch.time][batch.mask])
    for wrong in (lengths - 9, lengths + 9, lengths.astype(float), lengths[:4], lengths[:, None]):
        with pytest.raises(UsageError, match="lengths"):
            Arrays(save(tmp_path / "d.npz", x=values, lengths=wrong))


def test_a_file_says_what_is_held_out(tmp_path):
    values, held_out = RANDOM.normal(size=(40, 6, 2)), np.arange(40) % 4 == 1
    task = Arrays(save(tmp_path / "a.npz", x=values, y=np.arange(40) % 3, held_out=held_out))
    assert rows_of(task, "valid", values) == set(np.flatnonzero(held_out))
    assert rows_of(task, "train", values) <= set(np.flatnonzero(~held_out))


def test_nan_is_a_missing_value_in_every_file(tmp_path):
    """Of an array as of a table, of inputs and of real targets."""
    values = RANDOM.normal(5, 2, (60, 7, 1))
    values[RANDOM.random((60, 7)) < 0.2] = np.nan
    batch = Arrays(saved(tmp_path / "a.npy", values), batch=50).batch(0)
    assert torch.equal(batch.mask, batch.targets[..., 0] != 0)
    assert 0.6 < batch.mask.float().mean() < 0.9
    signalling = np.where(np.isnan(values), np.uint32(0x7FA00000), values.astype(np.float32).view(np.uint32))
    again = Arrays(saved(tmp_path / "b.npy", signalling.view(np.float32)), batch=50).batch(0)
    assert torch.equal(again.mask, batch.mask)
    targets = np.where(np.arange(60) % 3 == 0, np.nan, np.arange(60.0))
    batch = Arrays(save(tmp_path / "a.npz", x=values, y=targets), batch=50).batch(0)
    assert batch.targets.isfinite().all()
    assert torch.equal(batch.mask, batch.targets[:, 0] != 0)


def test_npy_is_memory_mapped(tmp_path):
    saved(tmp_path / "a.npy", np.zeros((2000, 500, 4), dtype=np.float32))
    assert os.path.getsize(tmp_path / "a.npy") > 15e6
    tracemalloc.start()
    try:
        Arrays(tmp_path / "a.npy", length=10).batch(0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 13e6  # blocks of 65,536 steps, in fp64


def test_fingerprints_are_of_the_file(tmp_path):
    values = RANDOM.normal(size=(20, 5))
    first, same = Arrays(saved(tmp_path / "a.npy", values)), Arrays(saved(tmp_path / "b.npy", values), seed=3, batch=2)
    assert first.fingerprint == same.fingerprint
    assert first.fingerprint != Arrays(saved(tmp_path / "b.npy", values + 1)).fingerprint


def test_a_task_is_sent_by_its_arguments(tmp_path):
    task = Arrays(saved(tmp_path / "a.npy", RANDOM.normal(size=(900, 9))), length=9, batch=2, seed=4, eval_batches=3)
    sent = pickle.dumps(task)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert torch.equal(again.batch(7).inputs, task.batch(7).inputs)
    assert again.batches("valid") == task.batches("valid") == 3


def npz(**arrays):
    return lambda folder: Arrays(save(folder / "a.npz", **arrays))


def csv(text, **arguments):
    def act(folder):
        (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        Arrays(folder / "a.csv", **arguments)

    return act


def npy(array, **arguments):
    return lambda folder: Arrays(saved(folder / "a.npy", array), **arguments)


def truncated(folder):
    path = saved(folder / "a.npy", np.zeros((30, 30)))
    path.write_bytes(path.read_bytes()[:500])
    Arrays(path)


def not_a_zip(folder):
    (folder / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    Arrays(folder / "a.npz")


def junk(name):
    def act(folder):
        (folder / name).write_text("these are words")
        Arrays(folder / name)

    return act


X = np.zeros((20, 5, 2))
INFINITE = np.where(np.arange(200).reshape(20, 5, 2) == 57, np.inf, 0)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda folder: Arrays(folder / "a.doc"), "ends in '.doc'; known are .csv"),
        (lambda folder: Arrays(folder / "a"), "ends in 'nothing'; known are"),
        (lambda folder: Arrays(folder / "a.npy"), "a.npy does not exist"),
        (npy(X, readout="first"), "readout='first' is unknown"),
        (npy(X, length=0), "length=0 must be greater than zero"),
        (npy(X, sep=";"), "sep, .* are for tables"),
        (npy(np.zeros((2, 2, 2, 2))), r"shape \(2, 2, 2, 2\); expected \[T\], \[T, F\] or \[N, T, F\]"),
        (npy(np.zeros((0, 5))), r"shape \(0, 5\), which is empty"),
        (npy(np.array([{}, 1])), "pickles.* are never loaded"),
        (npy(np.array(["a", "b"])), "the array are of type <U1; expected real numbers"),
        (npy(INFINITE), "series 5, step 3, feature 1 is infinite"),
        (npy(np.zeros(1)), r"too short: 1 series of 1 steps at most give 0 windows"),
        (npy(np.zeros(10), length=9), "give 1 windows of length=9; two are needed"),
        (truncated, "a.npy cannot be read"),
        (not_a_zip, "a.npz is no whole .npz archive"),
        (npz(data=X), r"has the arrays data; it needs `inputs` \(or `x`\)"),
        (npz(x=np.zeros(5), y=np.zeros(5)), r"inputs have shape \(5,\); expected"),
        (npz(x=np.zeros((2, 2, 2, 2))), r"shape \(2, 2, 2, 2\); expected"),
        (junk("a.npy"), "no file of numbers.*numpy.save"),
        (junk("a.npz"), "no file of numbers.*numpy.save"),
        (npz(x=X, y=np.zeros(19)), r"targets of shape \(19,\) do not fit inputs of \(20, 5, 2\)"),
        (npz(x=X, y=np.zeros((20, 4), int)), r"int64 and shape \(20, 4\) do not fit inputs of 20 sequences × 5 steps"),
        (npz(x=X, y=np.zeros((20, 4, 3))), r"shape \(20, 4, 3\) do not fit inputs of 20 sequences × 5 steps"),
        (npz(x=X, mask=np.ones((20, 4))), r"mask of shape \(20, 4\) do not fit inputs of \(20, 5, 2\)"),
        (npz(x=X, mask=np.zeros((20, 5))), "nothing in the split 'train' is scored"),
        (npz(x=X, y=np.arange(20), mask=np.zeros(20)), "nothing in the split 'train' is scored"),
        (npz(x=X, y=np.full((20, 3), np.nan)), "nothing in the split 'train' is scored"),
        (npz(x=X, held_out=np.ones(20)), "nothing in the split 'train' is scored"),
        (npz(x=X, y=np.array([{}] * 20)), "pickles"),
        (npz(x=X, y=np.full(20, -1)), "20 targets are no class.* number 0 of 20.*mask"),
        (npz(x=X, y=np.full(20, 2**62)), "20 targets are no class.*4611686018427387904"),
        (npz(x=X, y=np.full((20, 3), np.inf)), "20 targets are infinite"),
        (npz(x=INFINITE, mask=np.ones((20, 5))), "series 5, step 3, feature 1 is infinite"),
        (npz(x=X[:1], y=np.zeros(1, int)), "too short: 1 series .* two are needed"),
        (csv("a,b\n1,2\n3,inf\n4,5\n6,9\n"), "a.csv, row 2: b='inf' is infinite; leave it empty, give missing='inf'"),
        (csv("a,b\n1,2\n3,9\n4,-inf\nx,9\n6,1\n", columns="b"), "a.csv, row 3: b='-inf' is infinite"),
        (csv("a\n1\n"), "too short"),
    ],
)
def test_errors(tmp_path, act, message):
    with pytest.raises(UsageError, match=message) as caught:
        act(tmp_path)
    assert "\n" not in str(caught.value)


def test_errors_of_batches(tmp_path):
    task = Arrays(save(tmp_path / "a.npz", x=X, y=np.arange(20)))
    for arguments, message in [
        ((0, "test"), "split='test' is none of"),
        ((1, "valid"), r"step=1 must be 0 or more and below 1"),
        ((0, "train", 6), r"length=6 must lie in \[1, 5\]"),
    ]:
        with pytest.raises(UsageError, match=message):
            task.batch(*arguments)
    with pytest.raises(UsageError, match="length=3 would cut sequences of 5 steps with one target"):
        Arrays(tmp_path / "a.npz", length=3)
    with pytest.raises(UsageError, match=r"shape \(20,\) do not fit"):
        Arrays(tmp_path / "a.npz", readout="every")


def test_baselines_are_the_losses_of_the_row_before_and_of_the_row_a_period_before(tmp_path):
    time, values = np.arange(3000), RANDOM.normal(0, 0.3, (3000, 2))
    values += np.stack([3 * np.sin(2 * np.pi * time / 23), np.cos(2 * np.pi * time / 23)], 1)
    values[2950, 0] = np.nan
    task = Arrays(saved(tmp_path / "a.npy", values), length=50, batch=7)
    (persistence, before), (seasonal, period) = task.baselines().items()
    assert (persistence, seasonal) == ("persistence", "seasonal (23 steps)")
    begin = int(task._windows["valid"].begin[0])
    standard = np.nan_to_num((values - task.mean) / task.std)
    scored = np.isfinite(values[begin + 1 :]).all(1)
    for loss, lag in ((before, 1), (period, 23)):
        errors = standard[begin + 1 :] - standard[begin + 1 - lag : len(values) - lag]
        assert loss == pytest.approx(np.square(errors)[scored].mean(), rel=1e-5)
    assert period < before


@pytest.mark.parametrize("shape", [(4, 9, 2), (300,), (6, 2), (6,)])
def test_noise_has_no_period_and_short_series_have_baselines(tmp_path, shape):
    task = Arrays(saved(tmp_path / "a.npy", RANDOM.normal(size=shape)), length=2)
    losses = task.baselines()
    assert list(losses) == ["persistence"]
    assert np.isfinite(losses["persistence"])


@pytest.mark.parametrize("every", [False, True])
def test_targets_of_their_own_are_compared_with_the_best_constant(tmp_path, every):
    held_out = np.arange(20) % 4 == 3
    shape = (20, 5) if every else (20,)
    values, classes = RANDOM.normal(3, 2, size=(*shape, 1)), RANDOM.integers(0, 3, size=shape)
    common = {"inputs": RANDOM.normal(size=(20, 5, 2)), "held_out": held_out}
    task = Arrays(save(tmp_path / "v.npz", targets=values, **common))
    mean, std = values[~held_out].mean(), values[~held_out].std()
    expected = np.square((values[held_out] - mean) / std).mean()
    assert task.baselines() == {"mean of the targets": pytest.approx(expected, rel=1e-5)}
    task = Arrays(save(tmp_path / "c.npz", targets=classes, **common))
    counts = np.bincount(classes[~held_out].ravel(), minlength=3) + 1
    ((rule, loss),) = task.baselines().items()
    assert loss == pytest.approx(-np.log(counts / counts.sum())[classes[held_out]].mean())
    assert rule == f"class frequencies (accuracy {(classes[held_out] == counts.argmax()).mean():.3g})"
    assert Arrays(tmp_path / "c.npz", whole=True).baselines() == {}


def test_many_series_and_series_without_a_known_row_have_baselines(tmp_path):
    task = Arrays(saved(tmp_path / "many.npy", RANDOM.normal(size=(3000, 4, 1))), length=3)
    assert task.baselines()["persistence"] > 0
    with pytest.raises(UsageError, match="split='tets'"):
        task.baselines("tets")


def test_values_far_beyond_the_others_have_a_loss(tmp_path):
    for seed in range(4):
        values = np.random.default_rng(seed).normal(size=(6, 40, 2)).astype(np.float32)
        values[seed, 20 + seed, 1] = 3e38
        values[5 - seed, 7, 0] = -3e38
        task = Arrays(saved(tmp_path / f"{seed}.npy", values), length=15)
        assert task.baselines()["persistence"] >= 0
        assert task.describe()

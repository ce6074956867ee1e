"""Generated tasks, solved again in plain Python from their printed sequences."""

import pytest
import torch

from reroll.data.synthetic import SYNTHETIC, Memorise, Recall, RepeatCopy, Sort
from reroll.errors import UsageError

TRANSDUCTIONS = sorted(set(SYNTHETIC) - {"memorise"})
SPLITS = ["train", "valid", "longer"]


def answer(name, left, right):
    """The prompt after SEP and the output, from what stands on both sides of SEP."""
    if name == "recall":
        return right[0], dict(zip(left[::2], left[1::2]))[right[0]]
    if name == "repeat_copy":
        return "", left[:-1] * int(left[-1])
    if name == "add":
        first, second = left.split("+")
        return "", str(int(first) + int(second)).zfill(len(first) + 1)
    solve = {
        "copy": lambda text: text,
        "reverse": lambda text: text[::-1],
        "sort": lambda text: "".join(sorted(text)),
        "parity": lambda text: str(text.count("1") % 2),
    }
    return "", solve[name](left)


def size(name, left):
    """The length of a sequence, as its task counts it."""
    return {"recall": len(left) // 2, "repeat_copy": len(left) - 1, "add": (len(left) - 1) // 2}.get(name, len(left))


def oracle(batch, vocab):
    """A model that knows the targets, and is sure of them."""
    return lambda inputs: 1000.0 * torch.nn.functional.one_hot(batch.targets, vocab).float()


@pytest.mark.parametrize("name", TRANSDUCTIONS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length, rows", [(1, 5), (7, 33), (13, 8)])
def test_sequences_are_right_and_every_output_is_scored(name, split, length, rows):
    task = SYNTHETIC[name](length=length, batch=rows, seed=3)
    sizes = set()
    for step in range(3):
        batch = task.batch(step, split)
        assert len(batch) == rows
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        for inputs, last, mask in zip(batch.inputs.tolist(), batch.targets[:, -1:].tolist(), batch.mask.tolist()):
            text = task.decode(inputs + last)
            body = text.rstrip(".")
            left, right = body.split("|")
            query, output = answer(name, left, right)
            assert body == f"{left}|{query}{output}$"
            first = len(left) + 1 + len(query)  # the place of the output; its symbol is predicted one step before
            scored = [place for place, is_scored in enumerate(mask) if is_scored]
            assert scored == list(range(first - 1, first + len(output)))
            sizes.add(size(name, left))
    assert sizes <= (set(range(length + 1, 2 * length + 1)) if split == "longer" else set(range(1, length + 1)))
    if rows == 33:
        assert len(sizes) == length  # 99 draws of 7 lengths


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_perfect_model_is_perfect(name):
    task = SYNTHETIC[name](length=6, batch=4)
    for split in ("train", *task.splits):
        batch = task.batch(2, split)
        model = oracle(batch, task.vocab)
        assert task.loss(model, batch).tolist() == [0.0] * 4
        summary = task.score(model, batch).summary(categorical=True)
        assert summary == {"loss": 0.0, "bits": 0.0, "accuracy": 1.0, "exact": 1.0}


@pytest.mark.parametrize("name", TRANSDUCTIONS)
def test_one_wrong_symbol_is_seen_wherever_it_is(name):
    task = SYNTHETIC[name](length=5, batch=2)
    batch = task.batch(0)
    for row, step in batch.mask.nonzero().tolist():
        wrong = torch.nn.functional.one_hot(batch.targets, task.vocab).float()
        wrong[row, step] = wrong[row, step].roll(1)
        score = task.score(lambda inputs, wrong=wrong: 1000.0 * wrong, batch)
        assert score.scored - score.correct == 1
        assert score.exact == 1


@pytest.mark.parametrize("name", TRANSDUCTIONS)
def test_batches_are_a_function_of_seed_step_and_split(name):
    def draw(step=4, split="train", seed=0, rows=16):
        return SYNTHETIC[name](length=9, batch=rows, seed=seed).batch(step, split)

    same, usual = draw(), draw()
    assert torch.equal(same.inputs, usual.inputs)
    assert torch.equal(same.mask, usual.mask)
    others = [draw(step=5), draw(seed=1), draw(split="valid")]
    assert all(not torch.equal(usual.inputs, other.inputs) for other in others)
    # Rows are the same however many there are.
    assert torch.equal(draw(rows=5).inputs, usual.inputs[:5])


@pytest.mark.parametrize("name", TRANSDUCTIONS)
def test_widths_depend_on_the_limit_alone(name):
    task = SYNTHETIC[name](length=8, batch=2)
    for split in SPLITS:
        for limit in (1, 3, 8, None):
            assert len({task.batch(step, split, limit).time for step in range(20)}) == 1
    assert task.batch(0, length=3).time < task.batch(0).time < task.batch(0, "longer").time


@pytest.mark.parametrize("name", TRANSDUCTIONS)
def test_a_curriculum_limits_the_length(name):
    task = SYNTHETIC[name](length=20, batch=64)
    for split, allowed in [("train", {1, 2, 3}), ("longer", {4, 5, 6})]:
        lefts = [task.decode(row).split("|")[0] for row in task.batch(0, split, length=3).inputs.tolist()]
        assert {size(name, left) for left in lefts} == allowed


@pytest.mark.parametrize("name, extra", [("copy", 0), ("repeat_copy", 4), ("add", 1), ("parity", 0), ("recall", 0)])
def test_vocabulary_is_content_and_marks(name, extra):
    task = SYNTHETIC[name]()
    assert task.vocab == task.outputs == task.symbols + 3 + extra
    assert len(set(task.names)) == task.vocab


@pytest.mark.parametrize("base", [2, 7, 16])
def test_add_in_other_bases(base):
    task = SYNTHETIC["add"](length=5, batch=20, symbols=base)
    digits = "0123456789abcdef"
    for row in task.batch(0).inputs.tolist():
        left, right = task.decode(row).rstrip(".$").split("|")
        first, second = left.split("+")
        assert int(first, base) + int(second, base) == int(right, base)
        assert set(left) <= set(digits[:base] + "+")


def test_recall_asks_for_every_place():
    task = Recall(length=4, batch=200)
    asked = set()
    for row in task.batch(0).inputs.tolist():
        left, right = task.decode(row).split("|")
        assert len(set(left[::2])) == len(left) // 2
        asked.add(left[::2].index(right[0]))
    assert asked == {0, 1, 2, 3}


def test_memorise_is_one_batch_of_scored_symbols():
    task = Memorise(length=9, seed=5)
    batch = task.batch(0)
    assert batch.inputs.shape == (1, 9)
    assert batch.scored == 9
    assert task.batches("valid") == 1
    for other in (task.batch(8), task.batch(3, "valid")):
        assert torch.equal(batch.targets, other.targets)
    assert torch.equal(task.batch(0, length=4).inputs, batch.inputs[:, :4])
    assert not torch.equal(batch.inputs, Memorise(length=9, seed=6).batch(0).inputs)
    assert task.vocab == 100
    assert len(set(task.names)) == 100


@pytest.mark.parametrize("name", SYNTHETIC)
def test_text_and_symbols_are_each_others_reverse(name):
    task = SYNTHETIC[name](symbols=600)
    symbols = list(range(task.vocab))
    assert task.encode(task.decode(symbols)) == symbols


def test_fingerprints_tell_definitions_apart():
    arguments = [{}, {"length": 11}, {"seed": 1}, {"symbols": 20}]
    tasks = [task(**change) for task in SYNTHETIC.values() for change in arguments] + [RepeatCopy(repeats=3)]
    assert len({task.fingerprint for task in tasks}) == len(tasks)
    assert Sort(batch=3).fingerprint == Sort(batch=7).fingerprint
    assert Memorise(batch=3).fingerprint != Memorise(batch=7).fingerprint


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: Sort(length=0), "length=0 must be greater than zero"),
        (lambda: Sort(batch=-1), "batch=-1 must be greater than zero"),
        (lambda: Sort(symbols=1), "symbols=1 leaves sort nothing to tell apart"),
        (lambda: RepeatCopy(repeats=0), "repeats=0"),
        (
            lambda: Recall(length=10, symbols=19),
            "symbols=19 is too few .* Give symbols=20 or more, or length=9 or less",
        ),
        (lambda: Sort().batch(0, "vaild"), "split='vaild' is none of the task's. Did you mean \"valid\""),
        (lambda: Sort().batch(0, length=11), r"length=11 must lie in \[1, 10\]"),
        (lambda: Sort().batch(0, length=0), r"length=0 must lie in \[1, 10\]"),
        (lambda: Sort().batch(-1), "step=-1 must be 0 or more"),
        (lambda: Memorise().batch(0, "longer"), "split='longer' is none of"),
        (lambda: Sort().encode("ab1"), "sort has no symbol '1' in text='ab1'"),
    ],
)
def test_errors(act, message):
    with pytest.raises(UsageError, match=message):
        act()

"""What holds of every task: rows are rows of the batch, units are other batches, and a run keeps what it needs."""

import json

import numpy as np
import pytest
import torch

from reroll.data.arrays import Arrays
from reroll.data.batch import Batch
from reroll.data.synthetic import SYNTHETIC
from reroll.data.task import sequence_losses
from reroll.data.text import Text
from reroll.errors import UsageError
from reroll.grad import Backprop, CentralDifference
from reroll.keys import Key

KINDS = [*SYNTHETIC, "text", "carried", "next", "classes", "steps"]


@pytest.fixture
def task_of(tmp_path):
    def build(kind):
        if kind in SYNTHETIC:
            return SYNTHETIC[kind](length=6, batch=7, seed=3)
        if kind in ("text", "carried"):
            return Text("stdlib:prose", length=12, batch=7, seed=3, carry=kind == "carried")
        draws = np.random.default_rng(1)
        arrays = {"inputs": draws.normal(size=(80, 9, 2)), "mask": draws.random((80, 9)) < 0.7}
        targets = {"classes": draws.integers(0, 3, 80), "steps": draws.normal(size=(80, 9, 2))}
        np.savez(tmp_path / "a.npz", **arrays, **({"targets": targets[kind]} if kind in targets else {}))
        return Arrays(tmp_path / "a.npz", batch=7, seed=3)

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rows_of_the_batch(task_of, kind):
    task = task_of(kind)
    for split, step, unit in [("train", 5, None), ("train", 5, 2), *((split, 0, None) for split in task.splits)]:
        whole = task.batch(step, split, unit=unit)
        assert len(whole) == 7
        parts = [range(1), range(1, 4), range(4, len(whole))]
        batches = [task.batch(step, split, rows=rows, unit=unit) for rows in parts]
        for name in ("inputs", "targets", "mask", "present", "reset"):
            value = getattr(whole, name)
            for rows, batch in zip(parts, batches):
                one = getattr(batch, name)
                assert (one is None) if value is None else torch.equal(one, value[list(rows)])
        assert sum(batch.scored for batch in batches) == pytest.approx(whole.scored)
    for rows in (range(0), range(2, 9), range(0, 4, 2), range(3, 1)):
        with pytest.raises(UsageError, match="rows="):
            task.batch(0, rows=rows)


def test_shapes_that_could_broadcast_to_a_wrong_loss_are_refused():
    ids, real = torch.randint(0, 5, (8, 12)), torch.randn(8, 12, 3)
    for inputs, targets, shape in [
        (ids, ids, (8, 12)), (real, ids[:, 0], (8,)), (real, real, (8, 12)), (ids, real[:, 0], (8,))
    ]:  # fmt: skip
        whole = Batch(inputs, targets, torch.ones(shape, dtype=torch.bool), present=torch.ones(8, 12) > 0)
        assert whole.scored == np.prod(shape)
        for wrong in {(1,), (8,), (8, 1), (1, 8), (8, 12), (8, 3), (12,), ()} - {shape}:
            with pytest.raises(UsageError, match=r"mask has shape .* belongs one of \[8"):
                Batch(inputs, targets, torch.ones(wrong, dtype=torch.bool))
        with pytest.raises(UsageError, match="targets has shape"):
            Batch(inputs, targets[:5], whole.mask)
        for name in ("present", "reset"):
            with pytest.raises(UsageError, match=f"{name} has shape"):
                Batch(inputs, targets, whole.mask, **{name: torch.ones(8) > 0})


@pytest.mark.parametrize("shape", [(8,), (8, 12)])
def test_numbers_in_the_shape_of_the_mask_are_one_output_each(shape):
    targets, mask = torch.randn(shape), torch.rand(shape) < 0.7
    batch, outputs = Batch(torch.randn(8, 12, 3), targets, mask), torch.randn(*shape, 1)
    expected = (outputs[..., 0] - targets)[mask].square().mean()
    torch.testing.assert_close(sequence_losses(lambda _: outputs, batch).mean(), expected)
    assert batch.rows(2, 5).targets.shape == (3, *shape[1:], 1)
    with pytest.raises(UsageError, match=r"outputs of shape \[8.*needs a tensor of shape \[8.*, 1\]"):
        sequence_losses(lambda _: outputs[..., 0], batch)


class Fixed(torch.nn.Module):
    """Returns the same outputs whatever it is given."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.scale = outputs, torch.nn.Parameter(torch.ones(()))

    def forward(self, inputs, **options):
        return self.outputs if isinstance(self.outputs, dict) else self.outputs * self.scale


MISFITS = {
    "one output": ("copy", torch.zeros(7, 27), r"of shape \[7, 27\]; .* of shape \[7, 13, classes\]. Return"),
    "classes before steps": ("copy", torch.zeros(7, 29, 13), r"shape \[7, 29, 13\]; .* \[7, 13, classes\]"),
    "too few classes": ("copy", torch.zeros(7, 13, 5), r"5 logits, for classes 0 … 4; .* up to 28. Build it with outp"),
    "every step": ("classes", torch.zeros(7, 9, 3), r"shape \[7, 9, 3\]; .* \[7, classes\].*per sequence for 'last'"),
    "fewer values": ("next", torch.zeros(7, 8, 1), r"shape \[7, 8, 1\]; .* \[7, 8, 2\]"),  # which broadcasts
    "a dictionary": ("next", {"logits": 0}, "returned a dict; the task needs a tensor"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_outputs_that_do_not_fit_the_task_are_refused_in_a_line(task_of, case):
    kind, outputs, message = MISFITS[case]
    task, model = task_of(kind), Fixed(outputs)
    batch = task.batch(0)
    losses = (
        lambda: task.loss(model, batch), lambda: task.score(model, batch),
        lambda: Backprop()(model, task.loss, batch, Key(0)),
        lambda: CentralDifference(2, 0.01)(model, task.loss, batch, Key(0)),
        lambda: CentralDifference(2, 0.01, evaluate="batched")(model, task.loss, batch, Key(0)),
    )  # fmt: skip
    for loss in losses:
        with pytest.raises(UsageError, match=message) as caught:
            loss()
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_is_another_batch_of_the_step(task_of, kind):
    task = task_of(kind)
    batches = [task.batch(4, unit=unit).inputs for unit in (None, 0, 1)] + [task.batch(5).inputs]
    assert torch.equal(task.batch(4, unit=1).inputs, batches[2])
    if kind not in ("memorise", "carried"):  # one batch; one place in the text
        assert not any(torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_what_a_model_needs(task_of, kind):
    task = task_of(kind)
    saved = json.loads(json.dumps(task.metadata()))
    assert saved["fingerprint"] == task.fingerprint
    assert saved["sizes"]["outputs"] == task.outputs
    assert (saved["tokenizer"] is None) == (task.vocab != 256)
    assert (saved["units"] is None) == (task.inputs is None)
    assert task.carries == (kind == "carried")

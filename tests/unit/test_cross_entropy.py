"""The loss of a head in chunks is the loss of all its logits, value and gradient."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from reroll.cells import GRU
from reroll.data import task
from reroll.data.batch import START, Batch
from reroll.errors import UsageError
from reroll.kernels.cross_entropy import cross_entropy
from reroll.models import Recurrent

SIZES = [(1, 1, 1, 1), (13, 5, 17, 4), (7, 3, 31, 7), (7, 3, 31, 100), (0, 3, 5, 2)]


def problem(count, width, vocab, dtype=torch.float64):
    generator = torch.Generator().manual_seed(count + vocab)
    tensors = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((count, width), (vocab, width), (vocab,))
    )
    return [t.requires_grad_() for t in tensors], torch.randint(vocab, (count,), generator=generator)


@pytest.mark.parametrize("count, width, vocab, rows", SIZES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_all_logits(count, width, vocab, rows, biased, dtype):
    if count == 0 and dtype is not torch.float64:
        return
    (x, weight, bias), targets = problem(count, width, vocab, dtype)
    bias = bias if biased else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    share = torch.linspace(-1, 2, count).to(torch.promote_types(dtype, torch.float32))
    losses, hits = cross_entropy(x, weight, bias, targets, rows)
    found = torch.autograd.grad((losses * share).sum(), leaves)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    logits = functional.linear(exact[0], exact[1], exact[2] if biased else None)
    expected = functional.cross_entropy(logits, targets, reduction="none")
    gradients = torch.autograd.grad((expected * share).sum(), exact)
    loose = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(losses.double(), expected, rtol=loose, atol=loose)
    for a, b in zip(found, gradients):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=loose, atol=loose * max(1.0, b.abs().max() if len(b) else 1.0))
    if dtype is torch.float64:
        assert torch.equal(hits, logits.argmax(-1) == targets)
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, weight, bias, targets, rows)[0], losses)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UsageError, match=r"\(2, 3\)"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(5, 4), None, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("readout", ["every", "last"])
@pytest.mark.parametrize("carried", [False, True])
def test_a_task_takes_the_head_in_chunks_where_all_logits_are_too_many(readout, carried, monkeypatch):
    if carried and readout == "last":
        return
    torch.manual_seed(0)
    model = Recurrent(cell=GRU(5, 6), vocab=11, readout=readout)
    ids, mask = torch.randint(11, (4, 8)), torch.rand(4, 7) < 0.7
    batch = Batch(ids[:, :-1], ids[:, 1:], mask, state=START if carried else None)
    if readout == "last":
        batch = Batch(ids[:, :-1], ids[:, -1], torch.ones(4, dtype=torch.bool))
    seen = []

    def run():
        losses = task.sequence_losses(model, batch)
        losses = losses.losses if carried else losses
        with torch.no_grad():
            score = task.sequence_score(model, batch)[0]
        return losses, torch.autograd.grad(losses.mean(), list(model.parameters())), score

    losses, gradients, score = run()
    monkeypatch.setattr(task, "LOGITS", 20)
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: seen.append(1) or pytest.fail("all logits were made"))
    chunked = run()
    torch.testing.assert_close(chunked[0], losses)
    for a, b in zip(chunked[1], gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert chunked[2] == pytest.approx(score)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Low(nn.Module):
    """A head with a correction of low rank, and without the attributes of nn.Linear."""

    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(11, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("change", ["hook", "hook on the model", "patch", "subclass", "module"])
@pytest.mark.parametrize("readout", ["every", "last"])
def test_a_head_with_code_of_another_is_called_however_many_logits_there_are(change, readout, monkeypatch):
    torch.manual_seed(0)
    model = Recurrent(cell=GRU(5, 6), vocab=11, readout=readout)
    head, ids = model.head, torch.randint(11, (4, 8))
    if change == "patch":
        head.forward = lambda x: nn.Linear.forward(head, x).sin()
    elif change in ("subclass", "module"):
        model.head = Doubling(6, 11) if change == "subclass" else Low(head)
    else:
        (head if change == "hook" else model).register_forward_hook(lambda module, inputs, output: output * 3)
    targets = ids[:, 1:] if readout == "every" else ids[:, -1]
    batch = Batch(ids[:, :-1], targets, torch.ones(targets.shape, dtype=torch.bool))
    losses = task.sequence_losses(model, batch)
    monkeypatch.setattr(task, "LOGITS", 1)
    torch.testing.assert_close(task.sequence_losses(model, batch), losses)


def test_under_autocast_the_logits_are_those_of_the_layer():
    (x, weight, bias), targets = problem(9, 8, 6, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = cross_entropy(x, weight, bias, targets, rows=4)
        logits = functional.linear(x, weight, bias)
    assert logits.dtype == torch.bfloat16
    expected = functional.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-2)
    losses.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32

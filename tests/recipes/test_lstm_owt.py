"""The recipe `cdrge_lstm_owt` with its 50,260 symbols, on shards that `reroll data prepare` makes of `stdlib`."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reroll.cli import main
from reroll.data.batch import START
from reroll.data.task import sequence_losses
from reroll.data.tokens import ABOUT, read_shard
from reroll.models import Interface
from reroll.recipes import RECIPES
from reroll.train.load import build_model
from reroll.train.loop import train
from reroll.train.records import read_metrics


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The prose in a thousand byte pairs: documents from a few to thousands of tokens, some longer than a shard."""
    pytest.importorskip("tokenizers", reason="byte pairs need the extra `data`")
    folder = tmp_path_factory.mktemp("shards")
    command = ["data", "prepare", "tokens", "--path", "stdlib:prose", "--tokenizer", "bpe", "--max-vocab", "1000"]
    assert main([*command, "--shard", "5000", "--to", str(folder)]) == 0
    return folder


def owt(shards, **task):
    config = RECIPES["cdrge_lstm_owt"]()
    return config.replace(
        task={"path": str(shards), "length": 64, "batch": 4, "valid_tokens": 500, **task},
        model={"hidden": 16, "embed": 8, "heads": 2},
        gradient={"probes": 4},
        run={"steps": 3, "eval_every": 3, "threads": 1},
    )


def test_a_state_is_carried_across_windows_and_reset_at_documents(shards):
    """Windows with the state of the one before have the losses of documents that are read whole, each by itself."""
    torch.set_num_threads(1)
    config = owt(shards, length=32)
    task = config.task.build(0)
    assert (task.vocab, task.document) == (50_260, json.loads((shards / ABOUT).read_text())["vocab"] - 1)
    model = build_model(config.model, Interface.of(task), 0).double()
    files = sorted(shards.glob("*_train_*.bin"))
    stream = np.concatenate([read_shard(file) for file in files]).astype(np.int64)
    lengths = np.diff(np.flatnonzero(stream == task.document))
    assert lengths.min() < 200 < 5000 < lengths.max()
    begins = [step for step in range(1, task.most_steps - 1) if task.batch(step).reset is not None]
    assert len(begins) > 20
    for step in begins[:: len(begins) // 2]:
        windows, state = [], START
        for index in (step - 1, step, step + 1):
            losses, state = sequence_losses(model, replace(task.batch(index), state=state))
            windows.append(losses)
        rows = np.arange(4) * ((len(stream) - 1) // 4) + (step - 1) * 32
        expected = torch.stack([losses_alone(model, stream[row : row + 97], task.document) for row in rows])
        torch.testing.assert_close(torch.stack(windows, 1), expected.view(4, 3, 32).mean(-1), rtol=0, atol=1e-10)


def losses_alone(model, tokens, document):
    """The loss of every next token, of documents that the model reads one by one."""
    tokens, losses = torch.from_numpy(tokens), []
    borders = [0, *(np.flatnonzero(tokens[1:-1] == document) + 1), len(tokens) - 1]
    for begin, end in itertools.pairwise(borders):
        logits = model(tokens[None, begin:end])[0]
        losses.append(logits.logsumexp(-1) - logits.gather(1, tokens[begin + 1 : end + 1, None])[:, 0])
    return torch.cat(losses).detach()


def test_it_trains_with_the_whole_vocabulary(shards, tmp_path):
    summary = train(owt(shards, length=16, valid_tokens=200), tmp_path / "run")
    rows = list(read_metrics(tmp_path / "run"))
    assert summary["state"] == "done"
    assert rows[-1]["tokens"] == 3 * 4 * 16
    assert rows[0]["loss"] == pytest.approx(math.log(50_260), rel=0.05)

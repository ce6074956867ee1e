"""Models the tests run over: every cell in a `Recurrent`, and modules that are not ours."""

import torch
from torch import nn

from reroll.cells import DNC, GRU, LSTM, RNN
from reroll.data.batch import Batch
from reroll.models import Recurrent

VOCAB = 7


class Foreign(nn.Module):
    """Somebody's module: weights used outside of layers, a tied weight, a frozen one, a buffer, a scalar parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 40)
        self.mix = nn.Parameter(torch.randn(40, 40) * 0.1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.frozen = nn.Parameter(torch.randn(40), requires_grad=False)
        self.norm = nn.LayerNorm(40)
        self.register_buffer("offset", torch.randn(40))

    def forward(self, ids):
        x = self.embed(ids)
        x = torch.tanh(x @ self.mix.T * self.scale + self.offset + self.frozen)
        x = self.norm(x).cumsum(1) / torch.arange(1, ids.shape[1] + 1).view(-1, 1)
        return x @ self.embed.weight.t()


class Noisy(nn.Module):
    """A module with dropout and batch statistics, in training mode."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, VOCAB)

    def forward(self, ids):
        x = self.batch_norm(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(x))


def recurrent(cell, **options):
    return Recurrent(cell=cell, vocab=VOCAB, **options)


BUILDERS = {
    "rnn": lambda: recurrent(RNN(6, 5)),
    "gru": lambda: recurrent(GRU(6, 5)),
    "lstm": lambda: recurrent(LSTM(6, 8)),
    "lstm-heads": lambda: recurrent(LSTM(40, 64, heads=2)),
    "dnc": lambda: recurrent(DNC(6, 8, word_size=4, memory_size=3)),
    "stack": lambda: recurrent((LSTM(6, 8, heads=2), GRU(8, 5))),
    "torch-lstm": lambda: TorchLSTM(),
    "foreign": lambda: Foreign(),
    "noisy": lambda: Noisy(),
}


class TorchLSTM(nn.Module):
    """torch's own module between its own layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, VOCAB)

    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])


def build(name, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return BUILDERS[name]().to(dtype)


def a_batch(rows=6, time=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, time + 1), generator=generator)
    mask = torch.rand(rows, time, generator=generator) < 0.7
    mask[:, 0] = True
    return Batch(ids[:, :-1], ids[:, 1:], mask)

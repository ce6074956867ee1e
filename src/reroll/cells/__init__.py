"""One step of a recurrence each: `RNN`, `GRU`, `LSTM` (with block-diagonal heads), `DNC`, and your own (`Cell`)."""

from reroll.cells.base import Cell, FunctionCell, State, cell_from
from reroll.cells.dnc import DNC, DNCState
from reroll.cells.gru import GRU
from reroll.cells.lstm import LSTM, LSTMState
from reroll.cells.rnn import RNN

__all__ = ["CELLS", "DNC", "GRU", "LSTM", "RNN", "Cell", "DNCState", "FunctionCell", "LSTMState", "State", "cell_from"]

CELLS = (RNN, GRU, LSTM, DNC)
"""Every cell. The tests run over this tuple, so a new entry inherits them."""

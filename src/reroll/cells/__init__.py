"""One step of a recurrence each: recurrent cells of the literature, dynamical systems, and your own (`Cell`)."""

from reroll.cells.base import Cell, State
from reroll.cells.dnc import DNC, DNCState
from reroll.cells.dynamics import ARGRU, ARState, Lorenz96, MeanField, TwoWell
from reroll.cells.layers import GRU, LEM, RNN, LEMState, MinGRU, MinRNN, ParaGRU, ParaLSTM
from reroll.cells.lstm import LSTM, LSTMState
from reroll.cells.wrapped import FunctionCell, cell_from

__all__ = [
    "ARGRU", "CELLS", "DNC", "GRU", "LEM", "LSTM", "RNN", "ARState", "Cell", "DNCState", "FunctionCell", "LEMState",
    "LSTMState", "Lorenz96", "MeanField", "MinGRU", "MinRNN", "ParaGRU", "ParaLSTM", "State", "TwoWell", "cell_from",
]  # fmt: skip

CELLS = (RNN, GRU, LSTM, DNC, LEM, MinGRU, MinRNN, ParaGRU, ParaLSTM)
"""Every cell that is built as cell(input_size, hidden_size). The tests run over this tuple."""

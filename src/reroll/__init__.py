"""reroll: train sequence models past the three walls of backpropagation through time."""

__version__ = "0.1.0"

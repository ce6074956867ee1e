"""A loss into a gradient: by backpropagation (`Backprop`), or from forward passes alone (`CentralDifference`)."""

from reroll.grad.backprop import Backprop
from reroll.grad.base import Dense, Estimate, Estimator, Gradient, Seeded
from reroll.grad.central_difference import CentralDifference

__all__ = ["Backprop", "CentralDifference", "Dense", "Estimate", "Estimator", "Gradient", "Seeded"]

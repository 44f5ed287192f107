"""Prediction with the noise on: what a model says, and how sure it is."""

from vardrop.prediction.stochastic import stochastic

__all__ = ["stochastic"]

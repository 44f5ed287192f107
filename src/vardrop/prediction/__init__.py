"""Prediction with the noise on: what a model says, and how sure it is."""

from vardrop.prediction.mc import mc_predict
from vardrop.prediction.prediction import Prediction
from vardrop.prediction.stochastic import stochastic

__all__ = ["Prediction", "mc_predict", "stochastic"]

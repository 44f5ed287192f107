"""What uncertainty is for: handing cases to a person, choosing what to label, knowing what is foreign, calibration.

Pure functions over tensors; :func:`vardrop.select` and :func:`vardrop.acquire` also take a :class:`vardrop.Prediction`.
"""

from vardrop.uncertainty import calibration, detection, intervals
from vardrop.uncertainty.acquisition import acquire
from vardrop.uncertainty.active import ActiveLearning, Round, active_learning
from vardrop.uncertainty.joint_information import Batch, batch_bald
from vardrop.uncertainty.risk import RiskCoverage, aurc, excess_aurc, optimal_aurc, risk_coverage, upper_bound
from vardrop.uncertainty.selection import Applied, Selection, select
from vardrop.uncertainty.temperature import TemperatureScaling

__all__ = [
    "ActiveLearning",
    "Applied",
    "Batch",
    "RiskCoverage",
    "Round",
    "Selection",
    "TemperatureScaling",
    "acquire",
    "active_learning",
    "aurc",
    "batch_bald",
    "calibration",
    "detection",
    "excess_aurc",
    "intervals",
    "optimal_aurc",
    "risk_coverage",
    "select",
    "upper_bound",
]

"""Deep ensembles: members that start differently, trained and evaluated in one vmapped pass."""

from vardrop.ensemble.ensemble import Ensemble

__all__ = ["Ensemble"]

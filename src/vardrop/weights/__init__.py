"""Weights that are random variables: the objects, the operations on them, the estimators, the posteriors."""

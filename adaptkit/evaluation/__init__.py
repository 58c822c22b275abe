"""Evaluation: recipes, protocols, metrics, statistics and the record of a run."""

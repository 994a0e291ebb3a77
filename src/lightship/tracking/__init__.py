"""Weights & Biases: a run's numbers as they come, none of whose failures ends a run."""

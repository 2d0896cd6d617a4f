"""Runs: training, checkpoints, evaluation, prediction, export and cross-validation."""

"""The record of a run: progress on the terminal, the metrics log, plots and the summary."""

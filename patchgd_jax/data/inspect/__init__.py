"""Inspection of data before training: checks, reports and contact sheets."""

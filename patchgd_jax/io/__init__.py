"""Atomic files and safe text."""

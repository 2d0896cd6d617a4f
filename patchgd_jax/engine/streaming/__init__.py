"""Streamed execution: images stay on the host or on disk, and patches are read when needed."""

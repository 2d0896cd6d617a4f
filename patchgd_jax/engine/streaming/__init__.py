"""Streamed execution: images stay on the host or on disk, patches are read as they are needed."""

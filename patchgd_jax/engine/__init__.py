"""Executors of a run's steps: on one device, on a mesh, streamed, or on stored features."""

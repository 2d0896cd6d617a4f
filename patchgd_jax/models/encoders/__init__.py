"""Encoders: a patch to its latent."""

"""Heads: the latent block Z to logits."""

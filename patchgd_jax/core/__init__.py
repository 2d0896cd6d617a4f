"""The method: patch grid, sampling, latent block Z, gradients and the train step."""

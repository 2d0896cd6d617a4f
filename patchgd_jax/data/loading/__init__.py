"""Loading: order of examples, reading in the background, batches, and bad images."""

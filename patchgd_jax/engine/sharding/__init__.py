"""Device meshes: layouts of batches and parameters, and the sharded train step."""

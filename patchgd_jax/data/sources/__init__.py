"""Sources of examples: files, tensorflow-datasets and PANDA."""

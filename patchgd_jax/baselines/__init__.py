"""Methods that PatchGD is compared with, as steps of the same training loop."""

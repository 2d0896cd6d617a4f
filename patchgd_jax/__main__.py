"""`python -m patchgd_jax` is the `patchgd-jax` command."""

from patchgd_jax.cli.main import run

run()

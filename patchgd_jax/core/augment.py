"""Random changes of single patches on the device: flips, quarter turns, colour jitter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from patchgd_jax.config import AugmentConfig
from patchgd_jax.errors import ConfigError

Augment = Callable[[Array, Array], Array]
"""Patches `[B, k, p, p, C]` and their numbers `int [B, k]` to changed patches of that shape."""

_GREY = (0.299, 0.587, 0.114)
"""Luma of red, green and blue (ITU-R BT.601)."""


def augmentation(
    config: AugmentConfig | None, key: Array, first_image: int | Array = 0
) -> Augment | None:
    """Returns `augment_patches` with an outer step's key, or None if nothing changes."""
    if config is None or not config.active:
        return None
    return partial(augment_patches, key=key, config=config, first_image=first_image)


def augment_patches(
    patches: Array, ids: Array, *, key: Array, config: AugmentConfig, first_image: int | Array = 0
) -> Array:
    """Changes each of the patches `[B, k, p, p, C]` (uint8, or float in [0, 1]) by itself.

    A patch's changes depend on the outer step's key, its id and its image's place in the batch
    only; `first_image` is the first image's. The result is of that shape, and float in [0, 1] if
    colours change. Raises `ConfigError` if the patches are not of images.
    """
    if patches.ndim != 5:
        raise ConfigError(
            f"augmentation is for patches of images, [B, k, p, p, C]; these are "
            f"{list(patches.shape)}; leave it out"
        )

    def one(patch: Array, image: Array, number: Array) -> Array:
        place, colour = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, image), number))
        quarter, down, across = jax.random.randint(place, (3,), 0, jnp.array([4, 2, 2]))
        patch = turn_and_flip(
            patch,
            quarter if config.turns else jnp.zeros_like(quarter),
            (down == 1) & config.flips,
            (across == 1) & config.flips,
        )
        if not config.jitters:
            return patch
        spread = jnp.array([config.brightness, config.contrast, config.saturation])
        factors = 1 + spread * jax.random.uniform(colour, (3,), minval=-1.0)
        return jitter(patch, factors)

    places = first_image + jnp.arange(ids.shape[0])
    images = jnp.broadcast_to(places[:, None], ids.shape)
    return jax.vmap(jax.vmap(one))(patches, images, ids)


def turn_and_flip(patch: Array, quarter: Array, down: Array, across: Array) -> Array:
    """Turns a patch, then flips it.

    Args:
        patch: `[p, p, C]`.
        quarter: `int []`, quarter turns counter-clockwise, as `numpy.rot90`.
        down: `bool []`, whether to turn it upside down.
        across: `bool []`, whether to swap left and right.
    """
    # A quarter turn is a transposition and a flip, so three choices make all eight results.
    patch = jnp.where(quarter % 2 == 1, patch.swapaxes(0, 1), patch)
    down ^= (quarter == 1) | (quarter == 2)
    across ^= (quarter == 2) | (quarter == 3)
    patch = jnp.where(down, patch[::-1], patch)
    return jnp.where(across, patch[:, ::-1], patch)


def jitter(patch: Array, factors: Array) -> Array:
    """Changes brightness, contrast and saturation of a patch `[p, p, C]`, uint8 or float in [0, 1].

    `factors` `float [3]` scale the values, their distance from the patch's mean grey, and that from
    each pixel's grey (three channels only); 1 changes nothing. The result is float in [0, 1].
    """
    if jnp.issubdtype(patch.dtype, jnp.integer):
        patch = patch.astype(jnp.float32) / 255

    def grey(patch: Array) -> Array:
        if patch.shape[-1] != 3:
            return patch.mean(-1, keepdims=True)
        return patch @ jnp.asarray(_GREY, patch.dtype)[:, None]

    brightness, contrast, saturation = factors.astype(patch.dtype)
    patch = jnp.clip(patch * brightness, 0, 1)
    mean = grey(patch).mean()
    patch = jnp.clip(mean + contrast * (patch - mean), 0, 1)
    if patch.shape[-1] == 3:
        pale = grey(patch)
        patch = jnp.clip(pale + saturation * (patch - pale), 0, 1)
    return patch

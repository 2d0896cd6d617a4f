"""Random changes of single patches on the device: flips, quarter turns, colour jitter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from patchgd_jax.config import AugmentConfig
from patchgd_jax.errors import ConfigError

Augment = Callable[[jax.Array, jax.Array], jax.Array]
"""Patches `[B, k, p, p, C]` and their numbers `int [B, k]` to changed patches of that shape."""

_GREY = (0.299, 0.587, 0.114)
"""Luma of red, green and blue (ITU-R BT.601)."""


def augmentation(
    config: AugmentConfig | None, key: jax.Array, first_image: int | jax.Array = 0
) -> Augment | None:
    """Returns the changes of one outer step, or None.

    A patch's changes depend on the key, the image's place in the batch and the patch id only.
    `first_image` is the place of the first image.
    """
    if config is None or not config.active:
        return None
    return partial(augment_patches, key=key, config=config, first_image=first_image)


def augment_patches(
    patches: jax.Array,
    ids: jax.Array,
    *,
    key: jax.Array,
    config: AugmentConfig,
    first_image: int | jax.Array = 0,
) -> jax.Array:
    """Changes each patch by itself; its place in Z stays.

    Args:
        patches: `[B, k, p, p, C]`, uint8 or float in [0, 1].
        ids: `int [B, k]`, patch ids.
        key: PRNG key of the outer step.
        config: what changes and how much.
        first_image: the first image's place in the batch.

    Returns:
        Patches of that shape: of that dtype for flips and turns alone, else float in [0, 1].

    Raises:
        ConfigError: if the patches are not of images.
    """
    if patches.ndim != 5:
        raise ConfigError(
            f"augmentation is for patches of images, [B, k, p, p, C]; these are "
            f"{list(patches.shape)}; leave it out"
        )

    def one(patch: jax.Array, image: jax.Array, number: jax.Array) -> jax.Array:
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


def turn_and_flip(
    patch: jax.Array, quarter: jax.Array, down: jax.Array, across: jax.Array
) -> jax.Array:
    """Turns a patch, then flips it.

    Args:
        patch: `[p, p, C]`.
        quarter: `int []`, quarter turns counter-clockwise, as `numpy.rot90`.
        down: `bool []`, whether to turn it upside down after that.
        across: `bool []`, whether to swap left and right after that.
    """
    # A quarter turn is a transposition and a flip, so three choices make all eight results.
    patch = jnp.where(quarter % 2 == 1, patch.swapaxes(0, 1), patch)
    down ^= (quarter == 1) | (quarter == 2)
    across ^= (quarter == 2) | (quarter == 3)
    patch = jnp.where(down, patch[::-1], patch)
    return jnp.where(across, patch[:, ::-1], patch)


def jitter(patch: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation, in this order.

    Args:
        patch: `[p, p, C]`, uint8 or float in [0, 1].
        factors: `float [3]`: on the values, on their distance from the patch's mean grey, and on
            their distance from each pixel's grey (three channels only). 1 changes nothing.

    Returns:
        `float [p, p, C]` in [0, 1].
    """
    if jnp.issubdtype(patch.dtype, jnp.integer):
        patch = patch.astype(jnp.float32) / 255

    def grey(patch: jax.Array) -> jax.Array:
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

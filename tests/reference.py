"""PatchGD written slowly and plainly in NumPy, sharing no code with the package.

A norm-free model small enough to differentiate by hand: the encoder is `tanh(x W1 + b1) W2`, the
head `softmax(mean over patches of relu(z V1 + c1)  V2 + c2)`. Everything is float64 and loops.
Source of the algorithm: arXiv 2301.13817, Algorithm 1.
"""

from __future__ import annotations

import numpy as np


def grid_shape(height, width, patch, stride):
    rows, y = 1, 0
    while y + patch < height:
        y, rows = y + stride, rows + 1
    cols, x = 1, 0
    while x + patch < width:
        x, cols = x + stride, cols + 1
    return rows, cols


def cut(image, index, patch, stride):
    """The flattened pixels of one patch; pixels outside the image are 0."""
    height, width, channels = image.shape
    _, cols = grid_shape(height, width, patch, stride)
    top, left = (index // cols) * stride, (index % cols) * stride
    out = np.zeros((patch, patch, channels))
    for i in range(patch):
        for j in range(patch):
            if top + i < height and left + j < width:
                out[i, j] = image[top + i, left + j]
    return out.reshape(-1)


def encode(params, x):
    p = params["encoder"]
    hidden = np.tanh(x @ p["w1"] + p["b1"])
    return hidden @ p["w2"], hidden


def encode_backward(params, x, hidden, dz):
    p = params["encoder"]
    dhidden = (p["w2"] @ dz) * (1 - hidden**2)
    return {"w1": np.outer(x, dhidden), "b1": dhidden, "w2": np.outer(hidden, dz)}


def head(params, z_image, label):
    """Loss of one image and gradients of the head's parameters and of each latent."""
    p = params["head"]
    count = len(z_image)
    before = [z @ p["v1"] + p["c1"] for z in z_image]
    active = [np.maximum(b, 0) for b in before]
    pooled = sum(active) / count
    logits = pooled @ p["v2"] + p["c2"]
    odds = np.exp(logits - logits.max())
    odds /= odds.sum()
    loss = -np.log(odds[label])
    dlogits = odds.copy()
    dlogits[label] -= 1
    dpooled = p["v2"] @ dlogits
    grads = {"v2": np.outer(pooled, dlogits), "c2": dlogits}
    grads["v1"], grads["c1"] = np.zeros_like(p["v1"]), np.zeros_like(p["c1"])
    dz = []
    for z, b in zip(z_image, before, strict=True):
        db = dpooled / count * (b > 0)
        grads["v1"] += np.outer(z, db)
        grads["c1"] += db
        dz.append(p["v1"] @ db)
    return loss, grads, dz


def zeros(params):
    return {part: {k: np.zeros_like(v) for k, v in tree.items()} for part, tree in params.items()}


def add(total, part, grads, factor):
    for name, value in grads.items():
        total[part][name] += factor * value


def fill(params, images, patch, stride):
    rows, cols = grid_shape(*images.shape[1:3], patch, stride)
    z = []
    for image in images:
        z.append([encode(params, cut(image, n, patch, stride))[0] for n in range(rows * cols)])
    return z


def gradient(params, images, labels, z, groups, patch, stride):
    """Loss and gradient through the patches `groups[b]`; writes their latents into `z`."""
    batch = len(images)
    saved = {}
    for b in range(batch):
        for n in groups[b]:
            x = cut(images[b], n, patch, stride)
            z[b][n], hidden = encode(params, x)
            saved[b, n] = (x, hidden)
    total, loss_sum = zeros(params), 0.0
    for b in range(batch):
        loss, head_grads, dz = head(params, z[b], labels[b])
        loss_sum += loss / batch
        add(total, "head", head_grads, 1 / batch)
        for n in groups[b]:
            add(total, "encoder", encode_backward(params, *saved[b, n], dz[n]), 1 / batch)
    return loss_sum, total


def outer_step(params, images, labels, groups, *, patch, stride, epsilon, rate):
    """One outer step with plain gradient descent.

    `groups[j][b]` lists the real patches of inner step j. Returns the new parameters, the mean
    loss and the gradients that were applied, one for each update.
    """
    params = {part: dict(tree) for part, tree in params.items()}
    z = fill(params, images, patch, stride)
    losses, applied, total = [], [], zeros(params)
    for j, group in enumerate(groups):
        loss, grads = gradient(params, images, labels, z, group, patch, stride)
        losses.append(loss)
        for part in grads:
            add(total, part, grads[part], 1 / epsilon)
        if (j + 1) % epsilon == 0:
            for part, tree in total.items():
                for name in tree:
                    params[part][name] = params[part][name] - rate * tree[name]
            applied.append(total)
            total = zeros(params)
    return params, np.mean(losses), applied


def whole_image_gradient(params, images, labels, patch, stride):
    """End-to-end: every patch of every image with gradient, all at once."""
    rows, cols = grid_shape(*images.shape[1:3], patch, stride)
    every = [list(range(rows * cols))] * len(images)
    z = [[None] * (rows * cols) for _ in images]
    return gradient(params, images, labels, z, every, patch, stride)

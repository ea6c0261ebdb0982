"""VisionTransformer: patches of an image, pre-norm blocks of attention and an MLP, the mean of the patches, a head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nested_jax.checks import Count, check_fields
from nested_jax.errors import UserError
from nested_jax.numerics import rms_norm, upcast
from nested_jax.typing import Array, Float, PyTree


@dataclass(frozen=True)
class VisionConfig:
    """A vision Transformer. The default is for the 8 x 8 images of scikit-learn's digits."""

    image: tuple[Count, Count, Count] = (8, 8, 1)
    """Rows, columns and channels of an image."""
    patch: Count = 2
    """Rows and columns of a patch; those of an image are multiples."""
    width: Count = 64
    """Model width D."""
    layers: Count = 3
    """Number of blocks L."""
    heads: Count = 4
    """Heads H of attention; D must be a multiple."""
    hidden: Count = 128
    """Hidden width F of the MLPs."""
    classes: Count = 10
    """Number of classes V."""

    def __post_init__(self):
        check_fields(self, "--model.")
        if self.image[0] % self.patch or self.image[1] % self.patch:
            raise UserError(f"--model.image {self.image} is not a multiple of --model.patch {self.patch}: change one")
        if self.width % self.heads:
            raise UserError(f"--model.width {self.width} is not a multiple of --model.heads {self.heads}: change one")


class VisionTransformer(nnx.Module):
    """Classifies images: a call is images (B, rows, columns, channels) -> logits (B, V), float32 or finer.

        x = patches W + position        x <- x + attention(norm x)        x <- x + gelu(norm x up) down
        logits = mean_T(norm x) head

    Attention is over all patches. The weights of all blocks are stacked along a leading axis.

    Args:
        config: see `VisionConfig`.
        rngs: source of the initial weights.

    Raises:
        UserError: images of another shape than the config's.

    >>> model = VisionTransformer(VisionConfig(), rngs=nnx.Rngs(0))
    >>> model(jnp.zeros((3, 8, 8, 1))).shape
    (3, 10)

    Source: Dosovitskiy et al., arXiv 2010.11929, with RMS norms and without a class token.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        D, (rows, columns, channels) = config.width, config.image
        embedding, position, blocks, head = jax.random.split(rngs.params(), 4)
        entries, count = config.patch**2 * channels, rows * columns // config.patch**2
        self.embedding = nnx.Param(jax.random.normal(embedding, (entries, D)) * entries**-0.5)
        self.position = nnx.Param(jax.random.normal(position, (count, D)) * 0.02)
        stacked = jax.vmap(lambda key: _init_block(key, config))(jax.random.split(blocks, config.layers))
        self.blocks = nnx.data(jax.tree.map(nnx.Param, stacked))
        self.norm = nnx.Param(jnp.ones(D))
        self.head = nnx.Param(jax.random.normal(head, (D, config.classes)) / D)

    def __call__(self, images: Float[Array, "B rows columns channels"]) -> Float[Array, "B V"]:
        config = self.config
        if images.ndim != 4 or images.shape[1:] != config.image:
            raise UserError(f"images have shape {list(images.shape)}: give (B, {', '.join(map(str, config.image))})")
        weights = nnx.to_pure_dict(nnx.state(self, nnx.Param))
        x = patches(images, config.patch) @ weights["embedding"] + weights["position"][None]
        block = lambda x, weights: (_block(config.heads, weights, x), None)
        x, _ = jax.lax.scan(block, x, weights["blocks"])
        return upcast(rms_norm(weights["norm"], x).mean(axis=1) @ weights["head"])


def patches(images: Float[Array, "B rows columns channels"], size: int) -> Float[Array, "B T entries"]:
    """Squares of images, row by row, each flattened.

    >>> patches(jnp.arange(8).reshape(1, 2, 4, 1), 2).tolist()
    [[[0, 1, 4, 5], [2, 3, 6, 7]]]
    """
    B, rows, columns, channels = images.shape
    x = images.reshape(B, rows // size, size, columns // size, size, channels)
    return x.swapaxes(2, 3).reshape(B, -1, size**2 * channels)


def _init_block(key: Array, config: VisionConfig) -> dict[str, Any]:
    D, F = config.width, config.hidden
    shapes = {"project": (D, 3 * D), "out": (D, D), "up": (D, F), "down": (F, D)}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    weights = {name: jax.random.normal(keys[name], shape) * shape[0] ** -0.5 for name, shape in shapes.items()}
    return weights | {"attention_norm": jnp.ones(D), "mlp_norm": jnp.ones(D)}


def _block(heads: int, weights: PyTree, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    B, T, D = x.shape
    project = rms_norm(weights["attention_norm"], x) @ weights["project"]
    q, k, v = jnp.split(project.reshape(B, T, 3 * heads, -1), 3, axis=2)
    scores = upcast(jnp.einsum("BTHK,BSHK->BHTS", q, k)) * q.shape[-1] ** -0.5
    y = jnp.einsum("BHTS,BSHK->BTHK", jax.nn.softmax(scores).astype(x.dtype), v)
    x = x + y.reshape(B, T, D) @ weights["out"]
    return x + jax.nn.gelu(rms_norm(weights["mlp_norm"], x) @ weights["up"]) @ weights["down"]

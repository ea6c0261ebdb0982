"""VisionTransformer: equation, shapes, first loss, independent rows, gradients, errors."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scripts import load

from nested_jax.errors import UserError

module = load("vision_transformer", "optimizers")
VisionConfig, VisionTransformer = module.VisionConfig, module.VisionTransformer
SMALL = VisionConfig(image=(4, 6, 3), patch=2, width=8, layers=2, heads=2, hidden=5, classes=7)


def model():
    """A model with random weights in float64, also those of norms."""
    net, shapes = nnx.split(nnx.eval_shape(lambda: VisionTransformer(SMALL, rngs=nnx.Rngs(0))), nnx.Param)
    draw = np.random.default_rng(0)
    return nnx.merge(net, jax.tree.map(lambda w: jnp.asarray(draw.normal(size=w.shape) / 2), shapes))


def images(batch, config=SMALL, seed=2):
    return jax.random.normal(jax.random.key(seed), (batch, *config.image))


def reference(config, weights, image):
    """Logits of one image, in NumPy: patch by patch, head by head, query by query."""
    norm = lambda w, x: x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * w
    gelu = lambda x: x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    P, K = config.patch, config.width // config.heads
    corners = [(i, j) for i in range(0, config.image[0], P) for j in range(0, config.image[1], P)]
    squares = np.stack([image[i : i + P, j : j + P].reshape(-1) for i, j in corners])
    x = squares @ weights["embedding"] + weights["position"]
    for layer in range(config.layers):
        w = {name: leaf[layer] for name, leaf in weights["blocks"].items()}
        z = norm(w["attention_norm"], x) @ w["project"]
        y = np.zeros_like(x)
        for h in range(config.heads):
            q, k, v = (z[:, part * config.width :][:, h * K : (h + 1) * K] for part in range(3))
            for t in range(len(x)):
                scores = np.exp(k @ q[t] / K**0.5)
                y[t, h * K : (h + 1) * K] = scores @ v / scores.sum()
        x = x + y @ w["out"]
        x = x + gelu(norm(w["mlp_norm"], x) @ w["up"]) @ w["down"]
    return norm(weights["norm"], x).mean(0) @ weights["head"]


def test_equals_the_reference(x64):
    made, batch = model(), images(3)
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(made, nnx.Param)))
    wanted = np.stack([reference(SMALL, weights, np.asarray(image)) for image in batch])
    assert wanted.std() > 0.1
    np.testing.assert_allclose(jax.jit(made.__call__)(batch), wanted, rtol=1e-10)


def test_shapes_types_and_first_loss():
    """The first loss of the default is within 5 % of ln V; the second call does not compile."""
    made = VisionTransformer(VisionConfig(), rngs=nnx.Rngs(0))
    call = jax.jit(made.__call__)
    logits = call(images(64, VisionConfig()))
    call(images(64, VisionConfig(), seed=3))
    assert call._cache_size() == 1
    assert logits.shape == (64, 10) and logits.dtype == jnp.float32
    labels = jax.random.randint(jax.random.key(1), (64,), 0, 10)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    assert abs(loss / math.log(10) - 1) < 0.05


def test_rows_are_independent_and_every_patch_matters(x64):
    """Permuted images have permuted logits; every entry of an image and the order of its patches matter."""
    made, batch = model(), images(4)
    call = jax.jit(made.__call__)
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(call(batch[order]), call(batch)[order], rtol=1e-10)
    np.testing.assert_allclose(call(batch[:1]), call(batch)[:1], rtol=1e-10)
    slopes = jax.jit(jax.grad(lambda x: made(x)[0, 0]))(batch)
    assert (slopes[0] != 0).all() and (slopes[1:] == 0).all()
    swapped = jnp.concatenate([batch[:, :, 2:4], batch[:, :, :2], batch[:, :, 4:]], axis=2)
    assert not np.allclose(call(swapped), call(batch), atol=1e-3)


def test_gradients_are_finite():
    """Also at images of zeros; at usual images every weight has a non-zero gradient."""
    net, weights = nnx.split(VisionTransformer(SMALL, rngs=nnx.Rngs(0)), nnx.Param)
    loss = lambda weights, x: -jax.nn.log_softmax(nnx.merge(net, weights)(x))[:, 0].mean()
    slope = jax.jit(jax.grad(loss))
    for scale in (0.0, 1.0, 1e4):
        slopes = jax.tree.leaves(slope(weights, scale * images(4)))
        assert all(jnp.isfinite(x).all() for x in slopes)
        assert scale != 1 or all((x != 0).any() for x in slopes)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"image": (4, 6)}, r"--model.image \(4, 6\): give a tuple of 3, each a whole number of at least 1"),
        ({"patch": 3}, r"--model.image \(4, 6, 3\) is not a multiple of --model.patch 3: change one"),
        ({"heads": 3}, "--model.width 8 is not a multiple of --model.heads 3: change one"),
        ({"layers": 0}, "--model.layers 0: give a whole number of at least 1"),
    ],
)
def test_invalid_configs_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        VisionConfig(**(vars(SMALL) | fields))


def test_images_of_another_shape_are_refused():
    made = VisionTransformer(SMALL, rngs=nnx.Rngs(0))
    for shape in ((4, 6, 3), (1, 6, 4, 3), (1, 4, 6, 1)):
        with pytest.raises(UserError, match=r"give \(B, 4, 6, 3\)"):
            made(jnp.zeros(shape))

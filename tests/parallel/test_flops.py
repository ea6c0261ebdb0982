"""Operations against hand counts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from nested_jax import CMSConfig, preset
from nested_jax.models.block import sequence_layer
from nested_jax.models.language_model import apply, init_state, init_weights
from nested_jax.parallel.flops import count, flops, trace
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import batch_shapes, init_train_state
from nested_jax.train.step import train_step

B, T = 2, 64


def forward(model):
    weights = jax.eval_shape(lambda: init_weights(model, jax.random.key(0)))
    run = lambda weights, tokens: apply(model, weights, tokens, init_state(model, weights, B, max_length=T))[0].sum()
    return run, weights, jax.ShapeDtypeStruct((B, T), jnp.int32)


def test_a_transformer():
    """Four projections, three matrices of the feed-forward layer, scores and values of all pairs, the head: thrice for a
    gradient. Norms are products too, of less than a hundredth."""
    model = preset("tiny-transformer")
    run, *given = forward(model)
    D, (F,), L, V = model.width, model.cms.hidden, model.layers, model.vocabulary
    by_hand = L * (2 * B * T * (4 * D * D + 3 * D * F) + 4 * B * T * T * D) + 2 * B * T * D * V
    assert 1 < flops(run, *given) / by_hand < 1.01
    assert 1 < flops(jax.grad(run), *given) / (3 * by_hand) < 1.01


def test_chunks_of_hope():
    """A memory's layer costs as much for every chunk; beside it stand its output, the feed-forward layer and the head."""
    model = dataclasses.replace(preset("tiny-hope"), cms=CMSConfig(hidden=(64,)))
    D, L, V, C = model.width, model.layers, model.vocabulary, model.chunk
    run, weights, _ = forward(model)
    two, four = (flops(run, weights, jax.ShapeDtypeStruct((B, n * C), jnp.int32)) for n in (2, 4))
    assert four == 2 * two
    layer = sequence_layer(model)
    own = jax.eval_shape(lambda: layer.init_weights(jax.random.key(0)))
    read = lambda own, x: layer(own, layer.init_state(own, B), x, 0)[1]
    memories = flops(read, own, jax.ShapeDtypeStruct((B, 2 * C, D), jnp.float32))
    by_hand = L * memories + 2 * B * 2 * C * (L * 2 * D * 64 + D * V)
    assert 1 <= two / by_hand < 1.01 and L * memories > 0.9 * two


def test_products_in_tiles():
    """Of a batch of five: 20 rows by 3 columns and sums over 7 are 24 by 128 by 128; whole tiles are as they are."""
    left, right = jnp.ones((5, 3, 7)), jnp.ones((5, 7, 20))
    assert flops(jnp.matmul, left, right) == 2 * 5 * 3 * 7 * 20
    assert flops(jnp.matmul, left, right, padded=True) == 2 * 5 * 24 * 128 * 128
    whole = jnp.ones((8, 128)), jnp.ones((128, 256))
    assert flops(jnp.matmul, *whole, padded=True) == 2 * 256 * 128 * 128  # eight rows are the columns then
    scaled, inner = "bi,bij->bij", "bi,bi->b"
    for product, right in ((scaled, jnp.ones((5, 7, 9))), (inner, jnp.ones((5, 7)))):  # by the vector unit
        assert flops(partial(jnp.einsum, product), jnp.ones((5, 7)), right, padded=True) == 0
    square = jnp.ones((256, 128)), whole[1]
    assert flops(jnp.matmul, *square, padded=True) == flops(jnp.matmul, *square)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["140m-hope", "140m-transformer"])
def test_published_sizes_fill_their_tiles(name):
    """Of a training step; with products that scale numbers counted as the matrix unit's they were 52 times as many."""
    config = TrainConfig.from_preset(name, batch_size=1, window=2048)
    state = jax.eval_shape(lambda: init_train_state(config))
    traced = trace(train_step(config.model, optimizer(config)), state, batch_shapes(config))
    assert 1 <= count(traced, True) / count(traced, False) < 3


def test_a_solve_counts_once_and_passes_of_its_precision_in_tiles():
    """A triangular solve's derivatives stand beside it and do not run; full precision takes six bfloat16 passes."""
    matrix, right = jnp.tril(jnp.ones((128, 128)), -1), jnp.ones((128, 128))
    one = 2 * 128**3
    alone = flops(
        lambda a, b: jax.lax.custom_linear_solve(lambda x: a @ x, b, lambda _, b: a @ (a @ b), lambda _, b: b), matrix, right
    )
    assert alone == 2 * one
    for precision, passes in (("default", 1), ("high", 3), ("highest", 6)):
        product = partial(jnp.matmul, precision=precision)
        assert flops(product, matrix, right, padded=True) == passes * one == passes * flops(product, matrix, right)
    halves = matrix.astype(jnp.bfloat16)
    assert flops(partial(jnp.matmul, precision="highest"), halves, halves, padded=True) == one


def test_a_branch_a_loop_and_a_convolution():
    x = jnp.ones((4, 4))
    both = lambda x, on: jax.lax.cond(on, lambda x: x @ x @ x, lambda x: x @ x, x)
    assert flops(both, x, True) == 2 * 2 * 4**3
    assert flops(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: x @ x, x), x) == 5 * 2 * 4**3
    assert flops(jax.vmap(lambda x: x @ x), jnp.ones((3, 4, 4))) == 3 * 2 * 4**3
    image, kernel = jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 2, 2))
    assert flops(lambda x, k: jax.lax.conv(x, k, (1, 1), "VALID"), image, kernel) == 2 * (2 * 5 * 7 * 7) * (3 * 2 * 2)

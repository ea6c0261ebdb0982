"""What linear layers are surprised by: the inputs that an optimizer gets, and the summary that a reader gets."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare import cases
from rich.console import Console
from test_step import batches, make, to_float64
from tiny_run import rows, small_model

from nested_jax.surprise import local_surprise
from nested_jax.train import state as states
from nested_jax.train.config import difference
from nested_jax.train.layers import layer_surprise, section, table
from nested_jax.train.optimizer import MATRICES, WithInputs
from nested_jax.train.step import cross_entropy, train_step

TWO_LAYERS = small_model(layers=2)
KERNELS = [f"blocks/cms/level1/{part}" for part in ("up", "gate", "down")] + [
    f"blocks/mixer/{p}" for p in ("query", "key", "value", "out")
]


def remembering(matrices):
    """A rule whose state is the inputs it was last given, and which leaves parameters as they are."""
    still = lambda gradients: jax.tree.map(jnp.zeros_like, gradients)
    return WithInputs(lambda params: (), lambda g, state, params, *, inputs: (still(g), inputs), matrices)


def test_an_optimizer_gets_the_inputs_of_its_matrices_at_the_targets(x64):
    """Their mean outer product over all slots is that of the slots that have a target, over the whole batch."""
    config, net, _ = make(model=TWO_LAYERS)
    params, batch = to_float64(states.init_params(config.model, 0)), next(batches(config))
    batch = batch._replace(weights=batch.weights.astype(float))
    state = states.init_train_state(config)._replace(params=params, optimizer=())
    after, _ = jax.jit(train_step(net, remembering(MATRICES), accumulate=2))(state, batch)
    given = after.optimizer
    assert set(given) == {*KERNELS}
    loss = lambda params, batch: cross_entropy(net, params, None, batch)[0]
    pairs = jax.jit(lambda p, b: local_surprise(loss, p, b))(params, batch)
    assert 0 < batch.weights.sum() < batch.weights.size
    for path, x in given.items():
        for layer in range(2):
            own = np.asarray(pairs[path].inputs[layer]).reshape(-1, x.shape[-1])
            expected = sum(w * np.outer(row, row) for w, row in zip(batch.weights.reshape(-1), own, strict=True))
            flat = x[layer].reshape(-1, x.shape[-1])
            np.testing.assert_allclose(flat.T @ flat / len(flat), expected / batch.weights.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_layers_that_learn_in_context_have_inputs_of_zeros():
    config, net, _ = make("tiny-hope-attention", model=small_model("tiny-hope-attention", layers=2))
    state = states.init_train_state(config)._replace(optimizer=())
    after, _ = jax.jit(train_step(net, remembering(MATRICES)))(state, next(batches(config)))
    for level in (1, 2):
        x = after.optimizer[f"blocks/cms/level{level}/up"]
        assert x.shape == (2, 1, 4, 32, 16) and jnp.any(x[0] != 0) and jnp.all(x[1] == 0)
    assert jnp.all(jnp.any(after.optimizer["blocks/mixer/query"] != 0, axis=(1, 2, 3, 4)))


@pytest.mark.parametrize(
    "fields", cases([{"accumulate": 2}, {"carry": True}], [{"accumulate": 2}]), ids=["accumulate", "carry"]
)
def test_delta_gradient_descent_in_pieces_makes_the_same_update(x64, fields):
    moved = []
    for given in ({}, fields):
        config, net, step = make(optimizer="delta-gradient-descent", model=TWO_LAYERS, **given)
        state = states.init_train_state(config)
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
        after, _ = jax.jit(step)(state, next(batches(config)))
        moved.append(after.params["blocks"]["cms"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), *moved)


def test_the_summary_is_of_the_pairs_and_the_gradient():
    config, net, _ = make(model=TWO_LAYERS, carry=True)
    (_, params, _, fast), batch = states.init_train_state(config), next(batches(config))
    measure = jax.jit(layer_surprise(net))
    numbers, carried = (measure(params, state, batch) for state in (None, jax.tree.map(lambda x: x[0], fast)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), numbers, carried)
    layers = {f"{path}[{i}]" for path in KERNELS for i in range(2)} | {"head"}
    assert set(numbers) == {f"{kind}/{layer}" for kind in ("inputs", "surprise", "share") for layer in layers}
    loss = lambda params, batch: cross_entropy(net, params, None, batch)[0]
    both = jax.jit(lambda *given: (local_surprise(loss, *given), jax.grad(loss)(*given)))
    pairs, gradient = both(params, batch)
    total = sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)) ** 0.5
    up = gradient["blocks"]["cms"]["level1"]["up"]
    for layer, pair, own in (
        ("blocks/cms/level1/up[1]", jax.tree.map(lambda a: a[1], pairs["blocks/cms/level1/up"]), up[1]),
        ("head", pairs["head"], gradient["head"]),
    ):
        root = lambda a: float(np.sqrt(np.mean(np.square(a))))
        expected = [root(pair.inputs), root(pair.surprise), float(jnp.linalg.norm(own)) / total]
        got = [numbers[f"{kind}/{layer}"] for kind in ("inputs", "surprise", "share")]
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert 0 < sum(share**2 for name, share in numbers.items() if name.startswith("share/")) < 1


def test_the_most_surprised_layers_come_first():
    numbers = {f"{kind}/{i}": float(i % 7) + i / 100 for i in range(20) for kind in ("inputs", "surprise", "share")}
    lines = section(numbers).splitlines()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")][1:]
    assert shown == ["13", "6", "19", "12", "5", "18", "11", "4", "17", "10", "3", "16"]
    assert "12 most surprised of 20" in lines[0] and table(numbers).row_count == 12
    named = table({f"{kind}/blocks/cms/level1/down[23]": 1.0 for kind in ("inputs", "surprise", "share")})
    console = Console(file=io.StringIO(), width=80)
    console.print(named)
    assert "blocks/cms/level1/down[23]" in console.file.getvalue() and "surprise, RMS" in console.file.getvalue()
    assert section({"heldout_bits_per_byte": 3.0}) == ""


@pytest.mark.slow
def test_showing_surprise_changes_nothing_else(small, quiet):
    """The same state to the bit and the same rows, but for the numbers; the table and the section; stopped and resumed."""
    plain, shown = small("plain", model=TWO_LAYERS), small("shown", model=TWO_LAYERS, show_surprise=True)
    (state, said), (same, said_more) = quiet(plain), quiet(shown)
    jax.tree.map(np.testing.assert_array_equal, state, same)
    surprise = lambda row: {name: value for name, value in row.items() if "/" in name}
    assert [{k: v for k, v in row.items() if "/" not in k} for row in rows(shown)] == rows(plain)
    measured = [row for row in rows(shown) if surprise(row)]
    assert [row["step"] for row in measured] == [0, 3, 6] and all("heldout_bits_per_byte" in row for row in measured)
    assert all(len(surprise(row)) == 3 * 15 and np.isfinite(list(row.values())).all() for row in measured)
    assert said_more.count("surprise, RMS") == 3 and "surprise, RMS" not in said
    report, other = (Path(config.run_dir, "report.md").read_text() for config in (shown, plain))
    assert "| blocks/mixer/out[1] |" in report and "surprise, RMS" not in other and "--show-surprise" in report
    assert difference(plain, dataclasses.replace(plain, show_surprise=True)) is None
    longer = small("plain", model=TWO_LAYERS, show_surprise=True, steps=7)
    quiet(longer)
    assert surprise(rows(longer)[-1]) and not any(map(surprise, rows(longer)[:-1]))

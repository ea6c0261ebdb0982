"""The slowest level's state: parameters, the optimizer's memory of their gradients, and the fast state carried along."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from nested_jax.data import Batch
from nested_jax.errors import UserError
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import init_state, init_weights
from nested_jax.parallel import processes, rules
from nested_jax.parallel.mesh import Divided, MeshShape, choose, make_mesh, slices_of
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.typing import Array, Int, PyTree


class TrainState(NamedTuple):
    """What one update turns into the next, and what a checkpoint holds."""

    step: Int[Array, ""]  # updates made
    params: PyTree  # nested dicts
    optimizer: PyTree  # optax's state
    fast: PyTree | None  # with `carry`: the model's fast state, a leading axis for the pieces of a batch


def init_params(model: ModelConfig, seed: int) -> PyTree:
    """Fresh parameters of a model: those of `LanguageModel(model, rngs=nnx.Rngs(seed))`."""
    return init_weights(model, nnx.Rngs(seed).params())


def init_train_state(config: TrainConfig, params: PyTree | None = None) -> TrainState:
    """The state before the first update. `jax.eval_shape` of it gives shapes only; jit it for speed.

    Args:
        config: of the run.
        params: weights to start from; None: fresh ones.
    """
    weights: Any = init_params(config.model, config.seed) if params is None else params
    fast = None
    if config.carry:
        piece = init_state(config.model, weights, config.batch_size // config.accumulate, max_length=config.window)
        fast = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.accumulate, *x.shape)), piece)
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer(config).init(weights), fast)


def batch_shapes(config: TrainConfig) -> Any:
    """The `Batch` of an update, of shapes and types alone."""
    slots = lambda dtype: jax.ShapeDtypeStruct((config.batch_size, config.window), dtype)
    return Batch(*map(slots, (np.int32, np.int32, np.float32, np.bool_)))  # pyright: ignore[reportArgumentType]


class Places(NamedTuple):
    """Where a run's arrays lie."""

    shape: MeshShape
    state: TrainState
    """A sharding for each leaf."""
    batch: Sharding
    """Of the arrays of a batch."""
    rows: Sequence[int]
    """Rows of a batch that this process reads."""
    counted: Sequence[int]
    """Those of them that no process before it reads."""


def places_of(mesh: Mesh | None, state: TrainState, batch_size: int) -> Places:
    """Where a state, or its shapes, and batches lie: on a mesh by the rules of `parallel.rules`; without one on one device.

    Raises:
        UserError: as `parallel.rules.state_shardings`.
    """
    if mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        places = MeshShape(), jax.tree.map(lambda _: device, state), device
    else:
        places = MeshShape(*mesh.devices.shape), rules.state_shardings(mesh, state), rules.row_sharding(mesh)
    return Places(*places, *processes.rows_of(places[-1], batch_size))


def open_mesh(mesh: str | None, divided: Divided) -> Mesh | None:
    """The mesh that a run is laid on; None for one device.

    Args:
        mesh: of a flag; None: as `parallel.mesh.choose`.
        divided: what it divides.

    Raises:
        UserError: the mesh is not of the devices that there are, or does not divide that, or leaves out devices where there
            are several processes.
    """
    devices = jax.device_count()
    if devices == 1 and mesh is None:
        return None
    shape = choose(mesh, devices, divided, slices=slices_of(jax.devices()))
    if math.prod(shape) < devices and jax.process_count() > 1:
        fault = f"--mesh {shape} has {math.prod(shape)} of the {devices} devices of {jax.process_count()} processes"
        raise UserError(f"{fault}: give a mesh of all of them, or a --batch-size that they divide")
    return make_mesh(shape) if math.prod(shape) > 1 else None


def divided(config: TrainConfig) -> Divided:
    """What the axes of a run's mesh divide."""
    return divided_by_reader(config.model, config.batch_size // config.accumulate, config.window)


def divided_by_reader(model: ModelConfig, rows: int, tokens: int = 1) -> Divided:
    """What the axes of a mesh divide on which rows are read; 1: of any number of tokens."""
    return Divided(rows, model.width, (model.heads, *model.cms.hidden, model.vocabulary), tokens)


def size_of(tree: PyTree) -> int:
    """Bytes of the leaves of a tree, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shapes_of(what: str, make: Callable[[], PyTree]) -> PyTree:
    """The shapes of what a function makes. Raises UserError where the machines have no room for them; none is allocated.

    >>> shapes_of("a model", lambda: jnp.zeros((10**9, 10**9)))
    Traceback (most recent call last):
    nested_jax.errors.UserError: a model needs 4,000,000,000 GB, more than this machine has: give a smaller one
    """
    try:
        shapes = jax.eval_shape(make)
    except UserError:
        raise
    except (OverflowError, TypeError, ValueError) as error:  # what JAX says of sizes that it cannot count
        raise UserError(f"{what} has sizes that no model has: give a smaller one") from error
    assert_fits(what, size_of(shapes) // jax.process_count())
    return shapes


def assert_fits(what: str, *sizes: int) -> None:
    """Raises UserError where so many bytes are more than the machine's memory: before any of them is allocated.

    >>> assert_fits("a window of 10", 10**15, 10**15)
    Traceback (most recent call last):
    nested_jax.errors.UserError: a window of 10 needs 2,000,000 GB, more than this machine has: give a smaller one
    """
    if sum(sizes) > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise UserError(f"{what} needs {sum(sizes) / 1e9:,.0f} GB, more than this machine has: give a smaller one")

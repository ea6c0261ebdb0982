"""describe: the paper's worked examples, what is derived from an update, what levels say of themselves, the renderings."""

import ast
import dataclasses
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from flax import nnx
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Line

import nested_jax
from nested_jax import CMSConfig, Description, LanguageModel, Level, ModelConfig, describe, nest, optim, preset, run
from nested_jax.cli import main
from nested_jax.errors import UserError
from nested_jax.memory.attention import Attention
from nested_jax.memory.deep import Rule, boundary_weights
from nested_jax.memory.linear import LinearMemory
from nested_jax.memory.self_modifying import SelfModifyingTitans
from nested_jax.memory.titans import Titans
from nested_jax.meta.bilevel import descent
from nested_jax.picture import Component, Picture
from nested_jax.picture.component import closure
from nested_jax.train.config import Optimizer, TrainConfig
from nested_jax.train.folder import write_config
from nested_jax.train.optimizer import optimizer

MLP = {"up": jnp.ones((6, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 6))}
MATRICES = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 6))}
LINEAR = LinearMemory(8, 2, "linear", chunk=16)
SMALL = ModelConfig(vocabulary=11, width=8, layers=2, heads=2, chunk=4, memory_hidden=3)


def rows(picture):
    return {c.name: c for c in picture.components}


@pytest.mark.parametrize(
    ("system", "levels"),
    [
        ((MLP, optax.sgd(0.1)), 1),
        ((MLP, optax.sgd(0.1, momentum=0.9)), 2),
        ((MLP, optim.momentum(0.1)), 2),
        ((nnx.Linear(3, 4, rngs=nnx.Rngs(0)), optim.momentum(0.1, nesterov=True)), 2),
        ((LINEAR, optax.sgd(0.1)), 2),
        ((LINEAR, optax.sgd(0.1, momentum=0.9)), 3),
        ((dataclasses.replace(SMALL, mixer="linear"), optax.sgd(0.1)), 2),
        ((dataclasses.replace(SMALL, mixer="linear"), optim.momentum(0.1)), 3),
        ((MLP, optax.adam(0.1)), 2),
        ((MLP, optim.adam_memory(0.1)), 2),
        ((MLP, optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-3, 5, 99))), 2),
        ((MLP, optax.contrib.muon(0.1)), 3),
        ((MLP, optim.nonlinear_momentum(0.1)), 3),
        ((MATRICES, optim.nonlinear_momentum(0.1, lambda x: optim.newton_schulz(x, form="gradient"), on="leaves")), 3),
        (optim.nonlinear_momentum(0.1, jnp.sign, on="leaves"), 2),
        ((MLP, optim.preconditioned_momentum(0.1)), 3),
        ((MLP, optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16)), 2),
        ((MLP, optax.chain(optax.trace(0.9), optax.trace(0.5), optax.scale(-0.1))), 3),
        ((LINEAR, LINEAR, optax.sgd(0.1)), 2),
        (({"a": jnp.ones(3)}, LINEAR, optax.sgd(0.1)), 2),
        ((jnp.ones((3, 2)), optax.contrib.muon(0.1)), 3),
        (MLP, 1),
        (optax.sgd(0.1), 1),
    ],
)
def test_worked_examples(system, levels):
    """Spec: the paper's systems, and what follows from its Definition 2 for a few more."""
    assert describe(system).levels == levels


@pytest.mark.parametrize("rule", [optax.adam(0.1), optim.adam_memory(0.1), optax.inject_hyperparams(optax.adam)(0.1)])
def test_adams_moments_share_a_level_and_say_what_they_minimise(rule):
    first, second, weights = describe((MLP, rule)).components
    assert first.level == second.level == 1 and weights.level == 2
    assert (first.objective, first.rule) == ("-<m, g> + 0.5 |m|^2", "m <- 0.9 m + 0.1 g")
    assert (second.objective, second.rule) == ("-<m, g^2> + 0.5 |m|^2", "m <- 0.999 m + 0.001 g^2")
    assert set(weights.needs) == {first.name, second.name}


@pytest.mark.parametrize(("rule", "steps"), [(optax.contrib.muon(0.1, ns_steps=4), 4), (optim.nonlinear_momentum(0.1), 5)])
def test_muons_iterations_are_a_level_with_their_objective(rule, steps):
    loop, *memories, weights = describe((MLP, rule)).components
    assert (loop.frequency, loop.objective) == (steps, "1/4 |O^T O - I|^2")
    (memory,) = [c for c in memories if c.name in loop.needs]
    assert memory.rule == "m <- 0.95 m + 0.05 g" and loop.name in weights.needs and memory.name not in weights.needs
    assert memory.state_bytes == 4 * 96


def test_m3_has_two_frequencies_its_copies_and_gathered_sums_are_no_memories():
    found = rows(describe((MATRICES, optim.m3(0.1, slow_period=4, steps=3))))
    loop = lambda name: found[f"orthogonalisation of {name} (M3)"]
    assert found["fast (M3)"].frequency == found["second (M3)"].frequency == found["parameters"].frequency == 1
    assert found["slow (M3)"].frequency == 1 / 4 and loop("slow").frequency == 3 / 4 and loop("fast").frequency == 3
    assert "of 4 steps" in found["slow (M3)"].context
    assert [c.level for c in (loop("fast"), found["fast (M3)"], found["parameters"], loop("slow"), found["slow (M3)"])] == [
        1, 2, 3, 4, 5,
    ]  # fmt: skip
    assert len(found) == 6
    assert sum(c.state_bytes or 0 for c in found.values() if not c.parameters) == 5 * 4 * 96


def test_periods_are_observed():
    rule = optim.continuum(0.1, {"a": 1, "b": 6}, {"up": "a", "bias": "b", "down": "b"}, inner=optax.trace(0.5))
    found = rows(describe((MLP, rule)))
    assert {name: c.frequency for name, c in found.items()} == {
        "trace (Trace), a": 1, "parameters, 1 a step": 1, "trace (Trace), b": 1 / 6, "parameters, 1/6 a step": 1 / 6,
    }  # fmt: skip
    assert found["parameters, 1 a step"].parameters == 48
    rare = describe((MLP, optim.continuum(0.1, 150))).components
    assert all(c.frequency == 1 / 150 for c in rare)
    for steps in (1, 3):
        memory, weights = describe((MLP, optax.MultiSteps(optax.sgd(0.1, 0.9), steps))).components
        assert memory.frequency == weights.frequency == 1 / steps
        (weights,) = describe((MLP, optax.MultiSteps(optax.sgd(0.1), steps))).components
        assert weights.frequency == 1 / steps
    frozen = optax.partition({"a": optax.sgd(0.1), "b": optax.set_to_zero()}, {"up": "a", "bias": "b", "down": "a"})
    found = rows(describe((MLP, frozen)))
    assert found["parameters, frozen"].frequency == 0 and found["parameters, frozen"].parameters == 8


def test_objectives_that_cannot_be_derived_are_said_by_the_states():
    objective = lambda rule: describe((MLP, rule)).components[0].objective
    assert "u^T m" in objective(optim.delta_momentum(0.1))
    assert "MLP" in objective(optim.deep_momentum(0.1))
    assert "|M g - P|^2" in objective(optim.adagrad_memory(0.1, "full"))
    assert objective(optim.feature_momentum(0.1)) == "-<m, phi(g)> + decay"
    with pytest.raises(UserError, match="inputs are missing.*extra="):
        describe((MLP, optim.delta_gradient_descent(0.1)))
    with pytest.raises(UserError, match="value_fn.*extra="):
        describe((MLP, optax.lbfgs(0.1)))


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (None, "W <- W - eta g"),  # without inputs it is gradient descent
        (optax.sgd(0.1), "W <- W - eta g"),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), "W <- W - eta g, decays"),
        (optax.adamw(0.1), "adds what comes of mu (Adam) and nu (Adam), decays"),
    ],
)
def test_the_delta_rule_is_said_of_the_weights_that_it_moves(others, said):
    rule = optim.delta_gradient_descent(0.1)
    if others:
        rule = optax.partition({"delta": rule, "others": others}, {"up": "delta", "bias": "others", "down": "others"})
    extra = lambda params: {"inputs": {"up": jnp.ones((5, params["up"].shape[0]))}}
    weights = {c.parameters: c for c in describe((MLP, rule), extra=extra).components if c.parameters}
    assert weights[48].objective == "1/2 |W x - u|^2, u = -surprise" and "proximal" in weights[48].rule
    assert (weights[8 + 48].objective, weights[8 + 48].rule) == ("the loss L", said)


def with_memory(emit):
    """A rule with a memory m <- 0.9 m + g, kept where g is finite, that emits a function of the new m and g."""

    def update(updates, state, params=None):
        new = jax.tree.map(lambda m, g: 0.9 * m + g, state, updates)
        kept = jax.tree.map(lambda a, m, g: jnp.where(jnp.isfinite(g).all(), a, m), new, state, updates)
        return jax.tree.map(emit, new, updates), kept

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


@pytest.mark.parametrize(
    ("emit", "levels"),
    [
        (lambda m, g: -m, 2),
        (lambda m, g: -g, 1),
        (lambda m, g: jax.lax.fori_loop(0, 3, lambda _, sum: sum - m, jnp.zeros_like(m)), 2),  # it starts from nothing
        (lambda m, g: jax.lax.while_loop(lambda c: (c[0] < 9 + m).any(), lambda c: (c[0] + 1, 0.9 * c[1]), (0.0, g))[1], 3),
        (lambda m, g: jax.lax.scan(lambda sum, row: (sum - row.sum(), None), m, g.reshape(2, -1))[0], 2),  # reads gradients
        (lambda m, g: jax.lax.scan(lambda x, factor: (x * factor, None), m, jnp.ones(3))[0], 3),
        (lambda m, g: jax.lax.fori_loop(0, 3, lambda _, x: 0.9 * x, m), 3),
        (lambda m, g: (jax.lax.fori_loop(0, 3, lambda _, x: 0.9 * x, m), -m)[1], 2),  # nothing reads it
        (jax.jit(lambda m, g: jax.checkpoint(jnp.sin)(m)), 2),
        (jax.jit(lambda m, g: jax.nn.relu(m)), 2),
        (lambda m, g: jax.lax.scan(lambda sum, x: (sum + x * m, None), jnp.zeros(m.shape, jnp.float32), jnp.ones(3))[0], 2),
        (lambda m, g: jax.lax.fori_loop(0, 3, lambda _, x: x * jnp.float32(0.9), m.astype(jnp.float32)), 3),
        (lambda m, g: m.at[jnp.array([0, 1])].add(g[:2]) + 1e-9 * jax.random.normal(jax.random.key(0), m.shape), 2),
        (lambda m, g: jax.lax.cond(g.sum() > 0, lambda x: x * jnp.float32(2), lambda x: x, m), 2),
    ],
)
def test_what_is_read_through_branches_and_loops(emit, levels):
    picture = describe((MATRICES, with_memory(emit)))
    assert picture.levels == levels
    (memory,) = [c for c in picture.components if c.name == "memory"]
    assert memory.rule == "m <- 0.9 m + g"
    assert not any("orthogonal" in c.name or "O^T O" in c.objective for c in picture.components)


def test_what_never_moves_shares_a_level():
    frozen = [Component("a", 0, "step"), Component("b", 0, "token", needs=("a",)), Component("c", 1, "token")]
    assert [(c.name, c.level) for c in Picture.of(frozen).components] == [("c", 1), ("a", 2), ("b", 2)]


def test_clipping_does_not_hide_a_memory():
    memory, _ = describe((MLP, optax.chain(optax.clip_by_global_norm(1.0), optax.trace(0.9)))).components
    assert memory.rule == "m <- 0.9 m + g"


def test_no_law_is_claimed_that_does_not_hold():
    params = {"a": jnp.ones(3)}
    update = lambda g, m, _=None: (m, jax.tree.map(lambda m, g: m / (1 + jnp.sum(g**2)) + g, m, g))  # forgets by surprise
    rule = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)
    memory = next(c for c in describe((params, rule)).components if c.name == "memory")
    assert (memory.objective, memory.rule) == ("", "")
    wave = lambda g, m, _=None: (m, jax.tree.map(lambda m, g: jnp.sin(m) + g, m, g))
    rule = optax.GradientTransformation(rule.init, wave)
    memory = next(c for c in describe((jnp.ones(()), rule)).components if c.name == "memory")
    assert (memory.objective, memory.rule) == ("", "")
    found = rows(describe((MLP, optax.adan(0.1))))
    assert found["m (Adan)"].rule == "m <- 0.98 m + 0.02 g"
    assert found["v (Adan)"].rule == "m <- 0.92 m + phi(g)"  # of differences of gradients
    assert found["n (Adan)"].rule == "m <- 0.99 m + phi(g)"
    sam = rows(describe((MLP, optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)))))
    assert (sam["cache (SAM)"].objective, sam["cache (SAM)"].rule) == ("-<m, W> + 0.5 |m|^2", "m <- W")
    weights = describe((MLP, optim.generalized_gradient_descent(0.1))).components[-1]
    assert weights.rule == "W <- W - eta g"  # found by conjugate gradients, to rounding
    squares = next(c for c in describe((MLP, optax.contrib.prodigy(1.0))).components if c.name == "exp_avg_sq (Prodigy)")
    assert squares.objective.startswith("-<m, g^2> +")  # however small


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (optax.scale(-0.1), "W <- W - eta g"),
        (optax.scale(0.1), "W <- W + eta g"),
        (optax.identity(), "W <- W + eta g"),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), 
         "adds gradients and what comes of cache (SAM), restarts every 2 steps"),
        (optax.noisy_sgd(0.1, key=jax.random.key(0)), "W <- W + f(g)"),
        (optax.lamb(0.1), "adds what comes of mu (Adam) and nu (Adam)"),
        (optax.adamw(0.1, mask={"up": True, "bias": False, "down": True}),
         "adds what comes of mu (Adam) and nu (Adam), decays"),
        (optax.chain(optax.add_decayed_weights(0.1, {"up": True, "bias": False, "down": True}), optax.sgd(0.1)),
         "W <- W - eta g, decays"),
    ],
)  # fmt: skip
def test_what_moves_the_weights(rule, said):
    assert next(c.rule for c in describe((MLP, rule)).components if c.parameters) == said


VALUE = lambda params: {"value": 1.7}


def field_of(name, field, rule, extra=None):
    """A field of the first component whose name starts so."""
    return next(getattr(c, field) for c in describe((MLP, rule), extra=extra).components if c.name.startswith(name))


def test_a_system_of_one_level_has_no_faster_levels():
    (weights,) = describe((MLP, optax.sgd(0.1))).components
    assert weights.knowledge == ""
    *_, weights = describe((LINEAR, optax.sgd(0.1))).components
    assert weights.knowledge == "back-propagation through the faster levels"


def held_maximum(period):
    """A rule with a running maximum, computed at every `period` steps, that changes only where it is exceeded."""

    def update(updates, state, params=None):
        count, most = state
        largest = jnp.maximum(most, optax.tree.norm(updates))
        most = jnp.where(count % period == period - 1, largest, most)
        return jax.tree.map(lambda g: -g / most, updates), (count + 1, most)

    return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32), jnp.ones(()) / 100), update)


def test_a_maximum_is_computed_where_it_does_not_change():
    assert field_of("estim_lr", "frequency", optax.contrib.dadapt_adamw()) == 1
    assert field_of("estim_lr", "frequency", optax.contrib.prodigy()) == 1
    for period in (1, 3):
        assert field_of("memory", "frequency", held_maximum(period)) == 1 / period


@pytest.mark.parametrize(
    ("rule", "decays"),
    [
        (optax.contrib.schedule_free_sgd(0.1), False),
        (optax.contrib.schedule_free_adamw(0.1), False),
        (optax.contrib.madgrad(0.1), False),
        (optax.contrib.schedule_free_sgd(0.1, weight_decay=0.1), True),
        (optax.contrib.schedule_free_adamw(0.1, weight_decay=0.01), True),
        (optax.adamw(1e-3, weight_decay=1e-4), True),
        (optax.contrib.madgrad(0.1, weight_decay=0.1), False),  # its decay is of the gradients
    ],
)
def test_parameters_decay_if_they_are_pulled_to_zero_and_not_to_a_copy(rule, decays):
    assert field_of("parameters", "rule", rule).endswith(", decays") == decays


def test_a_forgetting_close_to_none_has_its_coefficient():
    """1 - b2 of float32 has four digits: the objective's coefficient is one half."""
    assert field_of("nu", "objective", optax.contrib.adopt(0.1)) == "-<m, g^2> + 0.5 |m|^2"
    assert field_of("nu", "rule", optax.contrib.adopt(0.1)) == "m <- 0.9999 m + 0.0001 g^2"


def test_half_steps_are_said():
    """SAM leaves its parameters at every other step and starts the next from where they were."""
    for sync in (2, 3):
        rule = optax.contrib.sam(optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.1)), sync_period=sync)
        weights, cache = describe((MLP, rule)).components
        assert weights.rule == f"adds gradients and what comes of cache (SAM), restarts every {sync} steps"
        assert weights.knowledge == "initialisation: restarts from cache (SAM)" and weights.starts_from == ("cache (SAM)",)
        assert (weights.level, cache.level, weights.frequency, cache.frequency) == (1, 2, 1, 1 / sync)
        assert (cache.context, cache.rule) == ("weights", "m <- W")


@pytest.mark.parametrize(
    ("rule", "extra", "context", "said"),
    [
        (optax.polyak_sgd(), VALUE, "gradients and value", "W <- W - eta(g, value) g"),
        (optax.polyak_sgd(max_learning_rate=1e9), VALUE, "gradients and value", "W <- W - eta(g, value) g"),
        (optax.chain(optax.normalize_by_update_norm(), optax.scale(-0.1)), None, "gradients", "W <- W - eta(g) g"),
        (
            optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
            VALUE,
            "gradients and value",
            "W <- W - eta(value) g",
        ),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), None, "gradients", "W <- W - eta g"),
    ],
)
def test_a_rate_that_the_rule_computes_is_said(rule, extra, context, said):
    assert field_of("parameters", "rule", rule, extra) == said
    assert field_of("parameters", "context", rule, extra) == context


def test_what_is_multiplied_by_zero_is_not_read():
    """novograd and simplified_ademamix multiply by a decay, and a share of the gradient, that are zero by default."""
    assert field_of("mu", "context", optax.novograd(0.1)) == "gradients and what comes of nu (Novograd)"
    weighted = optax.novograd(0.1, weight_decay=0.1)
    assert field_of("mu", "context", weighted) == "gradients, weights and what comes of nu (Novograd)"
    rule = field_of("parameters", "rule", optax.contrib.simplified_ademamix(0.1))
    assert rule == "adds what comes of m (SimplifiedAdEMAMix) and n (SimplifiedAdEMAMix)"


def test_memories_of_weights():
    assert field_of("params", "rule", optax.lbfgs(0.1, linesearch=None)) == "m <- W"


@pytest.mark.slow
def test_a_memory_of_the_curvature_at_the_weights():
    objective = lambda params: sum(jnp.sum(w**4) for w in params.values())  # its second derivative is 12 W^2
    hessian = field_of("nu", "rule", optax.contrib.sophia(0.1), lambda params: {"obj_fn": objective})
    assert hessian == "m <- 0.99 m + 0.12 W^2"


def test_a_rate_that_a_search_finds():
    value_fn = lambda params: sum(jnp.sum(w**2) for w in params.values())
    extra = lambda params: {"value": value_fn(params), "grad": jax.grad(value_fn)(params), "value_fn": value_fn}
    search = optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5))
    loop, rate, weights = describe((MLP, search), extra=extra).components
    assert loop.name == "inner loop of gradients and weights" and rate.needs == (loop.name,)
    assert (rate.objective, rate.rule) == ("", "")  # it is multiplied by what the search finds
    assert weights.needs == (rate.name,)


def test_updates_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="its updates have other shapes than the parameters; give"):
        describe((MLP, optax.contrib.dpsgd(0.1, 1.0, 0.1, 0)))


def test_numbers_are_printed_only_where_they_stay():
    """adafactor's decay, and what a schedule multiplies, are others at another step."""
    found = rows(describe((MLP, optax.adafactor(0.1, min_dim_size_to_factor=4))))
    assert found["v_row (Factored)"].rule == "m <- alpha m + phi(g)"
    assert (found["v (Factored)"].objective, found["v (Factored)"].rule) == ("-<m, g^2> + decay", "m <- alpha m + eta g^2")
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 99)
    memory, _ = describe((MLP, optax.chain(optax.scale_by_schedule(schedule), optax.trace(0.9)))).components
    assert (memory.objective, memory.rule) == ("-<m, g> + decay", "m <- 0.9 m + eta g")
    memory, _ = describe((MLP, optax.sgd(schedule, 0.9))).components
    assert (memory.objective, memory.rule) == ("-<m, g> + 0.05 |m|^2", "m <- 0.9 m + g")


def test_memories_of_few_digits_have_their_rule():
    memory, _ = describe((MLP, optax.sgd(0.1, 0.9, accumulator_dtype=jnp.bfloat16))).components
    assert (memory.objective, memory.rule, memory.state_bytes) == ("-<m, g> + 0.05 |m|^2", "m <- 0.9 m + g", 2 * 104)
    memory, *_ = describe((MLP, optax.adam(0.1, mu_dtype=jnp.bfloat16))).components
    assert (memory.objective, memory.rule) == ("-<m, g> + 0.5 |m|^2", "m <- 0.9 m + 0.1 g")
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), MLP)
    first, second, _ = describe((half, optax.adam(0.1))).components
    assert first.rule == "m <- 0.9 m + 0.1 g"
    assert second.rule == "m <- m + 0.001 g^2"  # 0.999 is 1 in bfloat16: that memory never forgets
    state = optax.adam(0.1).init(half)[0]._replace(nu=half)
    assert (optax.scale_by_adam().update(jax.tree.map(jnp.zeros_like, half), state)[1].nu["bias"] == 1).all()


def test_what_is_read_beside_a_memory_is_said():
    found = rows(describe((MLP, optax.adabelief(0.1))))
    assert found["nu (Belief)"].context == "gradients and what comes of mu (Belief)"
    assert found["parameters"].context == "what comes of mu (Belief) and nu (Belief)"
    assert found["parameters"].needs == ("nu (Belief)",)
    assert found["parameters"].rule == "adds what comes of mu (Belief) and nu (Belief)"
    memory, weights = describe((MLP, optax.lion(0.1))).components  # it reads the memory as it was before the step
    assert weights.rule == "adds gradients and what comes of mu (Lion), decays"
    assert (memory.level, weights.level, weights.needs) == (1, 1, ())
    weights = describe((MLP, optax.sgd(0.1, 0.9, nesterov=True))).components[-1]
    assert weights.rule == "adds gradients and what comes of trace (Trace)"
    memory = rows(describe((MLP, optax.adafactor(0.1, momentum=0.9))))["ema (Ema)"]
    assert memory.context == "gradients, weights and what comes of v (Factored)"


def test_names_with_commas_are_told_apart_in_lists():
    groups = {"x": optax.sgd(0.1, 0.9), "y": optax.sgd(0.1, 0.8)}
    weights = describe((MLP, optax.partition(groups, {"up": "x", "bias": "y", "down": "y"}))).components[-1]
    assert weights.rule == 'adds what comes of "trace (Trace), x" and "trace (Trace), y"'
    assert weights.needs == ("trace (Trace), x", "trace (Trace), y")


class Two(NamedTuple):
    count: jax.Array
    quick: dict
    lazy: dict
    waiting: dict
    odd: dict


class Odd(NamedTuple):
    held: dict
    description = Description("a riddle", "by guessing", "whispers", "hearsay")


def brand_new():
    """A rule that the library has never seen: a lazy memory of what a quick one holds, on every third step; a loop."""

    def init(params):
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return Two(jnp.zeros((), jnp.int32), zeros(), zeros(), zeros(), Odd(zeros()))

    def update(updates, state, params=None):
        quick = jax.tree.map(lambda m, g: 0.7 * m - 0.4 * g, state.quick, updates)
        waiting = jax.tree.map(jnp.add, state.waiting, quick)
        due = state.count % 3 == 2
        lazy = jax.tree.map(lambda m, w: jnp.where(due, 0.25 * m + w, m), state.lazy, waiting)
        waiting = jax.tree.map(lambda w: jnp.where(due, 0.0, w), waiting)
        odd = jax.tree.map(lambda m, g: jnp.tanh(m * 0.5 + g) + 0.1 * m**2, state.odd.held, updates)
        halve = lambda x: jax.lax.while_loop(lambda c: c[0] < 7, lambda c: (c[0] + 1, c[1] * 0.9), (0, x))[1]
        emitted = jax.tree.map(lambda a, b, c: a + halve(b) + c, quick, lazy, odd)
        return emitted, Two(state.count + 1, quick, lazy, waiting, Odd(odd))

    return optax.GradientTransformation(init, update)


def test_a_new_optimizer_describes_itself():
    found = rows(describe((MLP, optax.chain(brand_new(), optax.scale(-0.1)))))
    quick, lazy, odd = found["quick (Two)"], found["lazy (Two)"], found["held (Odd)"]
    loop, weights = found["inner loop of lazy (Two)"], found["parameters"]
    assert len(found) == 5
    assert (quick.rule, quick.objective) == ("m <- 0.7 m - 0.4 g", "-<m, -g> + 0.375 |m|^2")
    assert (lazy.frequency, lazy.needs, lazy.rule) == (1 / 3, ("quick (Two)",), "m <- 0.25 m + u")
    assert (odd.objective, odd.rule, odd.context, odd.knowledge) == ("a riddle", "by guessing", "whispers", "hearsay")
    assert loop.frequency == 7 and loop.objective == ""
    assert [c.level for c in (loop, quick, odd, weights, lazy)] == [1, 2, 2, 3, 4]
    assert lazy.state_bytes == 2 * quick.state_bytes


def test_a_new_level_describes_itself():
    zero = lambda slower: jnp.zeros(3)
    step = lambda state, context, slower: (state + 1, state[None])
    fast = Level(zero, step, 2, "quick", description=Description("1/2 |m - x|^2", "by steps", inner=(optax.trace(0.5),)))
    passing = Level(zero, step, 4, "passing", description=Description(objective=None))
    slow = Level(zero, step, 4, "lazy", description=Description("-<m, x>", knowledge="hearsay", updates=2))
    slowest = Level(zero, step, 12, "laziest")
    found = describe(nest(nest(nest(fast, passing), slow, reset=True), slowest)).components
    assert [(c.name, c.frequency, c.level) for c in found] == [
        ("trace (Trace) of quick", 1 / 2, 1), ("quick", 1 / 2, 2), ("lazy", 1 / 2, 3), ("laziest", 1 / 12, 4),
    ]  # fmt: skip
    assert [c.objective for c in found] == ["-<m, g> + 0.25 |m|^2", "1/2 |m - x|^2", "-<m, x>", ""]
    assert (found[1].context, found[3].context) == ("what trace (Trace) of quick emits", "what lazy emits")
    assert found[2].knowledge == "hearsay" and found[1].knowledge == ""
    assert [c.state_bytes for c in found] == [None, 12, 12, 12]
    (quick, *_) = describe(nest(dataclasses.replace(fast, description=Description("x")), slow, reset=True)).components
    assert quick.knowledge == "initialisation: restarts from lazy" and quick.starts_from == ("lazy",)
    passing = dataclasses.replace(passing, period=2)
    for around, starts in ((nest(slow, slowest), ("lazy", "laziest")), (nest(passing, slow), ("lazy",)), (passing, ())):
        (*_, quick) = [c for c in describe(nest(fast, around, reset=True)).components if c.name == "quick"]
        assert quick.starts_from == starts
        assert quick.knowledge == (f"initialisation: restarts from {' and '.join(sorted(starts))}" if starts else "")
    alone = Level(lambda slower: slower[0], step, 5, "needy")
    assert [(c.name, c.state_bytes, c.updates) for c in describe(alone).components] == [("needy", None, "1/5 a token")]
    assert "not stated" in describe(alone).markdown()


def test_states_that_start_from_unknown_slower_states_are_unknown():
    """In a nest the slower levels of the nest are known, and what is slower still is not."""
    step = lambda state, context, slower: (state, state)
    level = lambda period, init: Level(init, step, period, f"every {period}")
    sizes = lambda nested: [c.state_bytes for c in describe(nested).components]
    own = level(4, lambda slower: jnp.zeros(3))
    assert sizes(nest(level(1, lambda slower: slower[0] + 1), own)) == [12, 12]
    assert sizes(nest(level(1, lambda slower: slower[1] + 1), own)) == [None, 12]
    assert sizes(nest(level(1, lambda slower: slower[-1]), level(4, lambda slower: slower[1:][0] * 2))) == [None, None]
    assert sizes(nest(level(1, lambda slower: slower[:1]), own)) == [12, 12]
    assert sizes(nest(nest(level(1, lambda slower: slower[1]), level(2, lambda slower: slower[0])), own)) == [12, 12, 12]


def test_an_error_in_a_levels_own_code_is_not_hidden():
    step = lambda state, context, slower: (state, state)
    with pytest.raises(TypeError, match="unsupported operand"):
        describe(Level(lambda slower: jnp.zeros(3) + "a", step, 1))
    with pytest.raises(TypeError, match="positional argument"):
        describe(Level(lambda: jnp.zeros(3), step, 1))
    with pytest.raises(IndexError, match="tuple index"):
        describe(Level(lambda slower: (jnp.zeros(3),)[1], step, 1))
    with pytest.raises(IndexError, match="list index"):
        describe(Level(lambda slower: [jnp.zeros(3)][len(slower) + 1], step, 1))


@pytest.mark.parametrize("period", [0, -2, 1.5, True, "a"])
def test_a_period_is_a_positive_whole_number(period):
    with pytest.raises(UserError, match=f"^level 'odd': period {period!r}: give a whole number of at least 1$"):
        Level(lambda slower: 0, lambda state, context, slower: (state, state), period, "odd")


def test_a_level_that_descends_has_the_memories_of_its_rule():
    level = lambda rule: descent(lambda w, x, meta: jnp.sum((w["a"] - x) ** 2), rule)
    memory, weights = describe(level(optax.sgd(0.1, 0.9))).components
    assert (memory.name, memory.level, memory.rule) == ("trace (Trace) of descent", 1, "m <- 0.9 m + g")
    assert (weights.name, weights.level, weights.rule) == ("descent", 2, "adds what comes of trace (Trace)")
    for rule in (lambda meta: optax.sgd(meta["rate"]), optax.masked(optax.sgd(0.1, 0.9), {"a": True})):
        (weights,) = describe(level(rule)).components
        assert weights.rule.startswith("an optax rule")


def test_equal_names_are_told_apart():
    zero, step = lambda slower: jnp.zeros(3), lambda state, context, slower: (state + 1, state[None])
    says = Description("x", inner=(optax.trace(0.9), optax.trace(0.5)))
    found = describe(nest(nest(Level(zero, step, 1), Level(zero, step, 2), reset=True), Level(zero, step, 4))).components
    assert [(c.name, c.frequency, c.level) for c in found] == [("level", 1, 1), ("level 2", 1 / 2, 2), ("level 3", 1 / 4, 3)]
    assert found[0].starts_from == ("level 2",) and found[2].needs == ("level", "level 2")
    assert found[0].knowledge == "initialisation: restarts from level 2"
    found = describe(Level(zero, step, 1, "quick", description=says)).components
    assert [(c.name, c.level, c.rule) for c in found] == [
        ("trace (Trace) of quick", 1, "m <- 0.9 m + g"),
        ("trace (Trace) of quick 2", 2, "m <- 0.5 m + g"), ("quick", 3, "adds what comes of trace (Trace)"),
    ]  # fmt: skip
    two = nest(Level(zero, step, 1, "parameters"), Level(zero, step, 2, "slow"), reset=True)
    found = describe((two, two, MLP, optax.sgd(0.1))).components
    assert {c.name: (c.level, c.starts_from) for c in found} == {
        "parameters": (1, ("slow",)), "slow": (2, ()), "parameters 2": (1, ("slow 2",)), "slow 2": (2, ()),
        "parameters 3": (3, ()),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("layer", "seen"),
    [
        (LinearMemory(8, 2, chunk=4), {1: lambda memory: memory}),
        (Titans(8, 2, 3, chunk=4), {4: boundary_weights}),
        pytest.param(
            SelfModifyingTitans(8, 2, 3, chunk=2, projection_chunk=6, momentum=False),
            {2: lambda nested: boundary_weights(nested.fast), 6: lambda nested: boundary_weights(nested.slow)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_levels_of_layers_are_what_they_do(layer, seen):
    """Their periods are those at which their states are seen to change, token by token."""
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    weights = jax.jit(layer.init_weights)(jax.random.key(1))
    start = jax.jit(lambda: layer.init_state(weights, 1))()
    read, states = jax.jit(layer.__call__), [start]
    for t in range(12):
        states.append(read(weights, states[-1], x[:, t : t + 1], jnp.int32(t))[0])
    for period, part in seen.items():
        leaves = [jax.tree.leaves(part(state.memory)) for state in states]
        moved = [any((a != b).any() for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(leaves)]
        when = [t for t, flag in enumerate(moved) if flag]
        assert len(when) == 12 // period and {b - a for a, b in itertools.pairwise(when)} == {period}
    *fast, slow = describe(layer).components
    assert {c.frequency for c in fast} == {1 / period for period in seen} and slow.frequency == 0
    if isinstance(layer, SelfModifyingTitans):
        assert all(c.starts_from == ("slow weights",) for c in fast) and len(fast) == 2


def test_errors_and_steps_of_deep_memories_are_said():
    rules = [Rule(), Rule(errors="exact"), Rule(errors="exact", step="normalised"), Rule(erase="none", step="raw")]
    said = [describe(SelfModifyingTitans(8, 2, 3, momentum=False, rule=rule)).components[0].rule for rule in rules]
    assert said == [
        "delta gradient descent with errors of the boundary and proximal steps, decay to the start",
        "delta gradient descent with exact errors and proximal steps, decay to the start",
        "delta gradient descent with exact errors and normalised steps, decay to the start",
        "gradient descent with errors of the boundary and raw steps, decay to the start",
    ]


def test_other_choices_of_deep_memories_are_said():
    paper = Rule("memory", "raw", retention="zero", read="boundary", damped=False)
    momentum, memories, _ = describe(SelfModifyingTitans(8, 2, 3, rule=paper, generated=("keys", "queries"))).components
    errors = "with errors of the boundary and"
    words = f"delta gradient descent in first layers alone {errors} raw steps, decay to zero, read as at the last boundary"
    assert memories.rule == words
    assert momentum.rule == "gradient descent, decay, undamped"
    fixed = "direct parametric conditioning: slow weights make values, rates, retention"
    assert f"generation: they make their own keys, queries; {fixed}" in memories.knowledge
    titans = Titans(8, 2, 3, momentum=False, rule=Rule("none", retention="none", read="before"))
    assert (
        describe(titans).components[0].rule == f"gradient descent {errors} proximal steps, no decay, read before it writes"
    )


def test_attention_is_a_level():
    layer = Attention(8, 2, window=5)
    weights = layer.init_weights(jax.random.key(0))
    (level,) = layer.levels(weights, 2)
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    _, y = jax.jit(lambda x: run(level, None, x))(x.swapaxes(0, 1))
    _, whole = jax.jit(lambda x: layer(weights, layer.init_state(weights, 2), x, 0))(x)
    assert jnp.allclose(y.swapaxes(0, 1), whole, atol=1e-5)
    component, frozen = describe(layer).components
    assert component.frequency == math.inf and component.state_bytes == 2 * 5 * 8 * 4 + 4 * 4
    assert describe(Attention(8, 2)).components[0].state_bytes is None


def test_hope_and_its_optimizer():
    config = TrainConfig.from_preset("tiny-hope")
    picture = describe((config.model, optimizer(config)), tokens_per_step=1024)
    levels = {}
    for c in picture.components:
        levels.setdefault(c.level, []).append(c.frequency)
    assert [set(f) for f in levels.values()] == [{1 / 64}, {1 / 64}, {1 / 256}, {1 / 1024}, {1 / 1024}]
    with_momentum = describe(dataclasses.replace(config.model, momentum=True)).components
    assert with_momentum[0].name.startswith("momentum of self-modifying") and with_momentum[0].frequency == 1 / 64
    found = rows(picture)
    assert found["CMS level2"].rule == "W <- W - eta g" and "64 tokens" in found["CMS level2"].objective
    assert picture.parameters == 1_056_504 and round(picture.state_bytes_per_parameter, 2) == 8
    assert found["CMS level1"].starts_from[0].startswith("starts of CMS level1")
    assert found["mu (Adam)"].generated_by == ("CMS level1",)


@pytest.mark.slow
def test_hope_and_an_optimizer_of_several_frequencies():
    config = TrainConfig.from_preset("tiny-hope")
    spectrum = dataclasses.replace(config, optimizer="continuum", slow_period=4)
    found = rows(describe((config.model, optimizer(spectrum)), tokens_per_step=1024))
    slow = [c for name, c in found.items() if name.startswith("starts of CMS level1")]
    assert [c.frequency for c in slow] == [1 / 4096]


def test_models_alone():
    attention, *frozen = describe(preset("tiny-transformer")).components
    assert attention.frequency == math.inf and {c.frequency for c in frozen} == {0} and {c.level for c in frozen} == {2}
    assert any("frozen in context" in c.name for c in frozen)
    cms = CMSConfig(hidden=(5, 5, 5), periods=(8, 4), rule="momentum", variant="sequential", meta_gradient="first-order")
    config = dataclasses.replace(SMALL, mixer="titans", momentum=False, cms=cms)
    model = nnx.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))()
    picture = describe(model)
    assert [(c.name, c.frequency) for c in picture.components if c.frequency] == [
        ("deep memory, 2 blocks", 1 / 4), ("trace (Trace) of CMS level3, 2 blocks", 1 / 4), ("CMS level3, 2 blocks", 1 / 4),
        ("trace (Trace) of CMS level2, 2 blocks", 1 / 8), ("CMS level2, 2 blocks", 1 / 8),
    ]  # fmt: skip
    assert picture.levels == 6
    assert {c.name for c in picture.components if not c.frequency} >= {"CMS level1, frozen in context"}


@pytest.mark.slow
def test_a_nested_cms_restarts():
    nested = CMSConfig(hidden=(5, 5), periods=(8, 4), variant="nested")
    found = rows(describe(dataclasses.replace(SMALL, mixer="attention", cms=nested)))
    assert "restarts from CMS level1" in found["CMS level2, 2 blocks"].knowledge


def test_flax_modules_may_hold_more_than_parameters():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)

    memory, weights = describe((Net(nnx.Rngs(0)), optax.sgd(0.1, 0.9))).components
    assert weights.parameters == 3 * 4 + 4 + 2 * 4 and memory.state_bytes == 4 * weights.parameters


@pytest.mark.slow
def test_large_models_are_never_drawn():
    config = TrainConfig.from_preset("1.3b-hope", optimizer="adamw")
    picture = describe((config.model, optimizer(config)))
    assert picture.parameters > 1.2e9 and picture.components[-1].updates == "1 a step"


def test_renderings():
    picture = describe((preset("tiny-hope-attention"), optim.momentum(0.1)), tokens_per_step=100)
    made = json.loads(json.dumps(picture.to_dict()))
    assert made["components"][0]["frequency"] == "inf" and made["levels"] == picture.levels
    assert [c["name"] for c in made["components"]] == [c.name for c in picture.components]
    text = picture.markdown().splitlines()
    cells = [len(re.split(r"(?<!\\)\|", line)) for line in text[: 2 + len(picture.components)]]
    assert set(cells) == {11}
    console = rich.console.Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(picture)
    said = console.export_text()
    assert all(c.updates in said for c in picture.components) and "CMS level2" in said
    figure = picture.plot()
    drawn = {text.get_text() for text in figure.axes[0].texts}
    assert {c.name for c in picture.components} <= drawn
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"level {i + 1}" for i in range(picture.levels)]
    places = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert places == sorted(places, reverse=True) and len(places) == len(picture.components)


@pytest.mark.parametrize(
    ("system", "tokens"),
    [
        ((preset("tiny-hope"), optax.contrib.muon(0.02)), 1024),
        ((MATRICES, optim.m3(0.1, slow_period=4)), None),
        pytest.param(
            (preset("tiny-hope-attention"), optax.contrib.sam(optax.adam(0.1), optax.sgd(0.1))), 100, marks=pytest.mark.slow
        ),
        ((MLP, optax.lbfgs(0.1, linesearch=None)), None),
    ],
)
def test_no_arrow_of_the_figure_goes_through_a_text(system, tokens):
    picture = describe(system, tokens_per_step=tokens)
    figure = picture.plot()
    figure.canvas.draw()
    (axes,) = figure.axes
    texts = [*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, *axes.get_legend().get_texts()]
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    assert len(arrows) >= len(picture.components) - 3 and len(boxes) > 2 * len(picture.components)
    for arrow in arrows:
        path = arrow.get_transform().transform_path(arrow.get_path())
        for line in path.to_polygons(closed_only=False):  # its shaft and its head
            assert not [text for text, box in boxes.items() if Line(line).intersects_bbox(box, filled=False)]
            assert all(axes.get_window_extent().contains(*point) for point in line)  # nothing is cut off
    corners = [corner for box in boxes.values() for corner in (box.min, box.max)]
    assert all(figure.bbox.contains(*corner) for corner in corners)


def test_arrows_that_lead_to_neighbours_alike_are_drawn_once():
    picture = describe((preset("tiny-hope"), optax.adam(1e-3)), tokens_per_step=1024)
    (axes,) = picture.plot().axes
    bars = [np.ptp(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) > 1]
    assert bars == [1, 3]  # mu and nu; the four groups of parameters
    # memories to one another 2, starts 3, gradients to Adam's memories 1, Adam's memories to the parameters 2
    assert len([patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]) == 8
    (axes,) = describe(optax.adam(1e-3)).plot().axes  # no gradients of a model, no starts, nothing in common
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["context: its new state is read by"]
    assert describe(optax.sgd(0.1)).plot().axes[0].get_legend() is None


def imports_of(path):
    """The modules of this package that a file imports, in functions and for type checkers too."""
    tree = ast.parse(path.read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    return {name for name in names if name and name.split(".")[0] == "nested_jax"}


def test_imports_point_one_way():
    root = Path(nested_jax.__file__).parent
    modules = {f"nested_jax.picture.{path.stem}": imports_of(path) for path in (root / "picture").glob("[!_]*.py")}
    reached = closure(modules)
    assert not [name for name in modules if name in reached[name]]
    for package in ("memory", "optim", "meta", "models", "jaxpr"):
        assert not [path for path in (root / package).glob("*.py") if any("picture" in name for name in imports_of(path))]
    lines = (root / "description.py").read_text()
    assert set(re.findall(r"^(?:from|import) (\w+)", lines, re.MULTILINE)) == {"__future__", "collections", "dataclasses"}
    heavy = {"rich", "matplotlib", "tyro", "tensorflow_datasets"}
    code = "import sys, flax.nnx; others = {*sys.modules}; import nested_jax; print(*{*sys.modules} - others)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not heavy & {*said.split()}  # flax itself imports rich


@pytest.mark.parametrize(
    ("system", "named"),
    [
        ("hope", "str is no level"),
        ({}, "dict is no level"),
        ([optax.sgd(0.1)] * 2, "2 optimizers"),
        (
            (Level(lambda slower: jnp.zeros(3), lambda s, x, slower: (s, s), 1), optax.sgd(0.1)),
            "no parameters to move: give",
        ),
        ((nnx.Dropout(0.5), optax.sgd(0.1)), "no parameters to move: give"),
        (nnx.Dropout(0.5), "nothing can learn in this: give"),
        ({"none": jnp.zeros((0, 3))}, "nothing can learn in this: give"),
        ({"a": 3}, "int is no"),
        (nnx.Optimizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), optax.adam(0.1), wrt=nnx.Param), r"give \(model, tx\)"),
    ],
)
def test_what_is_no_system(system, named):
    with pytest.raises(UserError, match=named):
        describe(system)


@pytest.mark.parametrize("tokens", [-4, 0, "a", math.nan, math.inf])
def test_tokens_are_a_positive_number(tokens):
    with pytest.raises(UserError, match=f"tokens_per_step {tokens!r} is no positive number"):
        describe((MLP, optax.sgd(0.1)), tokens_per_step=tokens)


@pytest.mark.parametrize(
    ("rule", "extra", "named"),
    [
        (optax.masked(optax.sgd(0.1), {"up": True}), None, "masked"),
        (optax.partition({"a": optax.sgd(0.1)}, {"up": "a", "bias": "b", "down": "a"}), None, "partition"),
        (optax.lookahead(optax.sgd(0.1), 2, 0.5), None, "lookahead"),
    ],
)
def test_what_an_optimizer_refuses_is_said_in_a_line(rule, extra, named):
    with pytest.raises(UserError, match=f"^describe: optimizer .*{named}.*; give parameters.*extra=$") as error:
        describe((MLP, rule), extra=extra)
    assert "\n" not in str(error.value)


def test_parameters_may_be_empty():
    """They make no row."""
    for rule in (optax.adam(0.1), optax.set_to_zero()):
        full, empty = (describe((MLP | more, rule)) for more in ({}, {"none": jnp.zeros((0, 3))}))
        assert full == empty


def test_command_line(tmp_path, capsys):
    def say(line):
        code = main(["describe", *shlex.split(line)])
        out, err = capsys.readouterr()
        return code, out, err

    figure = tmp_path / "picture.png"
    code, out, _ = say(f"--preset tiny-linear --optimizer momentum --figure {figure}")
    assert code == 0 and "m <- 0.9 m + g" in out and figure.stat().st_size > 10_000
    assert "3 levels" in out
    code, out, _ = say("--preset tiny-linear --optimizer none --markdown --model.layers 2")
    assert code == 0 and out.startswith("| component |") and "linear memory, 2 blocks" in out and "2 levels" in out
    for line, named in (
        ("--preset tiny-hoep", "tiny-hoep"),
        ("--optimizer adamx", "--optimizer"),
        ("--figure picture.xyz --preset tiny-linear", "--figure picture.xyz"),
        ("--figure '' --preset tiny-linear", "--figure '' names no file"),
        (f"--figure {tmp_path} --preset tiny-linear", "names no file: give one that ends in .png"),
        (f"--run-dir {tmp_path / 'nowhere'}", "holds no run"),
        (f"--run-dir {tmp_path} --optimizer muon", "leave out"),
        ("--model.heads 3", "heads"),
    ):
        code, out, err = say(line)
        assert code == 2 and out == "" and len(err.splitlines()) == 1 and named in err


RULES = [
    rule if rule in ("none", "delta-gradient-descent") else pytest.param(rule, marks=pytest.mark.slow)
    for rule in [*typing.get_args(Optimizer), "none"]
]


@pytest.mark.parametrize("rule", RULES)
def test_command_line_knows_every_rule_of_train(rule, tmp_path, capsys):
    assert main(["describe", "--preset", "tiny-linear", "--optimizer", rule]) == 0
    out = capsys.readouterr().out
    assert (" 0 " in out) == (rule == "none")  # updates
    assert ("closed form: the proximal" in out) == (rule == "delta-gradient-descent")
    if rule != "none":
        write_config(tmp_path, TrainConfig.from_preset("tiny-linear", optimizer=rule), "none")
        assert main(["describe", "--run-dir", str(tmp_path)]) == 0
        assert capsys.readouterr().out == out


def test_the_default_runs_table_is_what_is_printed(capsys):
    page = (Path(__file__).parents[1] / "experiments/first_run/README.md").read_text()
    assert main(["describe", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() in page


def test_an_mlp_and_linear_attention_differ_in_the_level_of_one_weight():
    """Three weights are moved by the optimizer in both; the fourth with them, or at every token (NL section 6)."""
    weights = {name: jnp.ones((5, 5)) for name in "QKVM"}

    def step(M, x, slower):
        q, k, v = (weights[name] @ x[0] for name in "QKV")
        M = M - jax.grad(lambda M: -jnp.dot(M @ k, v))(M)
        return M, M @ q

    memory = Level(lambda slower: weights["M"], step, period=1, name="M")
    fixed = {name: weights[name] for name in "QKV"}
    mlp = describe((weights, optax.sgd(0.1)), tokens_per_step=8)
    attention = describe((memory, fixed, optax.sgd(0.1)), tokens_per_step=8)
    assert [(c.name, c.updates) for c in mlp.components] == [("parameters", "1/8 a token")]
    assert [(c.name, c.updates) for c in attention.components] == [("M", "1 a token"), ("parameters", "1/8 a token")]
    assert mlp.parameters - attention.parameters == weights["M"].size

"""Optimizers as associative memories: optax transformations.

`scale_by_RULE(...)` emits directions of ascent; `RULE(learning_rate, ...)` is the optimizer. Gradients and updates are trees
of the parameters' shapes and dtypes. Memories are float32, or float64 with float64 parameters. Kernels are (in, out), as in
Flax; the paper's matrices are (out, in). Hyperparameters that are numbers may be traced arrays, such as learned rates.
"""

from nested_jax.optim._adagrad_memory import adagrad_memory, scale_by_adagrad_memory
from nested_jax.optim._adam_memory import adam_memory, scale_by_adam_memory
from nested_jax.optim._clip import clip_by_norm
from nested_jax.optim._continuum import continuum, scale_by_continuum
from nested_jax.optim._deep_momentum import DeepMemory, deep_momentum, deep_momentum_start, scale_by_deep_momentum
from nested_jax.optim._delta_gradient_descent import delta_gradient_descent, scale_by_delta_gradient_descent
from nested_jax.optim._delta_momentum import delta_momentum, scale_by_delta_momentum
from nested_jax.optim._generalized_gradient_descent import (
    generalized_gradient_descent,
    linearised,
    proximal,
    scale_by_generalized_gradient_descent,
)
from nested_jax.optim._m3 import m3, scale_by_m3
from nested_jax.optim._momentum import (
    feature_momentum,
    momentum,
    preconditioned_momentum,
    scale_by_feature_momentum,
    scale_by_momentum,
    scale_by_preconditioned_momentum,
)
from nested_jax.optim._newton_schulz import newton_schulz
from nested_jax.optim._nonlinear_momentum import nonlinear_momentum, scale_by_nonlinear_momentum
from nested_jax.paths import matrices

__all__ = [
    "DeepMemory",
    "adagrad_memory",
    "adam_memory",
    "clip_by_norm",
    "continuum",
    "deep_momentum",
    "deep_momentum_start",
    "delta_gradient_descent",
    "delta_momentum",
    "feature_momentum",
    "generalized_gradient_descent",
    "linearised",
    "m3",
    "matrices",
    "momentum",
    "newton_schulz",
    "nonlinear_momentum",
    "preconditioned_momentum",
    "proximal",
    "scale_by_adagrad_memory",
    "scale_by_adam_memory",
    "scale_by_continuum",
    "scale_by_deep_momentum",
    "scale_by_delta_gradient_descent",
    "scale_by_delta_momentum",
    "scale_by_feature_momentum",
    "scale_by_generalized_gradient_descent",
    "scale_by_m3",
    "scale_by_momentum",
    "scale_by_nonlinear_momentum",
    "scale_by_preconditioned_momentum",
]

"""Every test runs in float64-capable JAX, with implicit rank promotion an error."""

import os

# Tests compile much and run little: less effort in code generation saves time.
FLAGS = ("xla_backend_optimization_level=0", "xla_llvm_disable_expensive_passes=true", "xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}" for flag in FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield

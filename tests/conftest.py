"""Every test runs in float64-capable JAX, with implicit rank promotion an error."""

import os
from importlib.metadata import version

# Tests compile much and run little: no optimisation and, where jaxlib has them, XLA's older fusion emitters make compilation
# three to four times faster; as processes run beside one another, none need split a program.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", _FLAGS)

import atexit  # noqa: E402
import gc  # noqa: E402
import shutil  # noqa: E402
import tempfile  # noqa: E402

# Programs that tests start keep what they compile in a folder of the tests' own, not in the user's.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="nested_jax-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
gc.freeze()
gc.set_threshold(100_000, 20, 20)  # tracing allocates many objects that stay: a tenth of the time


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """Keeps compiled programs between tests, from the first test that asks for it."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()


LONGEST = ("tests/test_eight_devices", "tests/test_multi_device", "tests/multi_process", "tests/test_cli")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process works on one of them alone in the end."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST)))

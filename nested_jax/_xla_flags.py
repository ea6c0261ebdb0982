"""A flag without which jaxlib 0.10.2 and 0.11.0 crash or hang on CPUs: https://github.com/jax-ml/jax/issues/39257."""

from __future__ import annotations

import os
from importlib.metadata import version

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def avoid_crash() -> None:
    """Keeps sums from a kernel that overruns where float32 arrays have seven axes or more, as nested `jax.vmap` makes them.

    XLA reads the flag with the first computation; one that is set already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if version("jaxlib") in ("0.10.2", "0.11.0") and _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}=-REDUCE".strip()

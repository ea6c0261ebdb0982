"""Bundles of Pallas' kernels on TPUs: what a core does in a cycle at best. libtpu writes those of what it compiles.

Each program of a kernel's grid runs all of its own once, but for those of attention that masks rule out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from nested_jax.memory.layer import SequenceLayer
from nested_jax.memory.stream import MemoryLayer
from nested_jax.parallel.flops import inner_jaxprs

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
"""What a bundle has slots for: the matrix unit, moves across lanes, arithmetic, the matrix unit's results, and more."""
CHUNKS, ATTENDED = 4, 2048
"""Chunks of a memory's stream, and most tokens of attention's, that are compiled."""
_SPLASH = "splash"


def programs(jaxpr: core.Jaxpr) -> Counter[str]:
    """How many programs of each kernel run, by its name: its grid's, as often as loops turn; of causal attention those alone
    whose keys are not all later than their queries.

    Args:
        jaxpr: traced for TPUs; what is inside `jax.shard_map` counts once, for one device.
    """
    found: Counter[str] = Counter()
    for name, grid, times in _kernels(jaxpr, 1):
        share = (grid[-1] + 1) / (2 * grid[-1]) if name.startswith(_SPLASH) else 1.0
        found[name] += round(times * math.prod(grid) * share)
    return found


def _kernels(jaxpr: core.Jaxpr, times: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            yield params["name"], params["grid_mapping"].grid, times
            continue
        for value in params.values():
            for inner in inner_jaxprs(value):
                yield from _kernels(inner, times * params["length"] if name == "scan" else times)


@functools.cache
def of_layer(layer: Any, topology: str, tokens: int, dtype: str) -> dict[str, dict]:
    """The kernels of a sequence layer, forward and backward, compiled by a process of its own.

    Args:
        layer: with the heads of one device.
        topology: as of `plan`.
        tokens: of its stream; of a memory as many as are enough.
        dtype: of its tokens.

    Returns:
        {name: {"bundles": of one program, "slots": how many of each kind they use}}; empty where it cannot be compiled.
    """
    length = CHUNKS * layer.chunk if isinstance(layer, MemoryLayer) else min(tokens, ATTENDED)
    with TemporaryDirectory() as folder:  # libtpu is told where to write when a process loads it
        told = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
        flags = {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {told}", "JAX_PLATFORMS": "cpu"}
        given = pickle.dumps((layer, topology, length, dtype))
        command = [sys.executable, "-m", "nested_jax.parallel.bundles"]
        done = subprocess.run(command, input=given, env=os.environ | flags, capture_output=True, check=False)
        return _read(Path(folder)) if not done.returncode else {}


def of_device(layer: Any, tensor: int) -> SequenceLayer:
    """A layer with the heads that one of so many devices has."""
    return dataclasses.replace(layer, heads=layer.heads // tensor, width=layer.width // tensor)


def _compile(layer: Any, topology: str, length: int, dtype: str) -> None:
    from nested_jax.parallel.mesh import MeshShape, make_mesh
    from nested_jax.parallel.plan import devices_of

    mesh = make_mesh(MeshShape(data=1), devices_of(topology)[:1])
    place = jax.NamedSharding(mesh, jax.P())
    shaped = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
    weights = shaped(jax.eval_shape(layer.init_weights, jax.random.key(0)))
    x = shaped(jax.ShapeDtypeStruct((1, length, layer.width), dtype))

    def loss(weights, x):
        return jnp.square(layer(weights, layer.init_state(weights, 1, length), x, 0)[1].astype(jnp.float32)).sum()

    with jax.set_mesh(mesh):
        jax.jit(jax.grad(loss, (0, 1))).lower(weights, x).compile()


def _read(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(folder.iterdir()):
        if match := re.match(r"\d+-(chunk_scan|splash)(\w*)\S*-final_hlo-static-per-bundle-utilization", path.name):
            lines = [list(map(int, line.split())) for line in path.read_text().splitlines() if re.match(r"[\d ]+$", line)]
            bundles = [line for line in lines if len(line) == len(SLOTS)][1:]  # the first is how many slots there are
            slots = dict(zip(SLOTS, map(sum, zip(*bundles, strict=True)), strict=True))
            found[match[1] + match[2]] = {"bundles": len(bundles), "slots": slots}
    return found


if __name__ == "__main__":
    _compile(*pickle.load(sys.stdin.buffer))

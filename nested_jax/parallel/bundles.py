"""Bundles of Pallas' kernels on TPUs: what a core does in a cycle at best. libtpu writes those of what it compiles.

Each program of a kernel's grid runs all of its own once, but for those of attention that masks rule out.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
from jax.extend import core

from nested_jax.memory.splash import block_of
from nested_jax.models.block import sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.parallel.flops import inner_jaxprs
from nested_jax.train.config import TrainConfig

SLOTS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "FILL", "VSTORE", "SPILL", "SALU")
"""What a bundle has slots for: the matrix unit, moves across lanes, arithmetic, the matrix unit's results, and more."""
CHUNKS, ATTENDED = 4, 2048
"""Chunks of a memory's stream, and most tokens of attention's, that are compiled."""
_SPLASH = "splash"


def programs(jaxpr: core.Jaxpr, cores: int = 1) -> Counter[str]:
    """How many programs of each kernel a core runs, by its name: its grid's, as often as loops turn; of attention those
    whose keys the mask does not rule out.

    Args:
        jaxpr: traced for TPUs; what is inside `jax.shard_map` counts once, for one device.
        cores: of a device. They share programs out along axes that may run in any order.
    """
    found: Counter[str] = Counter()
    for name, grid, times in _kernels(jaxpr, 1, cores):
        found[name] += round(times * math.prod(grid) * (_masked(name, grid) if name.startswith(_SPLASH) else 1))
    return found


def _masked(name: str, grid: tuple[int, ...]) -> float:
    """The part of a grid's blocks, a band of which stands for all, that causal attention does not rule out."""
    rows, band = (grid[-3], grid[-1]) if "dkv" in name else (grid[-2], grid[-1])
    return 1 - (band - 1) / (2 * rows)


def _kernels(jaxpr: core.Jaxpr, times: float, cores: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "pallas_call":
            grid = params["grid_mapping"].grid
            order = getattr(params["compiler_params"], "dimension_semantics", None) or ()
            free = [n for n, kind in zip(grid, order, strict=False) if str(kind).lower().endswith("parallel")]
            yield params["name"], grid, times / (cores if max(free, default=1) >= cores else 1)
            continue
        for value in params.values():
            for inner in inner_jaxprs(value):
                yield from _kernels(inner, times * params["length"] if name == "scan" else times, cores)


@functools.cache
def of_layer(model: ModelConfig, topology: str, tokens: int) -> dict[str, dict]:
    """The kernels of a model's sequence layer, forward and backward, compiled by a process of its own.

    Args:
        model: with the heads of one device, see `of_device`.
        topology: as of `plan`.
        tokens: of its stream; of a memory as many as are enough.

    Returns:
        {name: {"bundles": of one program, "slots": how many of each kind they use}}.

    Raises:
        ChildProcessError: it cannot be compiled, with the last line of the reason.
    """
    length = CHUNKS * model.chunk if not model.attends else _attended(tokens)
    with TemporaryDirectory() as folder:  # libtpu reads its flags once, when a process loads it
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_mosaic_dump_to={folder}"
        flags = {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}", "JAX_PLATFORMS": "cpu"}
        given = json.dumps(TrainConfig(model=model).to_json())
        command = [sys.executable, "-m", "nested_jax.parallel.bundles", topology, str(length)]
        done = subprocess.run(command, input=given, env=os.environ | flags, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildProcessError((done.stderr.strip() or "no reason is known").splitlines()[-1][:200])
        return _read(Path(folder))


def _attended(tokens: int) -> int:
    """Tokens of which attention has as large blocks.

    >>> _attended(8192), _attended(4352), _attended(128)
    (2048, 1792, 128)
    """
    alike = (n for n in range(ATTENDED, 0, -128) if block_of(n) == block_of(tokens))
    return tokens if tokens <= ATTENDED else next(alike)


def of_device(model: ModelConfig, tensor: int) -> ModelConfig:
    """A model with the heads that one of so many devices has."""
    return dataclasses.replace(model, heads=model.heads // tensor, width=model.width // tensor)


def _compile(model: ModelConfig, topology: str, length: int) -> None:
    from nested_jax.parallel.mesh import MeshShape, make_mesh
    from nested_jax.parallel.plan import devices_of

    layer, mesh = sequence_layer(model), make_mesh(MeshShape(data=1), devices_of(topology)[:1])
    place = jax.NamedSharding(mesh, jax.P())
    shaped = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
    weights = shaped(jax.eval_shape(layer.init_weights, jax.random.key(0)))
    x = shaped(jax.ShapeDtypeStruct((1, length, model.width), model.dtype))

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
    _compile(TrainConfig.from_json(json.load(sys.stdin)).model, sys.argv[1], int(sys.argv[2]))

"""What a training step takes on TPUs that need not be there: it is compiled for them by libtpu, and read.

Counted: bytes in memory, operations of matrix products, bytes that devices send. Estimated by the compiler: cycles.
"""

from __future__ import annotations

import difflib
import heapq
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import requires, version
from operator import itemgetter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from packaging.requirements import Requirement

from nested_jax.errors import UserError, shown
from nested_jax.memory.kernels import kernel_of
from nested_jax.memory.stream import MemoryLayer
from nested_jax.models.block import inner_layer, sequence_layer
from nested_jax.parallel import bundles, flops, hbm, hlo
from nested_jax.parallel.chips import CHIPS, Chip
from nested_jax.parallel.mesh import MeshShape, choose, make_mesh
from nested_jax.train.config import TrainConfig
from nested_jax.train.optimizer import optimizer
from nested_jax.train.state import batch_shapes, divided, init_train_state, places_of, shapes_of
from nested_jax.train.step import train_step


class Kernel(NamedTuple):
    """A Pallas kernel in a step of one device."""

    name: str
    runs: int
    programs: int
    """Of all runs, that one core runs."""
    bundles: int
    """Of one program, see `parallel.bundles`; 0 where they were not counted."""

    @property
    def cycles(self) -> int:
        """Of all runs, at a bundle a cycle."""
        return self.programs * self.bundles


class Plan(NamedTuple):
    """A compiled training step. Bytes, cycles and what is sent are of one device and one step."""

    topology: str
    shape: MeshShape
    arguments: int
    """Bytes of the state and the batch, as they lie there in tiles; where memory lacks, of the state's numbers alone."""
    temporaries: int
    """Bytes of all else, at the most."""
    host: int
    """Bytes in the host's memory."""
    flops: int
    """Operations of all devices' matrix products."""
    collectives: list[hlo.Collective]
    cycles: list[tuple[int, int]]
    """(runs, cycles of all runs), as the compiler estimates, of the step outside its loops and of each loop's body."""
    traffic: int
    """Bytes that go to and from the chip's memory, see `hbm.traffic`."""
    kept: list[tuple[int, hbm.Laid, int]]
    """(turns, array, how many) that loops make, read or keep for the backward pass, the largest first, see `hbm.carried`."""
    excess: str
    """Empty; or what the compiler says of memory that is lacking: then there are no cycles and nothing is sent."""
    kernels: Sequence[Kernel] = ()
    """Pallas' kernels, whose cycles the compiler does not estimate."""
    chunks: str = ""
    """What reads memories' chunks, in words; empty where there are none."""
    costly: Sequence[tuple[str, int, int]] = ()
    """(operation and its result, runs, cycles of all runs) of the ten that take most cycles, as the compiler estimates."""
    uncounted: str = ""
    """Why kernels' bundles were not counted."""
    turns: int = 0
    """Of all loops."""
    padded: int = 0
    """As `flops`, with products padded to the matrix unit's tiles, in passes of bfloat16; 0 where kernels make some."""

    @property
    def chip(self) -> Chip:
        """The kind of device."""
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def fits(self) -> bool:
        """Whether the chip's memory has room for it."""
        return not self.excess and self.arguments + self.temporaries <= self.chip.memory

    @property
    def seconds(self) -> dict[str, float]:
        """Least seconds of a step by each of what it takes."""
        devices, sent = math.prod(self.shape), sum(one.sent for one in self.collectives)
        total = sum(cycles for _, cycles in self.cycles) + sum(kernel.cycles for kernel in self.kernels)
        counted = " and kernels' bundles" * bool(self.kernels and all(kernel.bundles for kernel in self.kernels))
        speed = devices * self.chip.flops
        products = {"matrix products at the chip's speed": self.flops / speed}
        products |= {"the same in tiles of 128 and passes of bfloat16": self.padded / speed} if self.padded else {}
        if self.excess:
            return products
        return products | {
            "bytes from and to the chip's memory": self.traffic / self.chip.bandwidth,
            "bytes sent by all links": sent / self.chip.links,
            f"cycles, as the compiler estimates them{counted}": total / self.chip.clock,
        }


def plan(config: TrainConfig, topology: str, *, count_bundles: bool = True) -> Plan:
    """Compiles a run's training step for TPUs, none of which need be there; libtpu has to be installed.

    Args:
        config: of the run; its `mesh` is of the topology's devices.
        topology: KIND:SHAPE, such as "v5e:4x4" or "v5p:4x4x4".
        count_bundles: whether the sequence layer, if kernels read it, is compiled once more, for their bundles.

    Returns:
        The plan.

    Raises:
        UserError: there is no libtpu, no such topology, or the mesh does not fit.
    """
    devices = devices_of(topology)
    mesh = make_mesh(choose(config.mesh, len(devices), divided(config)), devices)
    shape = MeshShape(*mesh.devices.shape)
    state = shapes_of(f"the model of {config.preset} and --model flags", lambda: init_train_state(config))
    batch = batch_shapes(config)
    places = places_of(mesh, state, config.batch_size)
    update = train_step(config.model, optimizer(config), accumulate=config.accumulate)
    step = jax.jit(update, donate_argnums=0, in_shardings=(places.state, places.batch), out_shardings=(places.state, None))
    arguments = sum(_bytes(*pair) for pair in zip(jax.tree.leaves(state), jax.tree.leaves(places.state), strict=True))
    traced = flops.trace(update, state, batch)
    made: dict[str, Any] = {"topology": topology, "shape": shape}
    made |= {"flops": flops.count(traced, False), "padded": flops.count(traced, True)}
    with jax.set_mesh(mesh):
        made["chunks"] = _chunks(config)
        staged = step.trace(state, batch)
        lowered = staged.lower()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            made |= {"excess": _excess(str(error)), "temporaries": 0, "host": 0}
            return Plan(**made, arguments=arguments, collectives=[], cycles=[], traffic=0, kept=[])
    memory: Any = compiled.memory_analysis()
    program = hlo.parse(compiled.as_text() or "")
    made |= {"temporaries": memory.temp_size_in_bytes, "host": memory.host_temp_size_in_bytes, "excess": ""}
    made |= {"arguments": memory.argument_size_in_bytes, "collectives": hlo.collectives(program, shape)}
    made |= {"cycles": _cycles(program), "costly": _costly(program)}
    runs = _kernels(program)
    counted: dict[str, dict] = {}
    if runs and count_bundles and shape.sequence > 1:  # a device's part of the queries is read in other blocks
        made["uncounted"] = "its tokens lie along the mesh's sequence"
    elif runs and count_bundles:
        try:
            counted = bundles.of_layer(bundles.of_device(config.model, shape.tensor), topology, config.window)
        except ChildProcessError as error:
            made["uncounted"] = str(error)
    programs = bundles.programs(staged.jaxpr.jaxpr, CHIPS[topology.partition(":")[0]].cores)
    each = [Kernel(name, n, programs[name], counted.get(name, {}).get("bundles", 0)) for name, n in runs.items()]
    made |= {"kernels": each, "turns": hlo.turns(program), "padded": 0 if runs else made["padded"]}
    return Plan(**made, traffic=hbm.traffic(program), kept=hbm.carried(program))


def table(plan: Plan) -> str:
    """A plan in lines: which numbers are counted and which estimated, and whether the step fits."""
    devices, chip, seconds = math.prod(plan.shape), plan.chip, plan.seconds
    size = lambda n: f"{n / 1e9:,.3f} GB"
    lines = [f"{devices} devices of {plan.topology}, mesh {plan.shape}; of each device in one step:"]
    lines += [f"  {'state' if plan.excess else 'state and batch':<21} {size(plan.arguments)}, counted"]
    if plan.excess:
        lines += [f"  does not fit: {plan.excess}, as the compiler says"]
    else:
        taken, verdict = plan.arguments + plan.temporaries, "fits" if plan.fits else "does not fit"
        lines += [f"  temporaries           {size(plan.temporaries)}, counted; {size(plan.host)} in the host"]
        lines += [f"  {verdict}: {size(taken)} of {size(chip.memory)}" + "; the largest arrays of loops:" * bool(plan.kept)]
        for turns, laid, count in plan.kept[:5]:
            more = f", {laid.padded / laid.bytes:.2g} times their numbers" * (laid.padded > laid.bytes)
            lines += [f"    {size(count * laid.padded)} in tiles{more}: {count} x {laid.shape} in a loop of {turns:,} turns"]
        lines += [f"  bytes to and fro      {size(plan.traffic)} of the chip's memory, counted"]
    lines += [f"  matrix products       {plan.flops / devices / 1e12:,.3f} TFLOP, counted"]
    if plan.padded:
        size_in_tiles = f"{plan.padded / devices / 1e12:,.3f} TFLOP, passes of bfloat16 included"
        lines += [f"    in tiles of 128     {size_in_tiles}, counted for whole arrays"]
    for kind, axes, runs, sent in hlo.by_kind(plan.collectives):
        along = ", ".join(axes) or "no axis"
        lines += [f"  {kind:<21} {size(sent)} along {along}, {runs:,} runs, counted"]
    for runs, cycles in plan.cycles[:5]:
        lines += [
            f"  {'the step' if runs == 1 else f'a loop of {runs:,} turns':<21} {cycles / 1e6:,.2f} million cycles, estimated"
        ]
    if plan.turns:
        lines += [f"  turns of loops        {plan.turns:,}, counted; what starting one takes is in no estimate"]
    total = sum(cycles for _, cycles in plan.cycles)
    lines += ["  the most costly operations:"] * bool(plan.costly)
    for name, runs, cycles in plan.costly:
        lines += [f"    {100 * cycles / total:>4.1f} % of the cycles, {runs:,} runs: {name}"]
    for kernel in plan.kernels:
        cost = (
            f"{kernel.cycles / 1e6:,.2f} million bundles, counted" if kernel.bundles else "whose cycles are in no estimate"
        )
        why = f": {plan.uncounted}" * bool(plan.uncounted)
        lines += [f"  Pallas' {kernel.name}, {kernel.runs:,} runs: {cost}{why}"]
    if plan.chunks:
        lines += [f"  memories' chunks      {plan.chunks}"]
    lines += ["least milliseconds of a step by"]
    lines += [f"  {1e3 * value:>9,.2f}  {name}" for name, value in seconds.items()]
    if not plan.excess:
        slowest = max(seconds.values())
        used = plan.flops / devices / chip.flops / slowest if slowest else 0.0
        lines += [f"so at most {100 * used:.1f} % of the chip's products; bound by {max(seconds, key=seconds.__getitem__)}"]
    return "\n".join(lines)


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a topology."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS:
        near = next(iter(difflib.get_close_matches(kind, CHIPS, 1, 0.3)), "v5e")
        example = f"{near}:{'x'.join('4' for _ in CHIPS[near].largest)}"
        raise UserError(f"--topology {shown(topology)}: give one of {', '.join(CHIPS)} and a shape, such as {example}")
    most = CHIPS[kind].largest
    sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d?(x[1-9]\d?)*", shape) else []
    if len(sizes) != len(most) or any(n > size for n, size in zip(sorted(sizes), sorted(most), strict=True)):
        shapes = f"{kind}:{'x'.join('4' for _ in most)}, up to {kind}:{'x'.join(map(str, most))}"
        raise UserError(f"--topology {shown(topology)}: give a shape such as {shapes}")
    # No machine of Google's is asked for its chips, and another process may use libtpu too.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for name, value in (alone | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError('nested-jax plan compiles with libtpu: pip install "nested-jax[tpu]"') from None
    fitting, found = next((one for one in requires("jax") or [] if one.startswith("libtpu")), "libtpu"), version("libtpu")
    if not Requirement(fitting).specifier.contains(found, prereleases=True):  # then it may end the process
        raise UserError(f'libtpu {found} is not that of jax {jax.__version__}: pip install "nested-jax[tpu]"')
    named = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **named).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0].rpartition(": ")[2][:150]
        example = f"{kind}:{'x'.join('4' for _ in most)}"
        raise UserError(f"--topology {topology}: {reason}; give a shape that there is, such as {example}") from None


def _chunks(config: TrainConfig) -> str:
    layer = sequence_layer(config.model)
    if not isinstance(layer, MemoryLayer):
        return ""
    shape = (config.batch_size // config.accumulate, config.window, config.model.width)
    form = kernel_of(layer, shape, jnp.dtype(config.model.dtype))
    if isinstance(form, str):
        return f"by XLA's form: {form}"
    inner = config.model.adapting > 1 and inner_layer(config.model) != layer
    return "by Pallas' kernels" + ", between MLPs that learn by XLA's form, which is differentiated twice" * inner


def _bytes(leaf: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> int:
    return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _excess(error: str) -> str:
    """What lacks, in the compiler's words.

    >>> _excess("... the total memory required for HLO temporaries (22.18G) exceeds available HBM (15.75G).")
    'temporaries of 22.18 GiB, memory of 15.75 GiB'
    >>> _excess("Used 27.32G of 15.75G hbm. Exceeded hbm capacity by 11.57G.")
    'in all 27.32 GiB, memory of 15.75 GiB'
    """
    if match := re.search(r"temporaries \(([\d.]+)(\w)\) exceeds available HBM \(([\d.]+)(\w)\)", error):
        return f"temporaries of {match[1]} {match[2]}iB, memory of {match[3]} {match[4]}iB"
    if match := re.search(r"Used ([\d.]+)(\w) of ([\d.]+)(\w) hbm", error):
        return f"in all {match[1]} {match[2]}iB, memory of {match[3]} {match[4]}iB"
    return error.splitlines()[0][:200]


def _kernels(program: hlo.Program) -> Counter[str]:
    """How often each Pallas kernel runs, by its name."""
    found: Counter[str] = Counter()
    for name, times in hlo.runs(program).items():
        for line in program.computations[name]:
            if line.opcode == "custom-call" and '"tpu_custom_call"' in line.attributes:
                found[re.sub(r"\.\d+$", "", line.name)] += times
    return found


def _estimated(program: hlo.Program) -> Iterator[tuple[str, hlo.Instruction, int]]:
    """(computation, instruction, cycles of one run) of all that the compiler estimates."""
    for name, lines in program.computations.items():
        for line in lines:
            if cycles := hlo.cycles_of(line):
                yield name, line, cycles


def _cycles(program: hlo.Program) -> list[tuple[int, int]]:
    """(runs, cycles of all runs) of the step itself and of its loops' bodies, the most cycles first."""
    found: Counter[str] = Counter()
    runs = hlo.runs(program)
    for name, _, cycles in _estimated(program):
        found[name] += cycles * runs[name]
    return [(runs[name], cycles) for name, cycles in found.most_common() if cycles]


def _costly(program: hlo.Program) -> list[tuple[str, int, int]]:
    """The ten operations with the most cycles: what JAX and what the compiler calls them, and the arrays that they make."""

    def label(line: hlo.Instruction) -> str:
        path = re.search(r'op_name="([^"]*)"', line.attributes)
        shapes = re.sub(r"{[^{}]*}", "", line.shapes)
        return f"{path[1].rpartition('/')[2] if path else line.name}, {line.opcode} -> {shapes}"

    runs = hlo.runs(program)
    found = [(label(line), runs[name], cycles * runs[name]) for name, line, cycles in _estimated(program)]
    return heapq.nlargest(10, found, key=itemgetter(2))

"""What a step takes on TPUs: read from what libtpu compiles, where it is installed; words and bad input without it."""

import dataclasses
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from nested_jax import CMSConfig, UserError, preset
from nested_jax.cli import main
from nested_jax.memory import splash
from nested_jax.parallel import bundles, hbm, hlo
from nested_jax.parallel.chips import CHIPS
from nested_jax.parallel.mesh import MeshShape, _shapes, make_mesh
from nested_jax.parallel.plan import Kernel, Plan, devices_of, plan, table
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import init_train_state, size_of

SMALL = dataclasses.replace(preset("tiny-transformer"), layers=3, width=128, heads=2, vocabulary=256)
CONFIG = TrainConfig.from_preset("tiny-transformer", model=SMALL, batch_size=4, window=128, mesh="fsdp=2,tensor=2")


@pytest.mark.parametrize(
    ("topology", "remedy"),
    [
        ("", "one of v4, v5e, v5p, v6e and a shape, such as v5e:4x4$"),
        ("6e:4x4", "one of v4, v5e, v5p, v6e and a shape, such as v6e:4x4$"),
        ("v5:4x4x4", "one of v4, v5e, v5p, v6e and a shape, such as v5[ep]:4x4"),
        *((f"v5e{text}", "a shape such as v5e:4x4, up to v5e:16x16$") for text in ("", ":2", ":2x2x2", ":axb", ":2x2 ")),
        *((f"v5e{text}", "a shape such as v5e:4x4, up to v5e:16x16$") for text in (":0x2", ":32x32")),
        ("v5p:4x4", "a shape such as v5p:4x4x4, up to v5p:16x16x24$"),
    ],
)
def test_what_is_no_topology(topology, remedy):
    with pytest.raises(UserError, match=rf"--topology .*: give {remedy}"):
        plan(CONFIG, topology)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert main(["plan", "--preset", "tiny-transformer"]) == 2
    assert capsys.readouterr().err == 'nested-jax: nested-jax plan compiles with libtpu: pip install "nested-jax[tpu]"\n'


def test_a_plan_is_of_the_run_that_train_would_make(monkeypatch, capsys):
    """Of a file of flags' values, and flags over it; where there is no run to start from, an error."""
    planned = []
    monkeypatch.setattr(
        "nested_jax.parallel.plan.plan", lambda *given, count_bundles: planned.append((*given, count_bundles))
    )
    monkeypatch.setattr("nested_jax.parallel.plan.table", lambda _: "")
    file = Path(__file__).parents[2] / "experiments/pods/760m.json"
    assert main(["plan", "--config", str(file), "--batch-size", "64", "--topology", "v5e:8x8", "--no-bundles"]) == 0
    ((run, *others),) = planned
    assert (run.preset, run.window, run.batch_size, others) == ("760m-hope", 4096, 64, ["v5e:8x8", False])
    assert main(["plan", "--init-from", "no/such/run"]) == 2 and len(planned) == 1
    assert "--init-from no/such/run holds no run: give the folder of one" in capsys.readouterr().err


def test_a_libtpu_of_another_jax_is_refused(monkeypatch):
    """It would end the process."""
    monkeypatch.setitem(sys.modules, "libtpu", object())
    monkeypatch.setattr("nested_jax.parallel.plan.version", lambda name: "0.0.1")
    with pytest.raises(UserError, match=r'libtpu 0.0.1 is not that of jax .*: pip install "nested-jax\[tpu\]"'):
        plan(CONFIG, "v5e:2x2")


def test_a_table_says_what_bounds_a_step():
    """197 TFLOP on two chips take half a second, 300 MB by links 1.5 ms; cycles are added up, an excess is told."""
    gather = hlo.Collective("all-gather", ("fsdp",), "f32[8]", 10, 300_000_000)
    kept, cycles = (12, hbm.arrays("f32[12,8,64]{2,1,0:T(8,128)}")[0], 2), [(10, 10**9), (1, 5 * 10**8)]
    numbers = dict(arguments=4 * 10**9, temporaries=8 * 10**9, host=0, flops=197 * 10**12, traffic=819 * 10**6)
    lists = dict(collectives=[gather], cycles=cycles, kept=[kept])
    made = Plan("v5e:2x2", MeshShape(fsdp=2), **numbers, **lists, excess="")
    assert list(made.seconds.values()) == [0.5, 1e-3, 1.5e-3, 1.0]
    text = table(made)
    for line in (
        "2 devices of v5e:2x2, mesh fsdp=2; of each device in one step:",
        "  fits: 12.000 GB of 17.180 GB; the largest arrays of loops:",
        "    0.000 GB in tiles, 2 times their numbers: 2 x f32[12,8,64] in a loop of 12 turns",
        "  bytes to and fro      0.819 GB of the chip's memory, counted",
        "  all-gather            0.300 GB along fsdp, 10 runs, counted",
        "  a loop of 10 turns    1,000.00 million cycles, estimated",
        "     500.00  matrix products at the chip's speed",
        "so at most 50.0 % of the chip's products; bound by cycles, as the compiler estimates them",
    ):
        assert line in text.splitlines()
    assert "  does not fit: 20.000 GB of 17.180 GB" in table(made._replace(temporaries=16 * 10**9))
    assert "Pallas" not in text
    padded = table(made._replace(padded=8 * 197 * 10**12)).splitlines()
    assert "   4,000.00  the same in tiles of 128 and passes of bfloat16" in padded
    assert "so at most 12.5 % of the chip's products; bound by the same in tiles of 128 and passes of bfloat16" in padded
    kernel = Kernel("chunk_scan", 36, 10**6, 0)
    failed = table(made._replace(kernels=[kernel], uncounted="no room")).splitlines()
    assert "  Pallas' chunk_scan, 36 runs: whose cycles are in no estimate: no room" in failed
    some = made._replace(kernels=[kernel, kernel._replace(bundles=1)])
    assert "cycles, as the compiler estimates them" in some.seconds
    assert (
        "  Pallas' chunk_scan, 36 runs: whose cycles are in no estimate"
        in table(made._replace(kernels=[kernel])).splitlines()
    )
    turning = table(made._replace(turns=1200)).splitlines()
    assert "  turns of loops        1,200, counted; what starting one takes is in no estimate" in turning
    counted = made._replace(kernels=[kernel._replace(bundles=1500), kernel._replace(bundles=750)])
    assert counted.seconds["cycles, as the compiler estimates them and kernels' bundles"] == 2.5
    assert "  Pallas' chunk_scan, 36 runs: 1,500.00 million bundles, counted" in table(counted).splitlines()
    assert "  memories' chunks      by XLA's form: why" in table(made._replace(chunks="by XLA's form: why")).splitlines()
    lacking = table(made._replace(excess="27.32G of 15.75G", cycles=[]))
    assert "  does not fit: 27.32G of 15.75G, as the compiler says" in lacking and "at most" not in lacking


def test_programs_of_kernels_are_those_of_their_grids():
    """A loop of seven turns over 2 x 4 programs, which two cores share; of attention's 4 x 4 blocks ten are not all later
    than the queries, of a window's band of 16 x 5 blocks all but ten."""

    def kernel(name, grid, order=None):
        body = lambda x, y: y.__setitem__(..., x[...])
        how = {"compiler_params": pltpu.CompilerParams(dimension_semantics=order)} if order else {}
        return pl.pallas_call(
            body, grid=grid, out_shape=jax.ShapeDtypeStruct((8,), jnp.float32), interpret=True, name=name, **how
        )

    turn = lambda x, _: (kernel("chunk_scan", (2, 4), ("parallel", "arbitrary"))(x), None)

    def read(x):
        x = kernel("splash_fwd", (3, 4, 4))(jax.lax.scan(turn, x, length=7)[0])
        return kernel("splash_dkv", (16, 1, 5))(kernel("splash_dq", (16, 5))(x))

    jaxpr = jax.make_jaxpr(read)(jnp.ones(8)).jaxpr
    attention = {"splash_fwd": 30, "splash_dq": 70, "splash_dkv": 70}
    assert bundles.programs(jaxpr) == {"chunk_scan": 56} | attention
    assert bundles.programs(jaxpr, 2) == {"chunk_scan": 28} | attention


@pytest.mark.parametrize("window", [None, 256, 1024])
def test_programs_of_attention_are_those_of_its_mask(window):
    """2,048 tokens in blocks of 512: those pairs of blocks in which a query sees a key."""
    q = jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.float32)
    read = lambda q, k, v: splash.splash(q, k, v, jnp.zeros((1, 2048), jnp.int32), window, interpret=True).sum()
    found = bundles.programs(jax.make_jaxpr(jax.grad(read, (0, 1, 2)))(q, q, q).jaxpr)
    sees = lambda i, j: j <= i and (window is None or 512 * i - (512 * j + 511) < window)
    assert set(found.values()) == {2 * sum(sees(i, j) for i in range(4) for j in range(4))} and len(found) == 3


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_small_step_is_compiled_for_tpus(topology):
    """Of the state a quarter, what is not split and what pads it to tiles; weights are gathered in the loop over blocks."""
    pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "nested-jax[tpu]"')
    made = plan(CONFIG, topology, count_bundles=topology == "v5e:2x2")
    state = jax.eval_shape(lambda: init_train_state(CONFIG))
    assert 1 / 4 < made.arguments / size_of(state) < 1 / 2 and not made.excess
    found = {kernel.name.split("_")[2]: (kernel.runs, kernel.programs) for kernel in made.kernels}
    forward = 6 // made.chip.cores  # of two rows and a head, in any order
    assert found == {"fwd": (3, forward), "dq": (3, 6), "dkv": (3, 6)}, "attention and its derivatives, of each block"
    assert all((kernel.bundles > 100) == (topology == "v5e:2x2") for kernel in made.kernels)
    assert 0 < made.temporaries < made.chip.memory / 100 and made.chip == CHIPS[topology[:3]]
    matrices = sum(np.prod(w.shape) for w in jax.tree.leaves(state.params) if w.ndim > 1 and min(w.shape[-2:]) > 100)
    forward = 2 * 4 * 128 * (matrices - 256 * 128) + 3 * 4 * 4 * 128**2 * 128  # the embedding is looked up
    assert 3 < made.flops / forward < 3.1
    kinds = {(one.kind, one.axes, one.runs) for one in made.collectives}
    assert ("all-gather", ("fsdp",), 3) in kinds and any(axes == ("tensor",) for _, axes, _ in kinds)
    most = [cycles for *_, cycles in made.costly]
    assert len(most) == 10 and most == sorted(most, reverse=True) and sum(most) < sum(cycles for _, cycles in made.cycles)
    named = re.compile(r"\w+, [\w-]+ -> \(?\w+\[[\d,]+\]")
    assert all(named.match(name) and runs in (1, 3) for name, runs, _ in made.costly)
    assert made.turns == 2 * SMALL.layers, "of a loop over blocks, forward and backward"
    assert {runs for runs, _ in made.cycles} == {1, 3} and all(seconds > 0 for seconds in made.seconds.values())


HOPE = dataclasses.replace(preset("tiny-hope"), layers=2, width=128, heads=1, vocabulary=256, chunk=128, memory_hidden=32)
IN_CONTEXT = CMSConfig(hidden=(128, 128), periods=(256, 128), blocks=1)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:4x4x4", "v6e:2x4"])
def test_every_mesh_lies_on_every_slice(topology):
    """Of all its chips, of half of them, and of three, which are no box."""
    pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "nested-jax[tpu]"')
    devices = devices_of(topology)
    for count in (len(devices), len(devices) // 2, 3):
        for shape in _shapes(count):
            laid = [chip.id for chip in make_mesh(shape, devices).devices.ravel()]
            assert sorted(laid) == sorted(chip.id for chip in devices[:count]), shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "mesh", "cms"),
    [
        ("v5e:4x4", "data=2,fsdp=8", CMSConfig(hidden=(128,))),
        ("v5p:4x4x4", "data=8,fsdp=8", IN_CONTEXT),
        ("v6e:4x4", "fsdp=16", dataclasses.replace(IN_CONTEXT, scope="batch")),
        ("v6e:4x4", "data=4,fsdp=2,sequence=2", CMSConfig(hidden=(128,))),
    ],
    ids=str,
)
def test_hope_is_compiled_for_pods(topology, mesh, cms):
    """Frozen, learning in context for each sequence or for the batch, and with its stream on two devices."""
    pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "nested-jax[tpu]"')
    model = dataclasses.replace(HOPE, cms=cms)
    sizes = {"batch_size": 64, "window": 256, "mesh": mesh}
    made = plan(TrainConfig.from_preset("tiny-hope", model=model, **sizes), topology, count_bundles=False)
    assert made.fits and all(seconds > 0 for seconds in made.seconds.values())
    along = "sequence" in mesh
    chunks = HOPE.layers * 2 * 64 // (64 if topology == "v5p:4x4x4" else 16)
    each = [] if along else [(name, HOPE.layers, chunks, 0) for name in ("chunk_scan", "chunk_scan_backward")]
    assert sorted(made.kernels) == each, "one forward and one backward of each block, of a device's rows"
    assert made.chunks == ("by XLA's form: its tokens lie along the mesh's sequence" if along else "by Pallas' kernels")
    gathers = {axes for kind, axes in {(one.kind, one.axes) for one in made.collectives} if kind == "all-gather"}
    assert any("fsdp" in axes for axes in gathers)
    assert any("sequence" in one.axes for one in made.collectives) == ("sequence" in mesh)


@pytest.mark.slow
def test_topologies_and_meshes_that_there_are_not():
    pytest.importorskip("libtpu", reason='compiles for TPUs: pip install "nested-jax[tpu]"')
    with pytest.raises(UserError, match="--topology v5e:3x7: .*; give a shape that there is, such as v5e:4x4"):
        plan(CONFIG, "v5e:3x7")
    larger = dataclasses.replace(CONFIG, mesh="fsdp=4,tensor=2")
    with pytest.raises(UserError, match="--mesh fsdp=4,tensor=2 is 8 devices, there are 4: give fsdp=4"):
        plan(larger, "v5e:2x2")

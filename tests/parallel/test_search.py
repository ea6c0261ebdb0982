"""The search for flags under which a step takes least, with plans made up by a rule."""

import dataclasses

import jax
import pytest

from nested_jax import UserError, preset
from nested_jax.parallel.mesh import MeshShape, parse
from nested_jax.parallel.plan import Plan
from nested_jax.parallel.search import ranking, search
from nested_jax.train.config import TrainConfig

MODEL = dataclasses.replace(preset("tiny-gated-delta"), chunk=64)
CONFIG = TrainConfig.from_preset("tiny-gated-delta", model=MODEL, batch_size=8, window=128, mesh="fsdp=4")


def compiled(run, topology):
    """Fits with two pieces or blocks made again; tensor costs most, then blocks made again, the sequence, small chunks."""
    shape = parse(run.mesh)
    if run.batch_size > 16:
        raise UserError("too many rows")
    if run.batch_size % (shape.data * shape.fsdp):
        raise UserError("rows that the mesh does not divide")
    lacking = run.accumulate == 1 and run.model.memory_policy != "blocks"
    made_again = (run.model.memory_policy == "blocks") / 4
    times = 1 + shape.tensor + shape.sequence / 8 + made_again + 64 / run.model.chunk
    cost = 10**9 * run.batch_size * times
    cycles = [] if lacking else [(1, int(cost) + 10**9)]
    return Plan(topology, shape, 10**9, 10**9, 0, 10**12, [], cycles, 0, [], "20G of 16G" if lacking else "")


def test_one_flag_after_the_other():
    told = []
    trials = search(CONFIG, "v5e:2x2", compile=compiled, tell=told.append)
    assert len(told) == len(trials) and trials[0].rank == min(one.rank for one in trials)
    assert trials[0].flags == {"accumulate": 2, "model.chunk": 256, "batch_size": 16} and trials[0].tokens == 16 * 128
    assert not trials[-1].plan.fits and told[0].flags == {}  # as given it does not fit
    assert {one.plan.shape for one in trials} >= {MeshShape(fsdp=4), MeshShape(fsdp=2, tensor=2), MeshShape(data=2, fsdp=2)}


def test_pieces_are_of_the_rows_of_the_best_mesh_so_far():
    trials = search(dataclasses.replace(CONFIG, mesh="fsdp=2,tensor=2", accumulate=2), "v5e:2x2", compile=compiled)
    pieces = {one.flags.get("accumulate", 2) for one in trials if one.plan.shape == MeshShape(fsdp=4)}
    assert pieces == {1, 2}  # of 8 rows on fsdp=4; a device of the given mesh has 4
    assert {one.flags.get("model.memory_policy") for one in trials} == {None, "loops", "blocks"}


def test_a_few_long_rows_are_split_along_the_sequence():
    blocks = dataclasses.replace(MODEL, memory_policy="blocks")
    run = dataclasses.replace(CONFIG, model=blocks, batch_size=2, mesh="fsdp=2,tensor=2")
    trials = search(run, "v5e:2x2", compile=compiled)
    shapes = {"fsdp=2,tensor=2", "tensor=4", "fsdp=2,sequence=2", "sequence=4"}  # the rows refuse fsdp=4 and data=2,fsdp=2
    assert {one.plan.shape for one in trials} == {*map(parse, shapes)}
    assert trials[0].plan.shape == MeshShape(fsdp=2, sequence=2)


def test_a_ranking_names_the_flags_and_what_does_not_fit():
    trials = search(CONFIG, "v5e:2x2", compile=compiled)
    first, *rows = ranking(trials).splitlines()
    assert "tokens/s" in first and len(rows) == len(trials)
    assert rows[0].endswith("cycles, as the compiler estimates them; --accumulate 2 --model.chunk 256 --batch-size 16")
    assert "does not fit" in rows[-1] and rows[-1].split()[3] == "-"


def test_a_run_that_is_refused_as_given_is_an_error():
    with pytest.raises(UserError, match="too many rows"):
        search(dataclasses.replace(CONFIG, batch_size=32), "v5e:2x2", compile=compiled)


def test_meshes_are_of_all_chips_of_the_topology():
    """The given run leaves half of them out."""
    run = dataclasses.replace(CONFIG, batch_size=16)
    shapes = {one.plan.shape for one in search(run, "v5e:2x4", compile=compiled)}
    assert {parse("fsdp=4"), parse("fsdp=8"), parse("fsdp=4,tensor=2")} <= shapes


def test_what_the_compiler_cannot_do_ends_no_search():
    def failing(run, topology):
        if run.model.memory_policy == "loops":
            raise jax.errors.JaxRuntimeError("INTERNAL: a compiler's fault")
        return compiled(run, topology)

    trials = search(CONFIG, "v5e:2x2", compile=failing)
    assert trials[0].flags == {"accumulate": 2, "model.chunk": 256, "batch_size": 16}

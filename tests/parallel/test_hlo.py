"""Lines of compiled programs, as XLA prints them for several kinds of devices, against what they say."""

import pytest

from nested_jax.parallel import hlo
from nested_jax.parallel.mesh import MeshShape

MESH = MeshShape(data=2, fsdp=2, tensor=2)
PAIRS = "(f32[500]{0}, f32[5]{0}), (f32[1000]{0}, f32[10]{0})"
TILED = "bf16[8,64]{1,0:T(8,128)(2,1)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, u32[], u32[]"
LINES = {  # what follows a name: kind, axes, bytes sent
    "f32[1000]{0} all-reduce(%a), replica_groups={}": ("all-reduce", ("data", "fsdp", "tensor"), 7000),
    "(f32[1000]{0}, f32[10]{0}) all-reduce-start(%a, %b), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}": (
        "all-reduce",
        ("tensor",),
        4040,
    ),
    f"({PAIRS}) all-gather-start(%a, %b), replica_groups=[4,2]<=[2,2,2]T(0,2,1)": ("all-gather", ("fsdp",), 2020),
    f"({TILED}) collective-permute-start(%a), source_target_pairs={{{{0,4}},{{4,0}}}}": (
        "collective-permute",
        ("data",),
        1024,
    ),
    "f8e4m3fn[1000]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], to_apply=%add": (
        "reduce-scatter",
        ("data", "fsdp", "tensor"),
        7000,
    ),
    "f32[4]{0} all-reduce(%a), replica_groups=mesh['a'=8], device_ids=([8]) {'a':(1)2, 'a':(4)2}, to_apply=%add": (
        "all-reduce",
        ("data", "tensor"),
        24,
    ),
    "f32[4]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=4] {'b'}": ("all-reduce", ("fsdp", "tensor"), 24),
}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_what_a_collective_sends_and_along_what(line):
    program = hlo.parse(f"ENTRY %main (a: f32[4]) -> f32[4] {{\n  %a = f32[4]{{0}} parameter(0)\n  ROOT %x = {line}\n}}\n")
    (found,) = hlo.collectives(program, MESH)
    assert (found.kind, found.axes, found.sent) == LINES[line] and found.runs == 1


def test_a_loop_turns_as_often_as_a_whole_number_says():
    """Not as a float that its condition compares with."""
    text = """%less (p: (s32[], f32[])) -> pred[] {
  %limit = f32[] constant(1000)
  %most = s32[] constant(12)
}
%body (p: (s32[], f32[])) -> (s32[], f32[]) {
  %g = f32[4]{0} all-gather(%a), replica_groups={{0,1}}
}
ENTRY %main (a: f32[4]) -> f32[4] {
  ROOT %loop = (s32[], f32[]) while(%t), condition=%less, body=%body
}
"""
    (found,) = hlo.collectives(hlo.parse(text), MESH)
    assert found.runs == 12
    known = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.collectives(hlo.parse(known), MESH)[0].runs == 5


def test_alike_collectives_of_one_computation_all_count():
    """Keys and values gathered by one call of `jax.shard_map` have one channel and one name; a copy elsewhere is one."""
    gather = 'all-gather(%a), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, metadata={op_name="jit(f)/all_gather"}'
    text = f"""%copy (a: f32[4]) -> f32[4] {{
  ROOT %x = f32[4]{{0}} {gather}
}}
ENTRY %main (a: f32[4]) -> f32[4] {{
  %x = f32[4]{{0}} {gather}
  %y = f32[4]{{0}} {gather}
  ROOT %z = f32[4]{{0}} fusion(%x), kind=kCustom, calls=%copy
}}
"""
    (found,) = hlo.collectives(hlo.parse(text), MESH)
    assert (found.runs, found.sent) == (2, 2 * 8)


def test_a_fused_reduce_scatter_sends_half_of_an_all_reduce():
    text = """%all-reduce-scatter.3 (a: f32[1000]) -> f32[125] {
  %whole = f32[1000]{0} all-reduce(%a), channel_id=1, replica_groups={}
  ROOT %own = f32[125]{0} dynamic-slice(%whole, %i), dynamic_slice_sizes={125}
}
ENTRY %main (a: f32[1000]) -> f32[125] {
  ROOT %x = f32[125]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.3
}
"""
    (found,) = hlo.collectives(hlo.parse(text), MESH)
    assert (found.kind, found.sent) == ("reduce-scatter", 3500)


def test_of_a_conditional_the_costly_branch_counts():
    cost = lambda cycles: f'backend_config={{"estimated_cycles":"{cycles}"}}'
    text = f"""%short (a: f32[4]) -> f32[4] {{
  %b = f32[4]{{0}} add(%a, %a), {cost(10)}
  ROOT %c = f32[4]{{0}} add(%b, %b), {cost(10)}
}}
%long (a: f32[4]) -> f32[4] {{
  ROOT %d = f32[4]{{0}} multiply(%a, %a), {cost(70)}
}}
ENTRY %main (a: f32[4]) -> f32[4] {{
  ROOT %x = f32[4]{{0}} conditional(%p, %a, %a), branch_computations={{%short, %long}}
}}
"""
    assert hlo.runs(hlo.parse(text)) == {"main": 1, "long": 1}
    assert hlo.runs(hlo.parse(text.replace("estimated", "no"))) == {"main": 1, "short": 1}

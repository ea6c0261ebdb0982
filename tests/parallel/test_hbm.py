"""Lines of programs for TPUs, as XLA prints them, against the bytes that they stand for."""

import pytest

from nested_jax.parallel import hbm, hlo

# In HBM f32[8,64] takes 4096 bytes, in tiles of 8 x 128; S(1) is VMEM.
PROGRAM = """%fused (p0: f32[12,8,64], p1: s32[]) -> f32[8,64] {
  %p0 = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %part = f32[1,8,64]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,64}
  ROOT %one = f32[8,64]{1,0:T(8,128)} bitcast(%part)
}
%put (p0: f32[12,8,64], p1: f32[8,64], p2: s32[]) -> (f32[12,8,64], f32[8,64]) {
  %p0 = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[8,64]{1,0:T(8,128)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %one = f32[1,8,64]{2,1,0:T(8,128)} bitcast(%p1)
  %all = f32[12,8,64]{2,1,0:T(8,128)} dynamic-update-slice(%p0, %one, %p2, %p2, %p2)
  %twice = f32[8,64]{1,0:T(8,128)} add(%p1, %p1)
  ROOT %both = (f32[12,8,64]{2,1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)}) tuple(%all, %twice)
}
%body (s: (s32[], f32[12,8,64])) -> (s32[], f32[12,8,64]) {
  %s = (s32[]{:T(128)S(1)}, f32[12,8,64]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(1)} get-tuple-element(%s), index=0
  %w = f32[12,8,64]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %one = f32[8,64]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%fused
  %two = f32[8,64]{1,0:T(8,128)} add(%one, %one)
  %both = (f32[12,8,64]{2,1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)S(1)}) fusion(%w, %two, %i), kind=kLoop, calls=%put
  %all = f32[12,8,64]{2,1,0:T(8,128)} get-tuple-element(%both), index=0
  ROOT %t = (s32[]{:T(128)S(1)}, f32[12,8,64]{2,1,0:T(8,128)}) tuple(%i, %all)
}
%less (s: (s32[], f32[12,8,64])) -> pred[] {
  %n = s32[] constant(12)
}
ENTRY %main (w: f32[12,8,64]) -> (s32[], f32[12,8,64]) {
  %w = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(1)} constant(0)
  %t = (s32[]{:T(128)S(1)}, f32[12,8,64]{2,1,0:T(8,128)}) tuple(%i, %w)
  ROOT %loop = (s32[]{:T(128)S(1)}, f32[12,8,64]{2,1,0:T(8,128)}) while(%t), condition=%less, body=%body
}
"""


def test_bytes_that_go_to_and_fro():
    """A turn reads a slice of the stack, writes the sum, reads it and writes it into the stack."""
    assert hbm.traffic(hlo.parse(PROGRAM)) == 12 * 4 * 4096


HANDING_ON = """%fused (p0: f32[12,8,64], p1: f32[8,64], p2: f32[8,64]) -> (f32[8,64], f32[12,8,64], f32[32,64]) {
  %p0 = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %p1 = f32[8,64]{1,0:T(8,128)} parameter(1)
  %p2 = f32[8,64]{1,0:T(8,128)} parameter(2)
  %twice = f32[8,64]{1,0:T(8,128)} add(%p1, %p1)
  %all = f32[32,64]{1,0:T(8,128)} all-gather(%p2), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %t = (f32[8,64]{1,0:T(8,128)}, f32[12,8,64]{2,1,0:T(8,128)}, f32[32,64]{1,0:T(8,128)}) tuple(%twice, %p0, %all)
}
ENTRY %main (w: f32[12,8,64], x: f32[8,64]) -> (f32[8,64], f32[12,8,64], f32[32,64]) {
  %w = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %x = f32[8,64]{1,0:T(8,128)} parameter(1)
  ROOT %y = (f32[8,64]{1,0:T(8,128)}, f32[12,8,64]{2,1,0:T(8,128)}, f32[32,64]{1,0}) fusion(%w, %x, %x), calls=%fused
}
"""


def test_a_fusion_that_hands_a_gathering_on_moves_its_own_arrays_alone():
    assert hbm.traffic(hlo.parse(HANDING_ON)) == 2 * 4096


STACK, SLICE = "f32[12,8,64]{2,1,0:T(8,128)}", "f32[4,8,64]{2,1,0:T(8,128)S(1)}"
LINES = {  # of an array of 12 x 4096 bytes in HBM
    f"(({STACK}), {SLICE}, s32[]{{:S(2)}}) slice-start(%a), slice={{[0:4], [0:8], [0:64]}}": 4 * 4096,
    f"({STACK[:-1]}S(1)}}, {STACK}, u32[]{{:S(2)}}) copy-start(%a)": 12 * 4096,
    f"{STACK} copy(%a)": 2 * 12 * 4096,
    f"{SLICE} slice(%a), slice={{[0:4], [0:8], [0:64]}}": 4 * 4096,
    f'{STACK} custom-call(), custom_call_target="AllocateBuffer"': 0,
}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_an_instruction_moves_what_it_touches(line):
    program = hlo.parse(f"ENTRY %main (a: f32[12,8,64]) -> f32[] {{\n  %a = {STACK} parameter(0)\n  ROOT %x = {line}\n}}\n")
    assert hbm.traffic(program) == LINES[line]


def test_what_loops_carry():
    (found,) = hbm.carried(hlo.parse(PROGRAM))
    turns, laid, count = found
    assert (turns, count, laid.shape, laid.bytes, laid.padded) == (12, 1, "f32[12,8,64]", 12 * 2048, 12 * 4096)


@pytest.mark.parametrize(
    ("text", "padded"),
    [
        ("f32[6,128,64]{2,1,0:T(8,128)}", 6 * 128 * 128 * 4),
        ("f32[6,128,64]{1,2,0:T(8,128)}", 6 * 128 * 64 * 4),  # the 128 adjoin
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),
        ("f32[3,5]{1,0}", 60),
        ("pred[]", 1),
    ],
)
def test_tiles_are_filled_up(text, padded):
    assert hbm.arrays(text)[0].padded == padded


def test_a_slice_that_is_put_into_an_array_is_all_that_moves():
    text = """ENTRY %main (w: f32[12,8,64], x: f32[1,8,64]) -> f32[12,8,64] {
  %w = f32[12,8,64]{2,1,0:T(8,128)} parameter(0)
  %x = f32[1,8,64]{2,1,0:T(8,128)} parameter(1)
  %i = s32[]{:T(128)S(1)} constant(0)
  ROOT %all = f32[12,8,64]{2,1,0:T(8,128)} dynamic-update-slice(%w, %x, %i, %i, %i)
}
"""
    assert hbm.traffic(hlo.parse(text)) == 2 * 4096

"""Shapes of meshes from flags: what fits, and one line with the nearest that does for what does not."""

import math

import jax
import pytest

from nested_jax import UserError
from nested_jax.parallel.mesh import Divided, MeshShape, choose, make_mesh, parse
from nested_jax.train.state import open_mesh

SIZES = Divided(rows=8, width=128, tensor=(4, 280, 1024), tokens=512)


@pytest.mark.parametrize(
    "text", ["data", "data=0", "data=-1", "model=2", "data=2,data=4", "data=2;fsdp=4", "data=2.0", ",", "data=2,"]
)
def test_what_is_no_mesh(text):
    with pytest.raises(UserError, match=r"--mesh .*: give sizes of some of data, fsdp, tensor, sequence, each once"):
        parse(text)


@pytest.mark.parametrize(
    "text, devices, remedy",
    [
        ("data=4,fsdp=4", 8, "is 16 devices, there are 8: give data=2,fsdp=4"),
        ("data=16", 16, "give data=8,tensor=2"),
        ("tensor=8", 8, "give fsdp=2,tensor=4"),
        ("sequence=3", 3, "give sequence=2"),
        ("data=7", 7, "give data=4"),
    ],
)
def test_the_nearest_mesh_is_named(text, devices, remedy):
    with pytest.raises(UserError) as error:
        choose(text, devices, SIZES)
    assert str(error.value).startswith(f"--mesh {text} ") and str(error.value).endswith(remedy)


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 256])
def test_without_a_flag_rows_are_split(devices):
    shape = choose(None, devices, SIZES)
    assert shape == MeshShape(fsdp=min(2 ** int(math.log2(devices)), 8)) and SIZES.by(shape)
    assert choose(None, 6, SIZES._replace(rows=6)) == MeshShape(data=3, fsdp=2)  # three do not divide the width


class Chip:
    """A device of a slice, as far as `mesh_utils` looks at it."""

    platform, device_kind, process_index = "cpu", "cpu", 0

    def __init__(self, index, count):
        self.id, self.slice_index = index, index // count

    def __repr__(self):
        return f"chip {self.id}"


def test_data_goes_across_slices(monkeypatch):
    """Each slice holds whole groups of data; too few groups, and too few devices, are errors."""
    chips = [Chip(n, 4) for n in range(8)]
    laid = make_mesh(MeshShape(data=4, tensor=2), chips).devices
    slices = [{chip.slice_index for chip in group.ravel()} for group in laid]
    assert sorted(map(tuple, slices)) == [(0,), (0,), (1,), (1,)]
    assert choose(None, 8, SIZES, slices=2) == MeshShape(data=2, fsdp=4)
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "device_count", lambda: len(chips))
    assert open_mesh(None, SIZES).shape["data"] == 2
    assert choose(None, 8, SIZES._replace(rows=3), slices=2) == MeshShape(data=3)  # of one slice
    assert choose(None, 8, SIZES._replace(rows=6, width=1), slices=2) == MeshShape(data=3)  # not of three in each
    with pytest.raises(UserError, match="mesh fsdp=4,tensor=2 on 2 slices: give a multiple of 2 as data"):
        make_mesh(MeshShape(fsdp=4, tensor=2), chips)
    with pytest.raises(UserError, match="mesh data=6 takes 4 and 2 devices of 2 slices: give one that takes all, or"):
        make_mesh(MeshShape(data=6), chips)
    with pytest.raises(UserError, match="mesh data=16 is 16 devices, there are 8: give a smaller one"):
        make_mesh(MeshShape(data=16), chips)

"""Collectives of compiled programs, against what is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nested_jax.parallel import hlo
from nested_jax.parallel.mesh import MeshShape, make_mesh

SHAPE = MeshShape(data=2, fsdp=2, tensor=2)


def compiled(function, *arrays):
    mesh = make_mesh(SHAPE)
    laid = [jax.device_put(jnp.ones(shape, jnp.float32), NamedSharding(mesh, spec)) for shape, spec in arrays]
    with jax.set_mesh(mesh):
        return hlo.collectives(hlo.parse(jax.jit(function).lower(*laid).compile().as_text()), SHAPE)


def place(x, *spec):
    return jax.lax.with_sharding_constraint(x, P(*spec))


def test_each_kind_along_its_axes():
    """A sum of partial products, a gathered matrix, a shift along an axis: 2(n-1)/n, (n-1)/n and all of the bytes."""
    product = compiled(
        lambda x, w: place(x @ w, ("fsdp", "data")), ((8, 16), P(("fsdp", "data"), "tensor")), ((16, 4), P("tensor"))
    )
    assert [one[:4] for one in product] == [("all-reduce", ("tensor",), "f32[2,4]", 1)] and product[0].sent == 2 * 4 * 4
    gathered = compiled(lambda w: place(w, None, "tensor"), ((16, 4), P("fsdp", "tensor")))
    assert [one[:4] for one in gathered] == [("all-gather", ("fsdp",), "f32[16,2]", 1)] and gathered[0].sent == 16 * 2 * 2
    shift = lambda x: jax.shard_map(
        lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), in_specs=P("data"), out_specs=P("data")
    )(x)
    shifted = compiled(shift, ((8, 4), P("data")))
    assert [one[:4] for one in shifted] == [("collective-permute", ("data",), "f32[4,4]", 1)] and shifted[0].sent == 64
    both = compiled(lambda x: x.sum(0), ((8, 4), P(("fsdp", "data"))))
    assert [(one.kind, one.axes) for one in both] == [("all-reduce", ("data", "fsdp"))] and both[0].sent == 2 * 16 * 3 // 4


def test_what_is_in_a_loop_counts_as_often_as_it_turns():
    """In a loop within a loop: 3 times 5."""

    def loop(x, w):
        inner = lambda x, _: (place(jnp.tanh(x @ w), ("fsdp", "data"), "tensor"), None)
        outer = lambda x, _: (jax.lax.scan(inner, jnp.cos(x), length=5)[0], None)
        return jax.lax.scan(outer, x, length=3)[0]

    found = compiled(loop, ((8, 16), P(("fsdp", "data"), "tensor")), ((16, 16), P(None, "tensor")))
    assert sum(one.runs for one in found if one.axes == ("tensor",)) == 15
    assert np.sum([one.sent for one in found]) == 15 * (2 * 16 * 4) // 2
    assert hlo.by_kind(found)[0][:3] == ("all-gather", ("tensor",), 15)

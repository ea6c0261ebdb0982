"""Local surprise: of every linear layer, x^T delta is the gradient; by one backward pass; and what descends by it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.optimize import minimize

from nested_jax import LanguageModel, local_surprise, optim, preset
from nested_jax.errors import UserError
from nested_jax.jaxpr.transparent import transparent
from nested_jax.paths import path_name
from nested_jax.surprise import layers, surprise_and_grad


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def squared(forward):
    return lambda params, x: jnp.sum(jnp.sin(forward(params, x)) ** 2) / 2


def outer(pair, stacked=0):
    """x^T delta, summed over the examples, one pair at a time: the definition."""
    if stacked:
        return jnp.stack([outer(jax.tree.map(lambda a, i=i: a[i], pair), stacked - 1) for i in range(len(pair.inputs))])
    x, delta = (a.reshape(-1, a.shape[-1]) for a in pair)
    return sum(jnp.outer(x[i], delta[i]) for i in range(len(x)))


def explains(loss, params, batch, *paths, transposed=(), apart=True):
    """Asserts that the pairs are of these paths, each of the gradient's matrix, and returns them."""
    alone = (lambda *given: local_surprise(loss, *given)) if apart else lambda *given: None  # without the gradient
    both = lambda *given: (surprise_and_grad(loss, *given), jax.value_and_grad(loss)(*given), alone(*given))
    (value, gradient, pairs), expected, same = jax.jit(both)(params, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), (value, gradient), expected)
    gradients = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    for key, pair in pairs.items():
        path, run = layers(key)
        leaf = gradients[path].T if path in transposed else gradients[path][run]
        got = outer(pair, leaf.ndim - 2)
        np.testing.assert_allclose(got, leaf.reshape(got.shape), rtol=1e-9, atol=1e-10, err_msg=key)
    assert set(pairs) == set(paths)
    if apart:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), same, pairs)
    return pairs


x = normal(0, 5, 3)
w, v, u = normal(1, 3, 4), normal(2, 4, 4), normal(3, 4, 3)
stack = normal(4, 6, 4, 4) / 2
gelu = jax.custom_jvp(jnp.tanh)
gelu.defjvp(lambda p, t: (jnp.tanh(p[0]), (1 - jnp.tanh(p[0]) ** 2) * t[0]))


@jax.custom_jvp
def dense(x, w):
    return jnp.tanh(x @ w)


@dense.defjvp
def dense_jvp(primals, tangents):
    """A third of the derivative, so that it is seen whether the rule is kept."""
    (x, w), (dx, dw), y = primals, tangents, dense(*primals)
    return y, (1 - y**2) * (dx @ w + x @ dw) / 3


layer = lambda x, w: (jnp.tanh(x @ w), None)
through_scan = lambda x, ws: jax.lax.scan(layer, x, ws)[0]
CASES = {
    "product": (lambda p, x: x @ p["a"], {"a": w}),
    "two layers, biases": (lambda p, x: jnp.tanh(x @ p["a"] + p["b"][None]) @ p["c"], {"a": w, "b": v[0], "c": u}),
    "einsum": (lambda p, x: jnp.einsum("bi,io->ob", x, p["a"]), {"a": w}),
    "kernel on the left": (lambda p, x: jax.lax.dot_general(p["a"], x, (((0,), (1,)), ((), ()))), {"a": w}),
    "turned twice": (lambda p, x: x @ p["a"].T.reshape(4, 1, 3).transpose(1, 2, 0)[0], {"a": w}),
    "one input, one output": (lambda p, x: x[:, :1] @ p["a"][None] @ p["c"][:, None], {"a": w[0], "c": w[0]}),
    "column": (lambda p, x: x @ p["a"], {"a": w[:, :1]}),
    "row": (lambda p, x: x[:, :1] @ p["a"], {"a": w[:1]}),
    "jit": (lambda p, x: jax.jit(lambda a, x: jax.jit(jnp.matmul)(x, a))(p["a"], x), {"a": w}),
    "turned in jit": (lambda p, x: x @ jax.jit(lambda p: jax.tree.map(jnp.transpose, p))({"b": p["a"].T})["b"], {"a": w}),
    "checkpoint": (lambda p, x: jax.checkpoint(lambda x: jnp.tanh(x @ p["a"]) @ p["b"])(x), {"a": w, "b": v}),
    "custom_jvp": (lambda p, x: gelu(x @ p["a"]) @ p["b"], {"a": w, "b": v}),
    "layer in custom_jvp": (lambda p, x: dense(dense(x, p["a"]), p["b"]), {"a": w, "b": v}),
    "scan over layers": (lambda p, x: through_scan(x @ p["a"], p["s"]), {"a": w, "s": stack}),
    "reversed": (lambda p, x: jax.lax.scan(layer, x, p["s"], reverse=True)[0], {"s": stack[:, :3, :3]}),
    "checkpointed scan": (lambda p, x: jax.lax.scan(jax.checkpoint(layer), x @ p["a"], p["s"])[0], {"a": w, "s": stack}),
    "custom_jvp in a scan": (lambda p, x: jax.lax.scan(lambda x, w: (dense(x, w), None), x @ p["a"], p["s"])[0],
                             {"a": w, "s": stack}),
    "scans of layers in parts": (
        lambda p, x: jax.lax.scan(lambda x, ws: (through_scan(x, ws), None), x @ p["a"], p["s"].reshape(2, 3, 4, 4))[0],
        {"a": w, "s": stack}),
    "layers cut in two": (lambda p, x: through_scan(through_scan(x @ p["a"], p["s"][:2]), p["s"][2:]), {"a": w, "s": stack}),
    "layers one by one": (lambda p, x: jnp.tanh(jnp.tanh(x @ p["s"][1] @ p["s"][0]) @ p["s"][2]), {"s": stack[:3, :3, :3]}),
    "layers cut again": (
        lambda p, x: through_scan(through_scan(through_scan(x, p["s"][2:][2:]), p["s"][2:][:2]), p["s"][:2]),
        {"s": stack[:, :3, :3]}),
    "layers unstacked": (lambda p, x: x @ jnp.unstack(p["s"])[0] @ jnp.unstack(p["s"])[1], {"s": stack[:2, :3, :3]}),
    "layers split": (lambda p, x: through_scan(through_scan(x, jnp.split(p["s"], 2)[1]), jnp.split(p["s"], 2)[0]),
                     {"s": stack[:, :3, :3]}),
    "scan over time": (lambda p, x: jax.lax.scan(lambda h, x: (jnp.tanh(h @ p["h"] + x @ p["a"]),) * 2, v[0], x)[1],
                       {"a": w, "h": v}),
    "carried along": (
        lambda p, x: jnp.matmul(*jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (v, p["h"]), x)[0]),
        {"h": v}),
    "layers in time": (lambda p, x: jax.lax.scan(lambda h, x: (through_scan(h + x[None], p["s"]),) * 2, x, x)[1],
                       {"s": stack[:, :3, :3]}),
    "heads": (lambda p, x: jnp.einsum("hbi,hio->bho", jnp.stack([x, 2 * x]), p["a"]), {"a": normal(5, 2, 3, 4)}),
    "layers of the same inputs": (lambda p, x: jax.vmap(lambda w: x @ w)(p["a"]), {"a": normal(5, 2, 3, 4)}),
    "layers of the same inputs, some": (
        lambda p, x: jnp.concatenate([jnp.einsum("bi,lio->blo", x, p["a"][:2]), (x @ p["a"][2])[:, None]], axis=1),
        {"a": normal(5, 3, 3, 4)}),
    "heads of layers of the same inputs": (lambda p, x: jnp.einsum("hbi,lhio->blho", jnp.stack([x, 2 * x]), p["a"]),
                                           {"a": normal(5, 3, 2, 3, 4)}),
    "shared": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"], {"a": w[:, :3]}),
    "shared by other examples": (lambda p, x: jnp.concatenate([x @ p["a"], x[:2] @ p["a"]]), {"a": w}),
    "mapped": (lambda p, x: jax.vmap(lambda x: x @ p["a"])(x), {"a": w}),
    "custom_vjp": (lambda p, x: own_vjp(x @ p["a"], 1 + x[:4, :1]) * (x[:, :2] @ p["b"]), {"a": w, "b": v[:2]}),
    "dropped": (lambda p, x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, (5, 4)), x @ p["a"], 0), {"a": w}),
    "carried to the next": (lambda p, x: jax.lax.scan(
        lambda c, _: ((c[1], jnp.tanh(c[1] @ p["h"]), c[2] + 1), None), (v, v, 0), None, length=3)[0][0], {"h": v}),
    "no gradient beside it": (lambda p, x: x @ p["a"] + jax.lax.stop_gradient(jnp.sum(p["a"] ** 2)), {"a": w}),
    "a sign beside it": (lambda p, x: jnp.where(p["a"].sum() > 0, 1, 2) * (x @ p["a"]), {"a": w}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pairs_are_the_gradient(x64, case):
    forward, params = CASES[case]
    matrices = [path for path, leaf in params.items() if leaf.ndim > 1]
    if case == "one input, one output":  # vectors that are used as matrices are none
        with pytest.raises(UserError, match="no linear layer"):
            local_surprise(squared(forward), params, x)
        return
    pairs = explains(squared(forward), params, x, *matrices)
    for path in matrices:
        *stacked, _, _ = params[path].shape
        assert list(pairs[path].inputs.shape[: len(stacked)]) == stacked


def test_casts(x64):
    """To float32 before the product, in a function of its own: the gradient is the pairs', once rounded."""
    cast = jax.jit(lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.float32).astype(jnp.float64), p))
    loss = squared(lambda p, x: x @ cast(p)["a"])
    _, gradient, pairs = surprise_and_grad(loss, {"a": w}, x)
    np.testing.assert_array_equal(gradient["a"], np.float32(pairs["a"].inputs.T @ pairs["a"].surprise))


@jax.custom_vjp
def own_vjp(x, w):
    return x @ w


own_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T, kept[0].T @ d))

LEFT_OUT = {
    "changed": lambda p, x: x @ p["a"] @ (2 * p["b"]),
    "in the loss's decay": lambda p, x: x @ p["a"] @ p["b"] + jnp.sum(p["b"] ** 2),
    "looked up": lambda p, x: x @ p["a"] @ p["b"] + p["b"][jnp.arange(5) % 4],
    "both ways": lambda p, x: x @ p["a"] @ p["b"] @ p["b"].T,
    "times another": lambda p, x: x @ p["a"] @ p["b"] + x @ (p["c"] @ p["b"]),
    "per row": lambda p, x: jax.vmap(lambda x, b: x @ p["a"] @ (b - 0.1 * jnp.outer(x @ p["a"], x @ p["a"])), (0, 0))(
        x, jnp.broadcast_to(p["b"], (5, 4, 4))),
    "in pieces": lambda p, x: jnp.concatenate([x @ p["a"] @ p["b"][:, :2], x @ p["a"] @ p["b"][:, 2:]], axis=1),
    "shuffled": lambda p, x: x @ p["a"] @ p["b"].reshape(2, 2, 4).transpose(1, 0, 2).reshape(4, 4),
    "an axis in two roles": lambda p, x: jnp.einsum("bi,bh,iho->bo", x @ p["a"], x[:, :2], p["b"].reshape(4, 2, 2)),
    "heads of one axis": lambda p, x: jnp.einsum("bhi,iho->bho", jnp.stack([x @ p["a"]] * 2, 1), p["b"].reshape(4, 2, 2)),
    "in a rule of its own": lambda p, x: own_vjp(x @ p["a"], p["b"]),
    "in a branch": lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ p["b"], lambda y: y @ (p["b"] + 1), x @ p["a"]),
    "cut across": lambda p, x: (x @ p["a"])[:, :2] @ p["b"].reshape(16)[:8].reshape(2, 4),
    "taking turns": lambda p, x: x @ p["a"] @ p["b"] + jax.lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[2], c[1]), None), (x @ p["a"], p["b"], v), None, length=3)[0][0],
    "carried and changed": lambda p, x: jax.lax.scan(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None), (x @ p["a"], p["b"]), None, length=3)[0][0],
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_kernels_with_other_uses_are_left_out(x64, case):
    explains(squared(LEFT_OUT[case]), {"a": w, "b": v, "c": w}, x, "a", apart=False)


def test_a_rule_of_its_own_is_entered_where_it_is_said_to_equal_its_bodys(x64):
    """By a mark, and by no name."""

    def mixflow_gradient(x, w):
        return jnp.sin(x @ w)

    def keep(x, w):
        return jnp.sin(x @ w), (x, w)

    def pull(kept, d):
        x, w = kept
        d = d * jnp.cos(x @ w)
        return d @ w.T, x.T @ d

    for body, paths in ((lambda x, w: transparent(mixflow_gradient(x, w)), "ab"), (mixflow_gradient, "a")):
        inner = jax.custom_vjp(body)
        inner.defvjp(keep, pull)
        explains(squared(lambda p, x, inner=inner: inner(x @ p["a"], p["b"])), {"a": w, "b": v}, x, *paths)


def test_layers_of_a_stack_that_are_not_alike_have_keys_of_their_own(x64):
    def forward(p, x):
        x = through_scan(x, p["s"][:4])
        return x @ (p["s"][4] + 1) @ p["s"][5]

    pairs = explains(squared(forward), {"s": stack[:, :3, :3]}, x, "s[0:4]", "s[5:6]")
    assert pairs["s[0:4]"].inputs.shape == (4, 5, 3)
    again = lambda p, x: through_scan(x, p["s"]) @ p["s"][2]
    pairs = explains(squared(again), {"s": stack[:, :3, :3]}, x, "s[0:2]", "s[2:3]", "s[3:6]", apart=False)
    assert pairs["s[2:3]"].inputs.shape == (1, 10, 3)
    ragged = lambda p, x: x @ p["s"][0], lambda p, x: x[:2] @ p["s"][1]
    explains(squared(lambda p, x: jnp.concatenate([f(p, x) for f in ragged])), {"s": stack[:2]}, normal(0, 5, 4),
             "s[0:1]", "s[1:2]")  # fmt: skip


def test_a_kernel_stored_the_other_way_and_one_of_many_axes(x64):
    explains(squared(lambda p, x: x @ p["a"].T), {"a": w.T}, x, "a", transposed=("a",))
    heads = lambda p, x: jnp.einsum("bthk,hko->bto", jnp.einsum("btd,dhk->bthk", x, p["q"]), p["o"])
    params = {"q": normal(6, 3, 2, 4), "o": normal(7, 2, 4, 5)}
    batch = normal(8, 2, 5, 3)
    pairs = local_surprise(squared(heads), params, batch)
    gradient = jax.grad(squared(heads))(params, batch)
    assert pairs["o"].inputs.shape == (2, 5, 8) and pairs["q"].surprise.shape == (2, 5, 8)
    for path in params:
        np.testing.assert_allclose(outer(pairs[path]).reshape(params[path].shape), gradient[path], rtol=1e-10)


def test_layers_that_make_one_axis_of_outputs(x64):
    """Then the kernel has several axes out."""
    fused = squared(lambda p, x: x @ p["a"].transpose(1, 0, 2).reshape(3, 8))
    params = {"a": normal(5, 2, 3, 4)}
    (pair,) = local_surprise(fused, params, x).values()
    assert pair.inputs.shape == (5, 3) and pair.surprise.shape == (5, 8)
    gradient = jax.grad(fused)(params, x)["a"]
    np.testing.assert_allclose(outer(pair).reshape(3, 2, 4).swapaxes(0, 1), gradient, rtol=1e-10)


def test_keys_that_could_be_read_in_two_ways_are_refused():
    both = squared(lambda p, x: x @ p["a/b"] + x @ p["a"]["b"])
    with pytest.raises(
        UserError, match=r"^local_surprise: .*\['a'\]\['b'\] and \['a/b'\] are both named a/b: give"
    ) as error:
        local_surprise(both, {"a/b": w, "a": {"b": w}}, x)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"parameter s\[0:2\] is named as layers of s are: give it another name"):
        local_surprise(squared(lambda p, x: x @ p["s[0:2]"]), {"s[0:2]": w}, x)
    keys = local_surprise(squared(lambda p, x: x @ p["s[0]"]), {"s[0]": w}, x)
    assert [layers(key) for key in keys] == [("s[0]", slice(None))]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs, param_dtype=jnp.float64)
        self.heads = nnx.LinearGeneral(8, (2, 4), rngs=rngs, param_dtype=jnp.float64)
        self.mix = nnx.Einsum("bhk,hko->bo", (2, 4, 5), rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.LayerNorm(5, rngs=rngs, param_dtype=jnp.float64)
        self.blocks = nnx.List([nnx.Linear(5, 5, rngs=rngs, param_dtype=jnp.float64) for _ in range(2)])

    def __call__(self, x):
        x = self.norm(self.mix(self.heads(nnx.gelu(self.first(x)))))
        for block in self.blocks:
            x = x + block(nnx.relu(x))
        return x


def test_flax_modules(x64):
    model = Net(nnx.Rngs(0))
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)) ** 2)
    both = nnx.jit(lambda model, x: (surprise_and_grad(loss, model, x), nnx.grad(loss)(model, x)))
    (_, gradient, pairs), expected = both(model, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), gradient, expected)
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)}
    assert set(pairs) == {f"{layer}/kernel" for layer in ("first", "heads", "mix", "blocks/0", "blocks/1")}
    for path, pair in pairs.items():
        np.testing.assert_allclose(outer(pair).reshape(flat[path].shape), flat[path], rtol=1e-9, atol=1e-12)


def language_model(preset_name, **fields):
    config = preset(preset_name)
    cms = dataclasses.replace(config.cms, hidden=(12,) * len(config.cms.hidden), periods=(16, 8)[: len(config.cms.periods)])
    small = {"vocabulary": 32, "width": 16, "heads": 2, "layers": 2, "chunk": 8, "memory_hidden": 4, "cms": cms}
    config = dataclasses.replace(config, **(small | fields))
    graph, weights = nnx.split(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)

    def loss(weights, tokens):
        model = nnx.merge(graph, nnx.State(weights))
        logits, _ = model(tokens[:, :-1], model.init_state(2))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    weights = jax.tree.map(lambda w: w.astype(jnp.float64), nnx.to_pure_dict(weights))
    return loss, weights, jax.random.randint(jax.random.key(1), (2, 17), 0, 32)


@pytest.mark.parametrize(
    ("preset_name", "fields", "mixer", "others"),
    [
        pytest.param("tiny-transformer", {}, ("query", "key", "value", "out"), ("head",), marks=pytest.mark.slow),
        pytest.param(  # the head is the embedding
            "tiny-gated-delta",
            {"tie_embeddings": True},
            ("query", "key", "value", "gates", "out"),
            (),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_language_models(x64, preset_name, fields, mixer, others):
    paths = [f"blocks/mixer/{kernel}" for kernel in mixer] + [f"blocks/cms/level1/{m}" for m in ("up", "gate", "down")]
    pairs = explains(*language_model(preset_name, **fields), *paths, *others, apart=False)
    assert pairs["blocks/cms/level1/down"].inputs.shape == (2, 2, 16, 12)


@pytest.mark.slow
def test_a_model_that_learns_in_context_has_pairs_where_its_kernels_stay_slow(x64):
    """The last block's CMS is fast, and the head is used both ways, by the inner gradients."""
    cms = [f"blocks/cms/level{level}/{kernel}[0:1]" for level in (1, 2) for kernel in ("up", "down")]
    kernels = (*cms, *(f"blocks/mixer/{name}" for name in ("query", "key", "value", "out")))
    explains(*language_model("tiny-hope-attention"), *kernels, apart=False)


def test_one_backward_pass():
    """Of n layers on one another: n products forward, n backward to the kernels and n - 1 to the inputs."""
    loss = squared(lambda p, x: through_scan(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]), p["s"]))
    params = {"a": w, "b": v, "s": stack}

    def products(function):
        """Of the compiled program, scans counted once: what is not used is gone."""
        text = jax.jit(function).lower(params, x).compile().as_text()
        return sum(" dot(" in line or "__onednn$matmul" in line for line in text.splitlines())

    memory = lambda function: jax.jit(function).lower(params, x).compile().memory_analysis().temp_size_in_bytes
    assert memory(lambda p, x: surprise_and_grad(loss, p, x)[:2]) == memory(jax.value_and_grad(loss))  # probes are not made
    plain = products(jax.value_and_grad(loss))
    assert plain == 3 + 3 + 2
    assert products(lambda p, x: surprise_and_grad(loss, p, x)) == plain
    assert products(lambda p, x: local_surprise(loss, p, x)) == plain - 3  # the kernels' gradients are not computed


def test_what_is_recomputed_stays_recomputed():
    """A loss whose layers are checkpointed keeps that in the traced backward pass."""
    forward, params = CASES["checkpointed scan"]
    both = (lambda p, x: surprise_and_grad(squared(forward), p, x), jax.grad(squared(forward)))
    counts = [str(jax.make_jaxpr(function)(params, x)).count("prevent_cse=") for function in both]
    assert counts[0] == counts[1] > 0


def test_aux_and_types():
    loss = lambda p, x: (jnp.sum((x @ p["a"]).astype(jnp.float32) ** 2), {"norm": jnp.sum(p["a"] ** 2)})
    params = {"a": jnp.asarray(w, jnp.bfloat16)}
    batch = jnp.asarray(x, jnp.bfloat16)
    (value, aux), gradient, pairs = surprise_and_grad(loss, params, batch, has_aux=True)
    alone, same = local_surprise(loss, params, batch, has_aux=True)
    assert value == loss(params, batch)[0] and aux == same and set(aux) == {"norm"}
    assert {a.dtype for a in (*pairs["a"], *alone["a"], gradient["a"])} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("forward", ["scan over layers", "checkpoint", "layer in custom_jvp"])
def test_it_can_be_differentiated_again(x64, forward):
    """Beside plain second derivatives, of the gradient that the pairs make."""
    forward, params = CASES[forward]
    loss = squared(forward)
    through = lambda g: sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(g))

    def by_pairs(params):
        pairs = local_surprise(loss, params, x)
        return through({path: jnp.einsum("...bi,...bo->...io", *pair) for path, pair in pairs.items()})

    got, expected = jax.jit(jax.grad(by_pairs))(params), jax.jit(jax.grad(lambda p: through(jax.grad(loss)(p, x))))(params)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, expected)
    tangent = jax.jvp(by_pairs, (params,), (params,))[1]
    np.testing.assert_allclose(tangent, sum(jnp.sum(expected[k] * params[k]) for k in params), rtol=1e-9)


def test_nothing_compiles_twice_and_zeros_are_finite(x64):
    forward, params = CASES["two layers, biases"]
    compiled = jax.jit(partial(surprise_and_grad, squared(forward)))
    params, zeros = (jax.tree.map(make, params) for make in (jnp.asarray, jnp.zeros_like))
    for given in (params, zeros):
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(compiled(given, jnp.zeros_like(x))))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda p, x: x @ p["a"], r"the loss has shape \[5, 4\]: give a scalar"),
        (lambda p, x: (jnp.sum(x @ p["a"]), 1), "the loss is a tuple: give a scalar, or has_aux=True"),
        (lambda p, x: jnp.sum(p["a"] ** 2), "no linear layer"),
        (lambda p, x: jnp.sum(x @ p["a"]) * 1j, "the loss is of type complex64: give a real"),
        (lambda p, x: jnp.sum(x @ p["a"]).astype(int), "the loss is of type int32: give a real"),
    ],
)
def test_what_is_no_loss_of_linear_layers_is_refused(loss, message):
    with pytest.raises(UserError, match=message):
        local_surprise(loss, {"a": w}, x)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (lambda loss: loss, "a single value"),
        (lambda loss: (loss,), "a tuple of 1"),
        (lambda loss: (loss, 1, 2), "a tuple of 3"),
        (lambda loss: {"loss": loss, "aux": 1}, "a dict of 2"),
    ],
)
@pytest.mark.parametrize("of", [local_surprise, surprise_and_grad])
def test_with_aux_a_loss_is_a_pair(of, more, what):
    with pytest.raises(UserError, match=f"^local_surprise: with has_aux=True the loss is {what}: give a pair"):
        of(lambda p, x: more(jnp.sum(x @ p["a"])), {"a": w}, x, has_aux=True)


@pytest.mark.parametrize(("kind", "size"), [("dict", 1e-6), ("dict", 1e4), ("nnx", 1.0)])
def test_delta_gradient_descent_is_the_exact_minimiser_in_a_network(x64, kind, size):
    """NL Eq. 56, of both layers of an MLP: of |W x - u|^2 / 2 + |W - W_t|^2 / (2 eta), u = -delta, on one example."""
    rate, example = 0.3, size * x[:1]
    if kind == "dict":
        model = {"first": {"kernel": jnp.asarray(w)}, "second": {"kernel": jnp.asarray(u), "bias": jnp.ones(3)}}
        apply = lambda p, x: jnp.cos(x @ p["first"]["kernel"]) @ p["second"]["kernel"] + p["second"]["bias"][None]
        params = model
    else:

        class MLP(nnx.Module):
            def __init__(self, rngs):
                self.first = nnx.Linear(3, 4, use_bias=False, rngs=rngs, param_dtype=jnp.float64)
                self.second = nnx.Linear(4, 3, rngs=rngs, param_dtype=jnp.float64)

        model = MLP(nnx.Rngs(0))
        apply = lambda m, x: m.second(jnp.cos(m.first(x)))
        params = nnx.state(model, nnx.Param)
    loss = lambda m, x: jnp.sum((apply(m, x) - 0.5) ** 2)
    _, gradient, pairs = nnx.jit(partial(surprise_and_grad, loss))(model, example)
    rule = optim.delta_gradient_descent(rate)
    updates, _ = rule.update(gradient, rule.init(params), params, inputs={path: pair.inputs for path, pair in pairs.items()})
    flat = lambda tree: {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    old, new = flat(params), flat(optax.apply_updates(params, updates))
    assert set(pairs) == {"first/kernel", "second/kernel"}
    for path, (inputs, surprise) in pairs.items():
        start = old[path]
        scale = 1 + float(jnp.sum(inputs**2))  # of the curvature: to condition the search

        def objective(flat, start=start, inputs=inputs, surprise=surprise, scale=scale):
            K = flat.reshape(start.shape)
            return (jnp.sum((inputs @ K + surprise) ** 2) / 2 + jnp.sum((K - start) ** 2) / (2 * rate)) / scale

        at = jax.grad(objective)(jnp.ravel(new[path]))
        np.testing.assert_allclose(at, 0, atol=1e-9 * (1 + float(jnp.abs(surprise).max())))
        found = minimize(jax.jit(objective), np.ravel(start), jac=jax.jit(jax.grad(objective)), method="BFGS",
                         options={"gtol": 1e-12})  # fmt: skip
        assert objective(jnp.ravel(new[path])) <= found.fun * (1 + 1e-9)
        eta = rate / (1 + rate * jnp.sum(inputs**2))
        closed = start - eta * inputs.T @ (inputs @ start) - eta * inputs.T @ surprise
        np.testing.assert_allclose(new[path], closed, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(new["second/bias"], old["second/bias"] - rate * flat(gradient)["second/bias"])


def test_a_network_learns_by_delta_gradient_descent():
    """From a linear teacher: the loss falls, under jit, with one backward pass an update."""
    teacher = normal(9, 3, 3)
    params = {"first": {"kernel": jnp.asarray(normal(10, 3, 16), jnp.float32)}, "second": {"kernel": jnp.zeros((16, 3))}}
    loss = lambda p, x: jnp.mean(
        jnp.sum((jnp.tanh(x @ p["first"]["kernel"]) @ p["second"]["kernel"] - x @ teacher) ** 2, -1)
    )
    rule = optim.delta_gradient_descent(0.1)

    @jax.jit
    def update(params, state, x):
        value, gradient, pairs = surprise_and_grad(loss, params, x)
        updates, state = rule.update(gradient, state, params, inputs={k: pair.inputs for k, pair in pairs.items()})
        return optax.apply_updates(params, updates), state, value

    state, losses = rule.init(params), []
    for i in range(60):
        params, state, value = update(params, state, jnp.asarray(normal(i, 64, 3), jnp.float32))
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]
    assert update._cache_size() == 1

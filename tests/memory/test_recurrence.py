"""`chunked` against its definition `tokenwise`, values and every gradient."""

import itertools
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rare import cases

from nested_jax import numerics, remat
from nested_jax.memory.pallas import recurrence as pallas
from nested_jax.memory.recurrence import Gates, MemoryState, chunked, read, tokenwise, write
from nested_jax.numerics import _masked_inverse, _unit_lower_inverse, clip_rows, solve_unit_lower


def problem(rng, batch, C, K, V, *, momentum, erase, decay, anchor, slots, exact=False, queries=True, dtype=np.float64):
    """Random arguments inside the recurrence's domain: beta |x|^2 <= 1, alpha and theta in (0, 1]; exact eta |x|^2 <= 1."""
    normal = lambda *shape: rng.normal(size=shape).astype(dtype)
    inputs = normal(*batch, C, K)
    norm = np.sum(inputs**2, -1)
    gates = Gates(
        write=(rng.uniform(0, 1, (*batch, C)) / (norm if exact else 1)).astype(dtype),
        erase=(rng.uniform(0, 1, (*batch, C)) / norm if erase else np.zeros((*batch, C))).astype(dtype),
        retain=(1 - rng.uniform(0, 1, (*batch, C)) ** 2 if decay else np.ones((*batch, C))).astype(dtype),
        momentum=(1 - rng.uniform(0, 1, (*batch, C))).astype(dtype) if momentum else None,
    )
    state = MemoryState(normal(*batch, V, K), normal(*batch, V, K) if momentum else None)
    arrays = [state, inputs, normal(*batch, C, V), gates, normal(*batch, C, K) if queries else None]
    mask = rng.uniform(size=(*batch, C)) > 0.4 if slots else None
    arrays, anchor, mask = jax.tree.map(jnp.asarray, (arrays, normal(*batch, V, K) if anchor else None, mask))
    return arrays, {"anchor": anchor, "exact": exact}, mask


def values_and_gradients(recurrence, arrays, keywords, mask=None, cotangent_seed=0):
    """(values, gradients) under one random linear read-out of all results."""

    exact = keywords.get("exact", False)

    def loss(arguments):
        args, anchor = arguments
        out = recurrence(*args, anchor=anchor, mask=mask, exact=exact)
        rng = np.random.default_rng(cotangent_seed)
        weigh = lambda x: jnp.sum(x * rng.normal(size=x.shape).astype(x.dtype))
        return sum(weigh(x) for x in jax.tree.leaves(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))((arrays, keywords.get("anchor")))[::-1]


def both(arrays, keywords, mask):
    """What each implementation gives."""
    return [values_and_gradients(recurrence, arrays, keywords, mask) for recurrence in (tokenwise, chunked)]


def assert_close(slow, fast, tolerance):
    """Largest difference of each leaf, relative to that leaf's largest entry (or 1e-5 of the largest of all)."""
    floor = 1e-5 * max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(slow))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(slow), jax.tree.leaves(fast), strict=True):
        scale = max(floor, float(jnp.max(jnp.abs(a))))
        worst = float(jnp.max(jnp.abs(a - b))) / scale
        assert worst <= tolerance, f"{jax.tree_util.keystr(path)}: {worst:.2e}"


OPTIONS = ("momentum", "erase", "decay", "anchor", "slots", "exact")
SETS = list(itertools.product((False, True), repeat=6))
PAIRED = [(m, e, d, a, m ^ e ^ d, e ^ d ^ a) for m, e, d, a, *_ in SETS]  # each two options in all four combinations


@pytest.mark.parametrize("number", cases(range(64), [i for i, each in enumerate(SETS) if each in PAIRED]))
def test_chunked_is_tokenwise(x64, number):
    """All sets of options, at lengths around those of the blocks of the triangular system."""
    options = dict(zip(OPTIONS, SETS[number], strict=True))
    rng = np.random.default_rng(number)
    batch = ((), (2,), (2, 3))[number % 3]
    C = (1, 2, 3, 7, 8, 13, 16, 33)[(number ^ number >> 3) % 8]
    slow, fast = both(*problem(rng, batch, C, *rng.integers(1, 6, 2), **options))
    assert_close(slow, fast, 1e-12)


def on_tiles(state, inputs, errors, gates, queries, *, anchor, mask, exact, flipped):
    """The recurrence by the arithmetic of the kernels, of one map."""
    write, erase, retain, momentum = (None if gate is None else gate[:, None] for gate in gates)
    turn = lambda w: w.T if flipped and w is not None else w
    decay = pallas.decays(retain, momentum, False)
    memory = pallas.Map(
        inputs, errors, inputs @ state.weights.T, write, erase, *map(turn, (*state, anchor)), exact=exact, flipped=flipped
    )
    _, found = pallas.write([memory], decay, False)
    (written,), _ = pallas.write([memory], decay, False, found)  # the inverses are known, as to the backward kernel
    after = MemoryState(turn(written.weights), turn(written.momentum))
    return after, pallas.read(memory, written, decay, queries, False)


@pytest.mark.parametrize("number", cases(range(64), [i for i, each in enumerate(SETS) if each in PAIRED][::3]))
def test_tiles_are_tokenwise(x64, number):
    """The kernels' arithmetic, of weights as they are and transposed; every third set has gates of 0 and retention of 1."""
    options = dict(zip(OPTIONS, SETS[number], strict=True)) | {"slots": False}
    C = (1, 2, 3, 7, 8, 13, 16, 33)[(number ^ number >> 3) % 8]
    arrays, keywords, _ = problem(np.random.default_rng(number), (), C, 3, 4, **options)
    if number % 3 == 0:
        zeros = jax.tree.map(lambda gate: gate.at[:: 1 + C // 3].set(0.0), arrays[3])
        arrays[3] = zeros._replace(retain=zeros.retain.at[C // 2].set(1.0))
    slow = values_and_gradients(tokenwise, arrays, keywords)
    fast = values_and_gradients(partial(on_tiles, flipped=number % 2 == 1), arrays, keywords)
    assert_close(slow, fast, 1e-12)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    C=st.integers(1, 40),
    K=st.integers(1, 5),
    V=st.integers(1, 5),
    options=st.fixed_dictionaries({k: st.booleans() for k in OPTIONS}),
    flipped=st.booleans(),
)
def test_tiles_are_tokenwise_over_random_shapes(seed, C, K, V, options, flipped):
    with jax.enable_x64(True):
        arrays, keywords, _ = problem(np.random.default_rng(seed), (), C, K, V, **options | {"slots": False})
        slow = values_and_gradients(tokenwise, arrays, keywords)
        assert_close(slow, values_and_gradients(partial(on_tiles, flipped=flipped), arrays, keywords), 1e-12)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    C=st.integers(1, 40),
    K=st.integers(1, 5),
    V=st.integers(1, 5),
    options=st.fixed_dictionaries({k: st.booleans() for k in OPTIONS}),
)
def test_chunked_is_tokenwise_over_random_shapes(seed, batch, C, K, V, options):
    with jax.enable_x64(True):
        assert_close(*both(*problem(np.random.default_rng(seed), batch, C, K, V, **options)), 1e-12)


@pytest.mark.parametrize("momentum", [False, True])
def test_exactly_zero_gates(x64, momentum):
    """Zeros in every gate, runs of them too: values and gradients, those with respect to the zeros included."""
    arrays, keywords, _ = problem(
        np.random.default_rng(3), (2,), 16, 4, 3, momentum=momentum, erase=True, decay=True, anchor=True, slots=False
    )
    zero = lambda gate, at: None if gate is None else gate.at[..., np.array(at)].set(0.0)
    gates = arrays[3]
    arrays[3] = Gates(
        zero(gates.write, [0, 5]), zero(gates.erase, [1, 5]), zero(gates.retain, [4, 5, 9]), zero(gates.momentum, [5, 15])
    )
    slow, fast = both(arrays, keywords, None)
    assert_close(slow, fast, 1e-12)
    assert float(jnp.min(jnp.abs(slow[1][0][3].retain[..., np.array([4, 5, 9])]))) > 0  # not trivially zero


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("dtype,tolerance", [(np.float64, 1e-12), (np.float32, 2e-5)])
def test_identical_keys_with_erase_near_one(x64, dtype, tolerance, momentum):
    """The hardest triangular system, every entry near 1: values and gradients with respect to every input.

    Its condition number is 130: in float32 that is 8e-6 from each rounding. Powers of it, by repeated squaring, are as large
    as 1e17: with them not one digit is right, in float64 either.
    """
    rng = np.random.default_rng(0)
    C, K = 64, 8
    key = rng.normal(size=K)
    key /= np.linalg.norm(key)
    ones = np.ones(C)
    state = MemoryState(rng.normal(size=(K, K)), rng.normal(size=(K, K)) if momentum else None)
    gates = Gates(0.5 * ones, 0.999 * ones, ones, 0.9 * ones if momentum else None)
    arrays = [state, np.tile(key, (C, 1)), rng.normal(size=(C, K)), gates, rng.normal(size=(C, K))]
    exact = values_and_gradients(tokenwise, jax.tree.map(jnp.asarray, arrays), {})
    fast = values_and_gradients(chunked, jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays), {})
    assert {leaf.dtype for leaf in jax.tree.leaves(fast)} == {jnp.dtype(dtype)}
    for slow, quick in zip(exact, fast, strict=True):
        assert_close(slow, quick, tolerance)


def products(jaxpr):
    """The precision of every matrix product in a jaxpr, those of the jaxprs within it too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            yield from products(inner) if hasattr(inner, "eqns") else ()


def test_the_triangular_system_is_solved_in_full_precision():
    """On a TPU only the jaxpr shows it here: the inverse's use, its derivatives, and all but a TPU's own inverse, whose
    products are refined (`test_a_tpu_inverse_has_the_digits_of_full_precision`)."""
    lower, right = jnp.ones((2, 40, 40)), jnp.ones((2, 40, 3))
    solved = lambda *arguments: jax.vjp(solve_unit_lower, *arguments)[1](right)
    highest, high = (jax.lax.Precision.HIGHEST,) * 2, (jax.lax.Precision.HIGH,) * 2
    refined = Counter(products(jax.make_jaxpr(_masked_inverse)(lower)))
    assert refined == {high: 4 + 2 * 3 + 2, highest: 2}
    for form in (solve_unit_lower, solved):
        assert Counter(products(jax.make_jaxpr(form)(lower, right)))[high] == refined[high]
        assert set(products(jax.make_jaxpr(form)(lower, right))) == {highest, high}
    arrays, keywords, _ = problem(
        np.random.default_rng(0), (2,), 40, 4, 3, momentum=True, erase=True, decay=True, anchor=True, slots=False
    )
    solve, whole = (
        Counter(products(jax.make_jaxpr(f)(*a))) for f, a in ((solve_unit_lower, (lower, right)), (chunked, arrays))
    )
    assert all(whole[precision] == solve[precision] for precision in (high, highest))


@pytest.mark.parametrize("inverse_of", [_unit_lower_inverse, _masked_inverse])
@pytest.mark.parametrize("C", [1, 7, 32, 40])
def test_inverse_of_the_triangular_system(x64, C, inverse_of):
    """Under several batch axes, where a product of blocks taken by `jnp.diagonal` made XLA's CPU compiler abort."""
    lower = np.tril(np.random.default_rng(0).normal(size=(5, 2, 2, C, C)), -1) / C**0.5
    inverse = jax.jit(inverse_of)(jnp.asarray(lower))
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(C) + lower), rtol=1e-10, atol=1e-12)


def three_passes(a, b):
    """A product as a TPU makes it at `Precision.HIGH`: of bfloat16 parts, without the smallest."""
    top = lambda x: x.astype(jnp.bfloat16).astype(jnp.float32)
    (a, rest), (b, other) = ((top(x), top(x - top(x))) for x in (a, b))
    return a @ other + rest @ b + a @ b


@pytest.mark.parametrize("most", [1.0, 1.5, 2 - 2**-11])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3])
def test_a_tpu_inverse_has_the_digits_of_full_precision(monkeypatch, most, noise):
    """Of nearly the same keys, each erased wholly or turned: the systems whose inverses lose most digits."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(8, 1, 64)) + noise * rng.normal(size=(8, 128, 64))
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    lower = np.tril(most * keys @ keys.transpose(0, 2, 1), -1).astype(np.float32)
    true = np.linalg.inv(np.eye(128) + lower.astype(float))
    error = lambda inverse: np.abs(np.asarray(inverse(jnp.asarray(lower)), float) - true).max()
    in_full = error(_unit_lower_inverse)
    monkeypatch.setattr(numerics, "_three_passes", three_passes)
    assert error(_masked_inverse) <= max(in_full, 1e-6)


@pytest.mark.parametrize(("V", "again"), [(8, 0), (4, 1)])
def test_the_backward_pass_inverts_nothing_again(V, again):
    """Of chunks that are computed again an inverse no larger than the weights is kept: as many are made as of all kept."""
    gate, inputs = jnp.full(8, 0.5), jnp.ones((3, 8, 8))

    def total(weights, policy):
        step = lambda state, x: chunked(state, x, x[:, :V], Gates(gate, gate, gate), x)
        return remat.scan(step, MemoryState(weights), inputs, checkpoint=policy)[1].sum()

    def inverses(jaxpr):
        inner = [p for e in jaxpr.eqns for p in jax.tree.leaves(e.params, is_leaf=lambda p: hasattr(p, "eqns"))]
        inner = [getattr(p, "jaxpr", p) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns")]
        return sum(e.primitive.name == "platform_index" for e in jaxpr.eqns) + sum(map(inverses, inner))

    made = {
        policy: inverses(jax.make_jaxpr(jax.grad(partial(total, policy=policy)))(jnp.ones((V, 8))))
        for policy in ("none", "full", "sqrt")
    }
    assert made == {"none": 1, "full": 1 + again, "sqrt": 2}


def test_bfloat16_inputs_accumulate_in_float32():
    arrays, keywords, mask = problem(
        np.random.default_rng(1), (2,), 32, 8, 8, momentum=True, erase=True, decay=True, anchor=False, slots=False,
        dtype=np.float32,
    )  # fmt: skip
    arrays[1], arrays[2], arrays[4] = (arrays[i].astype(jnp.bfloat16) for i in (1, 2, 4))
    slow, fast = tokenwise(*arrays, **keywords), chunked(*arrays, **keywords)
    assert {x.dtype for x in jax.tree.leaves(fast)} == {jnp.dtype("float32")}
    assert_close(slow, fast, 1e-5)


def test_leading_axes_broadcast(x64):
    """What is shared by several memories is given once, with an axis of length 1."""
    arrays, keywords, mask = problem(
        np.random.default_rng(2), (3, 2), 9, 4, 3, momentum=True, erase=True, decay=True, anchor=True, slots=True
    )
    arrays[1], arrays[3], arrays[4] = jax.tree.map(lambda x: x[:1], (arrays[1], arrays[3], arrays[4]))
    mask = mask[:1]
    assert_close(*both(arrays, keywords, mask), 1e-12)


def test_empty_slots_leave_the_state_untouched(x64):
    arrays, keywords, _ = problem(
        np.random.default_rng(4), (2,), 6, 4, 3, momentum=True, erase=True, decay=True, anchor=True, slots=False
    )
    after, _ = chunked(*arrays, **keywords, mask=jnp.zeros((2, 6), bool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), after, arrays[0])


def test_any_split_of_a_chunk(x64):
    arrays, keywords, _ = problem(
        np.random.default_rng(5), (2,), 11, 4, 3, momentum=True, erase=True, decay=True, anchor=True, slots=False
    )
    state, inputs, errors, gates, queries = arrays
    read = jax.jit(chunked, static_argnames="exact")
    whole = read(*arrays, **keywords)
    outputs = []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 11)):
        cut = jax.tree.map(lambda g: g[:, piece], gates)  # noqa: B023
        state, y = read(state, inputs[:, piece], errors[:, piece], cut, queries[:, piece], **keywords)
        outputs.append(y)
    assert_close(whole, (state, jnp.concatenate(outputs, 1)), 1e-12)


def test_a_momentum_needs_its_decay():
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="gates.momentum is None"):
        chunked(MemoryState(one, one), one, one, Gates(one[0], one[0], one[0]), one)
    with pytest.raises(ValueError, match="state.momentum is None"):
        chunked(MemoryState(one, None), one, one, Gates(one[0], one[0], one[0], one[0]), one)


@pytest.mark.parametrize("momentum", [False, True])
def test_a_read_before_a_token_is_of_the_state_before_it(x64, momentum):
    options = dict(momentum=momentum, erase=True, decay=True, anchor=False, slots=False)
    (state, inputs, errors, gates, queries), _, _ = problem(np.random.default_rng(0), (), 4, 3, 2, **options)
    before = read(write(state, inputs, errors, gates), queries, before=True)
    after = read(write(state, inputs, errors, gates), queries)
    for t in range(4):
        first = lambda tree, n: jax.tree.map(lambda x: x[:n], tree)
        weights = [state.weights if n == 0 else tokenwise(state, *first((inputs, errors, gates, queries), n))[0].weights
                   for n in (t, t + 1)]  # fmt: skip
        np.testing.assert_allclose(before[t], weights[0] @ queries[t], rtol=1e-12)
        np.testing.assert_allclose(after[t], weights[1] @ queries[t], rtol=1e-12)


@pytest.mark.parametrize("form", [chunked, tokenwise])
def test_lengths_that_differ_are_refused(form):
    state, x, gate = MemoryState(jnp.zeros((3, 2)), None), jnp.ones((4, 2)), jnp.ones(4)
    for errors, gates in [(jnp.ones((1, 3)), [gate] * 3), (jnp.ones((4, 3)), [gate, gate[:1], gate])]:
        with pytest.raises(ValueError, match="one length C of at least 1, not inputs 4"):
            form(state, x, errors, Gates(*gates), x)
    with pytest.raises(ValueError, match="at least 1, not inputs 0"):
        form(state, x[:0], jnp.ones((0, 3)), Gates(*[gate[:0]] * 3), x[:0])


@pytest.mark.parametrize("largest", [1e-300, 1e-25, 1e-19, 1e-10, 1.0, 1e25, 1e300, float("inf")])
def test_rows_are_clipped_to_any_norm(largest):
    """One whose square is 0 or infinite in float32 too; small rows stay, with derivatives of one."""
    rows = jnp.array([[0.0, 0.0], [3e-22, 4e-22], [0.3, 0.4], [3.0, 4.0]])
    clipped, derivatives = clip_rows(rows, largest), jax.grad(lambda rows: clip_rows(rows, largest).sum())(rows)
    norms, before = (np.linalg.norm(np.asarray(x, np.float64), axis=-1) for x in (clipped, rows))
    np.testing.assert_allclose(norms, np.minimum(before, max(largest, 1e-18)), rtol=1e-6)
    np.testing.assert_array_equal(derivatives[:2], 1.0)
    assert np.isfinite(derivatives).all()

"""Levels, nests of them, and how they read a stream, against plain Python loops over tokens."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nested_jax.level import Level, Nested, nest, run

# Three levels, fastest first, each one number w: all of them make the output of a token,
#     y_t = sin(x_t + w_1 + w_2 / 2 + w_3 / 4),
# and each descends on the sum over its period of y^2 / 2. A restarted level is half of the next slower one.
SHARE = (1.0, 0.5, 0.25)
RATE = 0.05


def started(slower):
    return slower[0]["w"] / 2 if slower else jnp.asarray(0.8)


def make_levels(periods, due=False):
    """The three levels. With `due` they sum gradients and count tokens, and may be given less than a period."""

    def make(i):
        def init(slower):
            return {"w": started(slower), "sum": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}

        def learn(state, gradient, tokens):
            total, count = state["sum"] + gradient, state["count"] + tokens
            now = count == periods[i] if due else True
            after = {"w": state["w"] - RATE * total, "sum": jnp.zeros(()), "count": jnp.zeros((), jnp.int32)}
            return jax.tree.map(lambda a, b: jnp.where(now, a, b), after, {"w": state["w"], "sum": total, "count": count})

        def read(state, x, slower):
            sums = [level["w"] for level in (state, *slower)]
            z = x + sum(share * w for share, w in zip(SHARE, sums, strict=False))
            gradient = jnp.sum(jnp.sin(z) * jnp.cos(z))
            return learn(state, SHARE[0] * gradient, len(x)), (jnp.sin(z), gradient)

        def take(state, emitted, slower):
            y, gradient = emitted  # stacked over the ticks of the faster level
            total = jnp.sum(gradient)
            return learn(state, SHARE[i] * total, y.size), (y.reshape(-1), total)

        full = (lambda state: state["count"] == 0) if due else None
        return Level(init, read if i == 0 else take, periods[i], f"level {i + 1}", full)

    return [make(i) for i in range(len(periods))]


def make_nest(periods, due=False, resets=(False, False)):
    fast, middle, slow = make_levels(periods, due)
    return nest(nest(fast, middle, reset=resets[0]), slow, reset=resets[1])


def weights(state):
    """w of the levels, fastest first."""
    return [*weights(state.fast), state.slow["w"]] if isinstance(state, Nested) else [state["w"]]


def outputs(emitted):
    """y of every token, whatever the pieces."""
    pieces = emitted if isinstance(emitted[0], tuple) else (emitted,)
    return np.concatenate([np.ravel(y) for y, _ in pieces])


def loop(periods, x, resets=(False, False)):
    """The definition: one token at a time, each level steps when its period divides the token count."""
    w = [0.2, 0.4, 0.8]
    total = np.zeros(3)
    ys = []
    for count, token in enumerate(np.asarray(x), start=1):
        z = token + np.dot(SHARE, w)
        ys.append(np.sin(z))
        total += np.multiply(SHARE, np.sin(z) * np.cos(z))
        stepped = [count % period == 0 for period in periods]
        for i in range(3):
            if stepped[i]:
                w[i] -= RATE * total[i]
                total[i] = 0
        restarted = resets[1] and stepped[2]
        if restarted:
            w[1] = w[2] / 2
        if resets[0] and (restarted or stepped[1]):
            w[0] = w[1] / 2
    return np.array(w), np.array(ys)


def tokens(count):
    return jax.random.normal(jax.random.key(0), (count,), jnp.float64)


def scans(jaxpr):
    """Lengths of the scans in a jaxpr: [(length, scans inside), ...]."""
    found = []
    for equation in jaxpr.eqns:
        parts = jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "eqns"))
        inside = [scan for part in parts if hasattr(part, "eqns") for scan in scans(part)]
        found += [(equation.params["length"], inside)] if equation.primitive.name == "scan" else inside
    return found


def test_three_levels_are_three_nested_scans(x64):
    level = make_nest((16, 64, 512))
    read = jax.jit(lambda x: run(level, None, x))
    assert scans(jax.make_jaxpr(read)(tokens(1024)).jaxpr) == [(2, [(8, [(4, [])])])]
    state, emitted = read(tokens(1024))
    w, y = loop((16, 64, 512), tokens(1024))
    np.testing.assert_allclose(weights(state), w, rtol=1e-12)
    np.testing.assert_allclose(outputs(emitted), y, rtol=1e-10)


@pytest.mark.parametrize("resets", [(False, False), (True, True)], ids=str)
@pytest.mark.parametrize("length", [3, 16, 23])
def test_a_ragged_stream_of_counting_levels(x64, length, resets):
    """Periods 2, 4 and 8; 23 tokens end inside a period of each, so that emitted comes in pieces."""
    level = make_nest((2, 4, 8), due=True, resets=resets)
    state, emitted = jax.jit(lambda x: run(level, None, x))(tokens(length))
    w, y = loop((2, 4, 8), tokens(length), resets)
    np.testing.assert_allclose(weights(state), w, rtol=1e-12)
    np.testing.assert_allclose(outputs(emitted), y, rtol=1e-10)


@pytest.mark.parametrize("resets", [(False, False), (True, True)], ids=str)
def test_counting_levels_read_a_token_at_a_time(x64, resets):
    level = make_nest((2, 4, 8), due=True, resets=resets)
    read = jax.jit(lambda state, x: run(level, state, x))
    state, ys = level.init(()), []
    for token in tokens(23):
        state, emitted = read(state, token[None])
        ys.append(outputs(emitted))
    w, y = loop((2, 4, 8), tokens(23), resets)
    np.testing.assert_allclose(weights(state), w, rtol=1e-12)
    np.testing.assert_allclose(np.concatenate(ys), y, rtol=1e-10)


@pytest.mark.parametrize("due", [False, True])
def test_a_run_says_which_data_points_a_level_would_lose(due):
    """Of 23, a level of period 2 that does not count misses one, one of period 8 seven; counting levels miss none."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        jax.eval_shape(lambda: run(make_nest((2, 4, 8), due), None, jnp.zeros(23)))
        jax.eval_shape(lambda: run(make_nest((2, 4, 8), due), None, jnp.zeros(24)))
    messages = [str(warning.message) for warning in said if "run: level" in str(warning.message)]
    if due:
        assert not messages
    else:
        assert [message.split(" has no")[0] for message in messages] == [
            f"run: level 'level {i}' of period {period}" for i, period in enumerate((2, 4, 8), 1)
        ]
        assert "does not learn from the last 7 of 23 data points" in messages[2]
        assert messages[2].endswith("give a multiple of 8, or a `due`")


def test_a_level_that_does_not_count_keeps_its_state_on_a_context_cut_short(x64):
    """What it emits there is used all the same."""
    (level,) = make_levels((4,))
    with pytest.warns(UserWarning, match="does not learn from the last 3 of 3 data points"):
        short, emitted = run(level, None, tokens(3))
    assert weights(short) == weights(level.init(()))
    assert [y.shape for y, _ in emitted] == [(3,)]
    whole, first = run(level, None, tokens(8))
    with pytest.warns(UserWarning, match="does not learn from the last 3 of 11 data points"):
        longer, pieces = run(level, None, tokens(11))
    assert weights(longer) == weights(whole) != weights(level.init(()))
    assert [y.shape for y, _ in pieces] == [(2, 4), (3,)]
    np.testing.assert_array_equal(pieces[0][0], first[0])
    expected = np.sin(tokens(11)[8:] + whole["w"])
    np.testing.assert_allclose(pieces[1][0], expected, rtol=1e-12)


def test_in_a_nest_too(x64):
    """Of 23 tokens, levels of periods 2, 4 and 8 that do not count have learned from 22, 20 and 16."""
    with pytest.warns(UserWarning, match="of 23 data points"):
        state, emitted = jax.jit(lambda x: run(make_nest((2, 4, 8)), None, x))(tokens(23))
    w, y = loop((2, 4, 8), tokens(23))
    np.testing.assert_allclose(weights(state), w, rtol=1e-12)
    np.testing.assert_allclose(outputs(emitted), y, rtol=1e-10)
    assert jax.tree.leaves(state.slow)[0] == 0 and state.slow["sum"] == 0


@pytest.mark.parametrize("resets", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("due", [False, True])
def test_reset_restarts_the_faster_level_from_the_slower_one(x64, resets, due):
    """Where the slowest steps, the middle restarts from it, and the fastest from the restarted middle if it resets too."""
    level = make_nest((2, 4, 8), due, resets)
    state, emitted = jax.jit(lambda x: run(level, None, x))(tokens(24))
    w, y = loop((2, 4, 8), tokens(24), resets)
    np.testing.assert_allclose(weights(state), w, rtol=1e-12)
    np.testing.assert_allclose(outputs(emitted), y, rtol=1e-10)
    fast, middle, slow = weights(state)  # after 24 tokens all have just stepped
    assert (middle == slow / 2) == resets[1]
    assert (fast == middle / 2) == resets[0]


def test_a_level_may_say_how_it_restarts(x64):
    fast, _, slow = make_levels((2, 4, 8))
    kept = Level(fast.init, fast.step, 2, "kept", restart=lambda state, slower: {**state, "w": state["w"] + slower[0]["w"]})
    x = tokens(8)
    with_reset, _ = run(nest(kept, slow, reset=True), None, x)
    without, _ = run(nest(fast, slow), None, x)
    assert with_reset.slow["w"] == without.slow["w"]
    np.testing.assert_allclose(with_reset.fast["w"], without.fast["w"] + without.slow["w"], rtol=1e-12)


def test_periods_that_do_not_divide_are_refused():
    fast, middle, _ = make_levels((4, 6, 8))
    with pytest.raises(ValueError, match=r"period 6 of level 'level 2'.*period 4 of the faster level 'level 1'"):
        nest(fast, middle)
    with pytest.raises(ValueError, match="'still'.*period 0"):
        Level(fast.init, fast.step, 0, "still")


@pytest.mark.parametrize("stream", [jnp.zeros(0), {}, (jnp.zeros(4), jnp.zeros(8))], ids=["empty", "none", "unequal"])
def test_a_stream_has_one_length(stream):
    (level,) = make_levels((4,))
    with pytest.raises(ValueError, match="a stream has leaves of one length"):
        run(level, None, stream)


def test_checkpoints_change_no_value_and_no_gradient(x64):
    """Ten steps, which neither three segments nor the square root divide."""
    level = make_nest((2, 4, 8), resets=(True, False))

    def value_and_gradients(checkpoint):
        def loss(w, x):
            state = level.init(())
            state = state._replace(slow={**state.slow, "w": w})
            state, emitted = run(level, state, x, checkpoint=checkpoint)
            return jnp.sum(emitted[0] * jnp.arange(80.0).reshape(10, 8)) + sum(weights(state))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(jnp.asarray(0.8), tokens(80))

    expected = value_and_gradients("none")
    assert all(np.all(np.abs(leaf) > 0) for leaf in jax.tree.leaves(expected))
    for checkpoint in ("full", "sqrt", 3):
        got = value_and_gradients(checkpoint)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, expected)


@pytest.mark.parametrize("checkpoint, kept", [("none", 128), ("full", 64), ("sqrt", 8), (4, 4)])
def test_a_checkpoint_is_what_the_backward_pass_keeps(checkpoint, kept):
    """Beside the stream of 64 steps: as many states as it says; without one, both slopes of every step."""
    step = lambda state, context, slower: (jnp.sin(jnp.sin(state) * context[0]), ())
    level = Level(lambda slower: jnp.ones(3), step, 1)
    read = lambda state: run(level, state, jnp.ones((64, 3)), checkpoint=checkpoint)[0]
    held = jax.tree.leaves(jax.vjp(read, jnp.ones(3))[1])
    assert sum(leaf.size for leaf in held) == 3 * (64 + kept)


@pytest.mark.parametrize("checkpoint", ["half", 0, 11, 2.5])
def test_a_checkpoint_that_cannot_be_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"'none', 'full', 'sqrt', 'log', a number of segments from 1 to 10"):
        run(make_nest((2, 4, 8)), None, jnp.zeros(80), checkpoint=checkpoint)


def test_a_training_loop_is_the_slowest_level(x64):
    """A memory that learns every four tokens emits gradients of the parameters it reads with; optax averages three."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(3e-2, weight_decay=0.1))
    kx, kt = jax.random.split(jax.random.key(1))
    x, target = jax.random.normal(kx, (96, 3)), jax.random.normal(kt, (96,))
    initial = {"slope": jnp.ones(3), "bias": jnp.zeros(())}

    def loss(parameters, memory, x, target):
        error = x @ parameters["slope"] + parameters["bias"] + memory - target
        return jnp.mean(error**2), jnp.mean(error)

    def read(memory, context, slower):
        (value, error), gradient = jax.value_and_grad(loss, has_aux=True)(slower[0][0], memory, *context)
        return memory - 0.2 * error, (value, gradient)

    def train(state, emitted, slower):
        parameters, moments = state
        values, gradients = emitted
        updates, moments = optimizer.update(jax.tree.map(lambda g: g.mean(0), gradients), moments, parameters)
        return (optax.apply_updates(parameters, updates), moments), values.mean()

    memory = Level(lambda slower: jnp.zeros(()), read, 4, "memory")
    training = Level(lambda slower: (initial, optimizer.init(initial)), train, 12, "training")
    state, curve = jax.jit(lambda *stream: run(nest(memory, training), None, stream))(x, target)

    parameters, moments, held, losses = initial, optimizer.init(initial), jnp.zeros(()), []
    tick = jax.jit(jax.value_and_grad(loss, has_aux=True))
    update = jax.jit(optimizer.update)
    for step in range(8):
        gradients, values = [], []
        for start in range(12 * step, 12 * step + 12, 4):
            (value, error), gradient = tick(parameters, held, x[start : start + 4], target[start : start + 4])
            held = held - 0.2 * error
            gradients.append(gradient)
            values.append(value)
        mean = jax.tree.map(lambda *g: sum(g) / 3, *gradients)
        updates, moments = update(mean, moments, parameters)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(sum(values) / 3)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10)
    jax.tree.map(close, state.slow, (parameters, moments))
    close(state.fast, held)
    close(curve, losses)

"""Rules against what they minimise, in float64, and against plain loops of their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from rule_runs import last, trajectory
from scipy.optimize import minimize

from nested_jax import optim
from nested_jax.optim import newton_schulz


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def minimiser(objective, start):
    """Of a smooth convex function, by scipy's BFGS."""
    flat = jax.jit(lambda x: objective(x.reshape(start.shape)))
    found = minimize(flat, np.ravel(start), jac=jax.jit(jax.grad(flat)), method="BFGS", options={"gtol": 1e-11})
    return found.x.reshape(start.shape)


def stepped(rule, params, gradient, **extra):
    """Parameters after one update."""
    return last(trajectory(rule, params, [gradient], [extra])[1])


def emitted(rule, gradients, params=None):
    """The last update for a list of gradients."""
    return last(trajectory(rule, optax.tree.zeros_like(gradients[0]) if params is None else params, gradients)[0])


def test_gradient_descent_is_a_proximal_step(x64):
    """NL Eq. 31: of <W x, delta> + |W - W_t|^2 / (2 eta)."""
    W, x, delta, rate = normal(0, 3, 4), normal(1, 4), normal(2, 3), 0.3
    proximal = minimiser(lambda V: (V @ x) @ delta + jnp.sum((V - W) ** 2) / (2 * rate), W)
    for rule in (optim.generalized_gradient_descent(rate), optim.momentum(rate)):
        np.testing.assert_allclose(stepped(rule, W, jnp.outer(delta, x)), proximal, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("examples", [1, 6])
def test_delta_gradient_descent_is_the_exact_minimiser(x64, examples, size):
    """NL Eq. 56: of the mean of |W x - u|^2 / 2 with u = -delta, and |W - W_t|^2 / (2 eta); for inputs of any norm."""
    W, x, delta, rate = normal(0, 3, 4), size * normal(1, examples, 4), normal(2, examples, 3), 0.3
    error = lambda V: jnp.mean(jnp.sum((x @ V.T + delta) ** 2, axis=-1)) / 2
    expected = minimiser(lambda V: error(V) + jnp.sum((V - W) ** 2) / (2 * rate), W)
    gradient = x.T @ delta / examples
    got = stepped(optim.delta_gradient_descent(rate), {"w": W.T}, {"w": gradient}, inputs={"w": x})["w"].T
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
    if examples == 1:  # the form of NL Eq. 57
        eta = rate / (1 + rate * jnp.sum(x**2))
        np.testing.assert_allclose(got, W - eta * (W @ x.T) @ x - eta * delta.T @ x, rtol=1e-10)


def test_delta_gradient_descent_under_a_schedule(x64):
    """The rate inside the proximal problem and the one outside are both those of the step."""
    W, rates = normal(0, 3, 4), (0.3, 2.0, 0.05, 0.7)
    rule = optim.delta_gradient_descent(lambda count: jnp.array(rates)[count])
    pairs = [(normal(2 * t + 1, 6, 4), normal(2 * t + 2, 6, 3)) for t in range(4)]
    gradients, inputs = [{"w": x.T @ delta / 6} for x, delta in pairs], [{"inputs": {"w": x}} for x, _ in pairs]
    _, path, _ = trajectory(rule, {"w": W.T}, gradients, inputs)
    for (x, delta), rate, after in zip(pairs, rates, path["w"], strict=True):
        error = lambda V, x=x, delta=delta: jnp.mean(jnp.sum((x @ V.T + delta) ** 2, axis=-1)) / 2
        W = minimiser(lambda V, W=W, rate=rate, error=error: error(V) + jnp.sum((V - W) ** 2) / (2 * rate), W)
        np.testing.assert_allclose(after.T, W, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_adams_memory_minimises_its_objective(x64, penalty):
    """NL Eq. 101: of sum (m g_s - P)^2 + penalty m^2, P^2 the sum of squares."""
    gradients = normal(0, 7, 5)
    got = emitted(optim.scale_by_adam_memory(1.0, 1.0, penalty=penalty, eps=0.0, average=False), list(gradients))
    P = jnp.sqrt(jnp.sum(gradients**2, axis=0))
    objective = lambda m: jnp.sum((m[None] * gradients - P[None]) ** 2) + penalty * jnp.sum(m**2)
    np.testing.assert_allclose(got, minimiser(objective, np.zeros(5)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.4, 2.5)], ids=str)
def test_adams_memory_of_sums_has_its_weights(x64, weights):
    """b1 sum g sqrt(b2 sum g^2) / (b2 sum g^2), with its derivatives; no bias correction divides by 1 - 1."""
    gradients = normal(0, 4, 3).at[:, 1].set(0.0)

    def own(gradients, b1, b2):
        return emitted(optim.scale_by_adam_memory(b1, b2, eps=0.0, average=False), list(gradients))

    def expected(gradients, b1, b2):
        nonzero = gradients[:, jnp.array([0, 2])]
        memory = b1 * nonzero.sum(0) / jnp.sqrt(b2 * jnp.sum(nonzero**2, 0))
        return jnp.zeros(3).at[jnp.array([0, 2])].set(memory)

    arguments = gradients, *map(jnp.asarray, weights)
    with jax.debug_nans(True):
        np.testing.assert_allclose(own(gradients, *weights), expected(*arguments), rtol=1e-12)
    jacobians = (jax.jit(jax.jacobian(f, (0, 1, 2)))(*arguments) for f in (own, expected))
    for own, theirs in zip(*jacobians, strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-10, atol=1e-14)


def test_adams_memory_of_averages(x64):
    """After 1 and 2 at decays of 1/2, corrected, the mean is 5/3 and that of squares 3: 5/3 sqrt 3 / (3 + penalty)."""
    rule = optim.scale_by_adam_memory(0.5, 0.5, penalty=2.0, eps=0.0)
    np.testing.assert_allclose(emitted(rule, [jnp.array([1.0]), jnp.array([2.0])]), 5 / 3 * 3**0.5 / (3 + 2), rtol=1e-12)


@pytest.mark.parametrize("penalty", [0.0, 0.7])
@pytest.mark.parametrize("columns", [1, 3])
def test_adagrads_memory_of_outer_products(x64, penalty, columns):
    """X with the least |X H^{1/2} - I|^2 + penalty |X|^2, times the last gradient; a vector is one column."""
    gradients = normal(0, 7, 4, columns)
    got = emitted(
        optim.scale_by_adagrad_memory("full", penalty=penalty), list(gradients if columns > 1 else gradients[..., 0])
    )
    values, vectors = np.linalg.eigh(np.einsum("tik,tjk->ij", gradients, gradients))
    root = (vectors * np.sqrt(values)) @ vectors.T
    objective = lambda X: jnp.sum((X @ root - jnp.eye(4)) ** 2) + penalty * jnp.sum(X**2)
    expected = minimiser(objective, np.zeros((4, 4))) @ gradients[-1]
    np.testing.assert_allclose(got, expected if columns > 1 else expected[:, 0], rtol=1e-5, atol=1e-7)


def test_adagrads_memory_element_by_element(x64):
    """After 3 and 4 the root sum of squares is 5: 5 / (25 + penalty) of the last."""
    rule = optim.scale_by_adagrad_memory(penalty=7.0)
    np.testing.assert_allclose(emitted(rule, [jnp.array([3.0]), jnp.array([4.0])]), 5 / (25 + 7) * 4, rtol=1e-12)


def test_directions_without_gradients_stay_zero(x64):
    """The outer product of one gradient has rank one; its pseudo-inverse root gives g / |g|."""
    g = normal(0, 5)
    rule = optim.scale_by_adagrad_memory("full")
    np.testing.assert_allclose(emitted(rule, [g]), g / jnp.linalg.norm(g), rtol=1e-6)
    slope = jax.jit(jax.jacobian(lambda g: emitted(rule, [g])))(g)
    u = g / jnp.linalg.norm(g)
    np.testing.assert_allclose(slope, (jnp.eye(5) - jnp.outer(u, u)) / jnp.linalg.norm(g), atol=1e-10)


def test_derivatives_of_the_memory_of_outer_products(x64):
    """With respect to all gradients and the penalty, against finite differences; two of its eigenvalues are equal."""

    @jax.jit
    def memory(gradients, penalty):
        return emitted(optim.scale_by_adagrad_memory("full", penalty=penalty), list(gradients))

    equal = jnp.concatenate([2 * jnp.eye(4)[:2], normal(0, 3, 4) * jnp.array([[0.0, 0, 1, 1]])])
    for gradients in (normal(0, 5, 4), equal):
        check_grads(memory, (gradients, jnp.asarray(0.3)), order=1, rtol=1e-5)


def test_second_derivatives_of_the_memory_of_outer_products(x64):
    """One gradient is a rank of one: |g| g / (|g|^2 + penalty). At zero all are zero; elsewhere those of the closed form.

    In a scan, whose derivative drops the rules of `jax.custom_jvp`: eigenvectors of equal eigenvalues have none.
    """

    def own(g, penalty):
        rule = optim.scale_by_adagrad_memory("full", penalty=penalty)
        return jax.lax.scan(lambda state, g: rule.update(g, state)[::-1], rule.init(g), g[None])[1][0]

    @jax.jit
    def hessians(g, penalty):
        closed = lambda g, penalty: jnp.linalg.norm(g) * g / (g @ g + penalty)
        return jax.jacfwd(jax.jacrev(own))(g, penalty), jax.jacfwd(jax.jacfwd(closed))(g, penalty)

    for penalty in (0.0, 0.3):
        np.testing.assert_array_equal(hessians(jnp.zeros(4), penalty)[0], 0)
        np.testing.assert_allclose(*hessians(normal(0, 4), penalty), rtol=1e-6, atol=1e-8)

    twice = jax.jit(jax.grad(jax.grad(lambda size: jnp.sum(jnp.sin(own(size * normal(0, 4, 2), 0.1))))))
    assert twice(0.0) == 0 and jnp.isfinite(twice(0.5))

    slope = jax.jit(jax.grad(lambda g: jnp.sum(jnp.sin(own(g, 0.1)))))
    direction, step = normal(1, 3, 3), 1e-5
    numeric = (slope(jnp.eye(3) + step * direction) - slope(jnp.eye(3) - step * direction)) / (2 * step)  # equal eigenvalues
    np.testing.assert_allclose(jax.jvp(slope, (jnp.eye(3),), (direction,))[1], numeric, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("normalize", [True, False])
def test_delta_momentum_in_the_papers_orientation(x64, normalize):
    """NL Eq. 48-49 with matrices (out, in): m (decay I - erase u^T u) + P(g); element by element for a vector."""
    gradients, decay, erase = 0.5 * normal(0, 5, 3, 4), 0.8, 0.6
    values = optax.scale(2.0)
    rule = optim.scale_by_delta_momentum(decay, erase, normalize=normalize, preconditioner=values)
    memory = {"w": np.zeros((3, 4)), "b": np.zeros(4)}
    got = emitted(rule, [{"w": g.T, "b": g[0]} for g in gradients])
    for g in np.asarray(gradients):
        size = lambda x: np.linalg.norm(x) if normalize else 1.0
        u, v = g / size(g), g[0] / size(g[0])
        memory["w"] = memory["w"] @ (decay * np.eye(4) - erase * u.T @ u) + 2 * g
        memory["b"] = memory["b"] * (decay - erase * v**2) + 2 * g[0]
    np.testing.assert_allclose(got["w"].T, memory["w"], rtol=1e-10)
    np.testing.assert_allclose(got["b"], memory["b"], rtol=1e-10)


@pytest.mark.parametrize(("objective", "retention"), [("dot", "initial"), ("l2", "initial"), ("dot", "zero")])
def test_deep_momentum_is_gradient_descent_on_its_own_objective(x64, objective, retention):
    """A plain loop: keys are a kernel's columns, one at a time; targets orthogonal; the memory is an MLP and learns."""
    gradients, decay, rate = normal(0, 4, 5, 3), 0.8, 0.4
    start = {"up": normal(1, 5, 6), "down": 0.3 * normal(2, 6, 5)}
    m = lambda w, z: z + jax.nn.gelu(z @ w["up"]) @ w["down"] / jnp.sqrt(6.0)
    rule = optim.scale_by_deep_momentum(
        decay, rate, objective=objective, target=newton_schulz, retention=retention,
        start={"k": optim.DeepMemory(**start), "v": None},
    )  # fmt: skip
    params = {"k": gradients[0], "v": gradients[0][0]}
    updates, _, state = trajectory(rule, params, [{"k": g, "v": g[0]} for g in gradients])

    @jax.jit
    def step(memory, g):
        u, P = g / jnp.linalg.norm(g), newton_schulz(g / jnp.linalg.norm(g))

        def loss(w):
            total = 0.0
            for column in range(3):
                out, target = m(w, jnp.sqrt(3.0) * u[:, column]), jnp.sqrt(3.0) * P[:, column]
                total += -out @ target if objective == "dot" else jnp.sum((out - target) ** 2) / 2
            return total / 3

        slope = jax.grad(loss)(memory)
        origin = start if retention == "initial" else {"up": 0.0, "down": 0.0}
        memory = {k: origin[k] + decay * (memory[k] - origin[k]) - rate * slope[k] for k in memory}
        out = jnp.stack([m(memory, jnp.sqrt(3.0) * u[:, i]) for i in range(3)], 1)
        return memory, out / jnp.sqrt(3.0) * jnp.linalg.norm(g)

    memory, vector = start, jnp.zeros(3)
    for g in gradients:
        memory, expected = step(memory, g)
        vector = decay * vector + (1 - decay) * g[0]
    np.testing.assert_allclose(updates["k"][-1], expected, rtol=1e-9)
    np.testing.assert_allclose(updates["v"][-1], vector, rtol=1e-12)
    np.testing.assert_allclose(state.memory["k"].up, memory["up"], rtol=1e-9)
    assert all(jnp.max(jnp.abs(memory[k] - start[k])) > 1e-2 for k in memory)  # both layers learned


def test_deep_momentum_recalls_gradients_and_its_start_learns(x64):
    """A repeated gradient is emitted larger than a new one; an outer loss has gradients for both layers of the start."""
    g, other = normal(0, 6, 3), normal(1, 6, 3)
    start = optim.deep_momentum_start({"k": g}, 8)

    @jax.jit
    @jax.value_and_grad
    def recall(start, then):
        last_update = emitted(optim.scale_by_deep_momentum(start=start), [{"k": g}] * 5 + [{"k": then}])["k"]
        return jnp.sum(last_update * then) / jnp.sum(then**2)

    (repeated, _), (new, slopes) = recall(start, g), recall(start, other)
    assert repeated > new > 0
    assert all(jnp.max(jnp.abs(leaf)) > 1e-3 for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("average", [True, False])
def test_m3_is_algorithm_1(x64, average):
    """Both momenta, as the paper's sums without Nesterov's step, and as averages; the slow one every third step, and used
    from the next."""
    gradients, (b1, b2, b3, weight, eps) = normal(0, 7, 4, 3), (0.9, 0.99, 0.8, 0.4, 1e-8)
    options = dict(slow_weight=weight, slow_period=3, average=average, nesterov=not average, eps=eps)
    updates, _, _ = trajectory(optim.scale_by_m3(b1, b2, b3, **options), gradients[0], list(gradients))
    orthogonalise = jax.jit(newton_schulz)
    m1 = m2 = v = pending = o2 = np.zeros((4, 3))
    for t, (g, got) in enumerate(zip(np.asarray(gradients), updates, strict=True), start=1):
        if average:
            m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        else:
            m1, v = m1 + b1 * g, v + b2 * g**2
        corrected, root = (m1 / (1 - b1**t), np.sqrt(v / (1 - b2**t))) if average else (m1, np.sqrt(v))
        np.testing.assert_allclose(got, (orthogonalise(corrected) + weight * o2) / (root + eps), rtol=1e-9)
        pending = pending + g
        if t % 3 == 0:
            m2 = b3 * m2 + (1 - b3) * pending if average else m2 + b3 * pending
            o2, pending = orthogonalise(m2), 0 * g


def test_m3_with_zero_second_moment_gives_zero_update(x64):
    """Newton-Schulz fills an entry whose gradients were all zero, but its update stays zero."""
    g = normal(0, 4, 3).at[1, 2].set(0.0)
    assert newton_schulz(g)[1, 2] != 0
    update = emitted(optim.scale_by_m3(), [g])
    assert update[1, 2] == 0 and (update != 0).sum() == 11


def test_deep_momentum_of_unit_size(x64):
    """Updates over their root mean square, for a gradient of any size."""
    g = 1e-3 * normal(0, 5, 3)
    plain, unit = (emitted(optim.scale_by_deep_momentum(scale=scale), [g]) for scale in ("gradient", "rms"))
    np.testing.assert_allclose(unit, plain / jnp.sqrt(jnp.mean(plain**2)), rtol=1e-12)


def test_default_start_of_deep_momentum(x64):
    """Of its width and seed, another for every matrix; its memory is the identity."""
    params = {"a": normal(0, 5, 3), "b": normal(1, 5, 3), "c": normal(2, 4)}
    start = optim.deep_momentum_start(params, 7, seed=3)
    rule = optim.scale_by_deep_momentum(rate=0.0, hidden=7, seed=3)
    drawn = jax.tree.leaves(rule.init(params).start)
    for (path, given), own in zip(jax.tree_util.tree_leaves_with_path(start), drawn, strict=True):
        np.testing.assert_array_equal(own, given, err_msg=str(path))
    assert start["a"].up.shape == (5, 7) and start["a"].down.shape == (7, 5) and start["c"] is None
    assert (start["a"].up != start["b"].up).all()
    assert (start["a"].up != optim.deep_momentum_start(params, 7)["a"].up).all()
    np.testing.assert_allclose(emitted(rule, [params])["a"], params["a"], rtol=1e-12)


def test_a_start_depends_on_its_path_alone(x64):
    """Another parameter before or after it changes nothing; a layer of the same shape has another start."""
    layer = {"kernel": normal(0, 3, 2)}
    alone = optim.deep_momentum_start({"b": layer}, 4)["b"]["kernel"].up
    among = optim.deep_momentum_start({"a": layer, "b": {**layer, "another": normal(1, 3, 2)}, "c": layer}, 4)
    np.testing.assert_array_equal(among["b"]["kernel"].up, alone)
    assert (among["a"]["kernel"].up != alone).all() and (among["b"]["another"].up != alone).all()


def test_m3_orthogonalises_its_slow_memory_at_its_own_frequency():
    """In a branch that is taken every `slow_period` steps: as many products are inside it as outside."""
    inside, outside = products(optim.scale_by_m3(slow_period=4))
    assert inside == outside > 0


def test_continuum_runs_its_optimizer_at_its_own_frequency():
    """All of its products are inside the branch."""
    inside, outside = products(optim.scale_by_continuum(optax.contrib.muon(0.1), 4))
    assert inside > 0 == outside


def products(rule):
    """How many matrix products an update has inside a branch, and outside."""
    g = jnp.ones((4, 3))
    equations = jax.make_jaxpr(rule.update)(g, rule.init(g), g).jaxpr.eqns
    count = lambda jaxpr: str(jaxpr).count("dot_general")
    (branch,) = [e for e in equations if e.primitive.name == "cond"]
    return sum(map(count, branch.params["branches"])), sum(count(e) for e in equations if e is not branch)


def test_generalized_gradient_descent_solves_its_problem(x64):
    """Of an objective that is not quadratic, with a retention towards the mean of the last three weights."""
    W, data, rate = normal(0, 4), normal(1, 9, 4), 0.5
    objective = lambda weights, gradients, labels: jnp.mean(jax.nn.softplus(-labels * (data @ weights)))
    retention = lambda weights, recent, eta: jnp.sum((weights - jnp.mean(recent, axis=0)) ** 2) / (2 * eta)
    rule = optim.generalized_gradient_descent(rate, objective, retention, window=3, steps=8)
    labels = jnp.sign(normal(2, 9))
    _, path, _ = trajectory(rule, W, [jnp.zeros(4)] * 3, [{"labels": labels}] * 3)
    past = [W, W, W, *path]
    for recent, after in zip((jnp.stack(past[t : t + 3][::-1]) for t in range(3)), path, strict=True):
        expected = minimiser(lambda w, r=recent: objective(w, None, labels) + retention(w, r, rate), recent[0])
        np.testing.assert_allclose(after, expected, rtol=1e-5)


def test_feature_momentum_writes_values_of_features(x64):
    """NL Eq. 51: m <- decay m + P(g) phi(g); by default P = 1 and phi the arcsinh."""
    gradients = normal(0, 4, 3)
    for options, written in [
        ({"feature_map": jnp.tanh, "preconditioner": lambda g: 1 / (1 + g**2)}, lambda g: np.tanh(g) / (1 + g**2)),
        ({}, np.arcsinh),
    ]:
        rule = optim.scale_by_feature_momentum(**options, decay=0.7)
        memory = np.zeros(3)
        for g in np.asarray(gradients):
            memory = 0.7 * memory + written(g)
        np.testing.assert_allclose(emitted(rule, list(gradients)), memory, rtol=1e-12)


def test_continuum_updates_each_group_at_its_own_frequency(x64):
    """On the sum of its gradients, by its own rule, the schedule counting all steps."""
    gradients = normal(0, 6)
    rates = optax.piecewise_constant_schedule(1.0, {4: 0.1})
    rule = optim.continuum(
        rates, {"slow": 3, "fast": 1}, {"a": "slow", "b": "fast"}, inner={"slow": optax.trace(0.5), "fast": optax.identity()}
    )
    updates, _, _ = trajectory(rule, {"a": jnp.zeros(()), "b": jnp.zeros(())}, [{"a": g, "b": g} for g in gradients])
    first, second = gradients[:3].sum(), gradients[3:].sum()
    np.testing.assert_allclose(updates["a"], [0, 0, -first, 0, 0, -0.1 * (second + 0.5 * first)], atol=1e-12)
    np.testing.assert_allclose(updates["b"], -gradients * jnp.array([1, 1, 1, 1, 0.1, 0.1]), rtol=1e-12)


def test_continuum_passes_extra_arguments_on(x64):
    """Those of the step on which a group is updated."""
    scaled = lambda updates, state, params=None, *, factor: (jax.tree.map(lambda g: factor * g, updates), state)
    inner = optax.GradientTransformationExtraArgs(optax.init_empty_state, scaled)
    params, gradients = {"a": jnp.zeros(()), "b": jnp.zeros(())}, normal(0, 4)
    for rule, period in [
        (optim.continuum(1.0, 2, inner=inner), 2),
        (optim.continuum(1.0, {"slow": 2, "fast": 1}, {"a": "slow", "b": "fast"}, inner=inner), 1),
    ]:
        factors = [{"factor": jnp.asarray(factor)} for factor in (3.0, 5.0, 7.0, 11.0)]
        updates, _, _ = trajectory(rule, params, [{"a": g, "b": g} for g in gradients], factors)
        slow = [0, -5 * gradients[:2].sum(), 0, -11 * gradients[2:].sum()]
        fast = -gradients * jnp.array([3.0, 5, 7, 11]) if period == 1 else slow
        np.testing.assert_allclose(np.stack([updates["a"], updates["b"]]), np.array([slow, fast]), rtol=1e-12, atol=1e-12)

"""LanguageModel: any split, causality, no leaks, resets, presets, what is refused."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rare import cases
from tiny import cms_forward as forward
from tiny import config, differentiable, model, read, tokens

from nested_jax import PRESETS, CMSConfig, LanguageModel, cms, preset
from nested_jax.cms.in_context import restart
from nested_jax.errors import UserError
from nested_jax.memory import SelfModifyingTitans, Titans, attention, linear, reference
from nested_jax.memory.deep import Rule
from nested_jax.memory.omega import OmegaMemory
from nested_jax.models.block import sequence_layer
from nested_jax.models.language_model import apply, init_state, init_weights

IN_CONTEXT = dict(periods=(8, 4))
MODELS = {
    "hope": dict(mixer="self-modifying", **IN_CONTEXT),
    "hope, last block": dict(mixer="self-modifying", projection_chunk=8, blocks=1, **IN_CONTEXT),
    "hope-attention": dict(mixer="attention", **IN_CONTEXT),
    "sliding-window": dict(mixer="sliding-window"),
    "titans": dict(mixer="titans"),
    "transformer": dict(mixer="attention", hidden=(5,), activation="swiglu"),
    "gated-delta": dict(mixer="gated-delta", **IN_CONTEXT),
}
READERS = MODELS | {
    "delta": dict(mixer="delta", variant="nested", hidden=(4, 4, 4), periods=(16, 8, 4)),
    "linear": dict(mixer="linear", variant="independent", periods=(8, 8), rule="adam"),
    "first order": dict(mixer="gated-delta", meta_gradient="first-order", **IN_CONTEXT),
    "two of three blocks": dict(mixer="gated-delta", blocks=2, layers=3, **IN_CONTEXT),
    "segments across chunks": dict(mixer="self-modifying", periods=(12, 6)),
    "titans in context": dict(mixer="titans", blocks=1, **IN_CONTEXT),
    "oja": dict(mixer="oja"),
    "omega in context": dict(mixer="omega", omega_window=3, blocks=1, **IN_CONTEXT),
}
ALIKE = ("hope, last block", "first order", "linear", "titans", "gated-delta")  # any split of these is in others too
SPLIT = {name: fields for name, fields in READERS.items() if name not in ALIKE} | {
    "shared by the batch": dict(scope="batch", activation="swiglu", **IN_CONTEXT),
    "one level": dict(hidden=(5,), periods=(4,), layers=1),
}
DEFAULT = ("gated-delta", "sliding-window", "transformer")
LOOSE = dict(rtol=1e-5, atol=1e-6)  # attention's softmax is in float32
CLOSE = dict(rtol=1e-9, atol=1e-11)


def tolerance(name):
    return LOOSE if name in ("hope-attention", "sliding-window", "transformer") else CLOSE


@pytest.mark.parametrize("name", cases(SPLIT, ("one level",)))
def test_any_split_is_one_call(x64, name):
    """Token by token with the position traced, in uneven pieces with it known, and promised to be aligned."""
    made, text = model(config(**SPLIT[name])), tokens(2, 26)
    state, whole = (lambda out: (out[1], out[0]))(jax.jit(lambda: read(made, text, 32))())
    net, weights = differentiable(made)
    token = jax.jit(lambda weights, token, state: nnx.merge(net, weights)(token, state))
    now, parts = made.init_state(2, max_length=32), []
    for t in range(26):
        logits, now = token(weights, text[:, t : t + 1], now)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **tolerance(name))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(name)), now, state)

    @jax.jit
    def pieces(text):
        now, parts, start = made.init_state(2, max_length=32), [], 0
        for length in (3, 10, 4, 9):
            logits, now = made(text[:, start : start + length], now)
            parts.append(logits)
            start += length
        return jnp.concatenate(parts, 1)

    np.testing.assert_allclose(pieces(text), whole, **tolerance(name))
    half = jax.jit(lambda text, state: made(text, state, multiple=16))
    first, now = half(text[:, :16], made.init_state(2, max_length=32))
    second, _ = half(text[:, 16:], now)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, **tolerance(name))


@pytest.mark.parametrize("fields", cases([dict(layers=1), dict(mixer="titans")], [dict(layers=1)]), ids=str)
def test_a_document_that_starts_in_an_open_segment(x64, fields):
    """Calls whose positions are known at run time only, on the grid by promise or not: the next call closes the segment."""
    made, text = model(config(**fields, **IN_CONTEXT)), tokens(2, 20)
    reset = jnp.zeros((2, 20), bool).at[1, 8].set(True)
    whole, state = jax.jit(lambda: read(made, text, 20, reset=reset))()
    for length, multiple in ((5, 1), (4, 4)):
        call = jax.jit(lambda text, state, reset, multiple=multiple: made(text, state, reset=reset, multiple=multiple))
        now, parts = made.init_state(2), []
        for start in range(0, 20, length):
            piece = slice(start, start + length)
            logits, now = call(text[:, piece], now, reset[:, piece])
            parts.append(logits)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **CLOSE)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), now, state)


@pytest.mark.parametrize("name", cases(["hope-attention", "transformer"], ["transformer"]))
def test_a_cache_that_grows_is_one_of_given_length(x64, name):
    """In calls of uneven lengths that close segments begun before."""
    made, text = model(config(**MODELS[name])), tokens(2, 26)
    whole, _ = jax.jit(lambda: read(made, text, 32))()
    state, parts = made.init_state(2), []
    for start, end in ((0, 5), (5, 14), (14, 18), (18, 26)):
        logits, state = jax.jit(made.__call__)(text[:, start:end], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, **LOOSE)


def test_a_frozen_model_is_its_equation(x64):
    """Embedding; in every block a sequence layer, then a CMS, each behind a norm and beside its input; norm and head."""
    made = model(config("gated-delta", hidden=(5, 3)))
    text, layer = tokens(1, 13), sequence_layer(made.config)
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(differentiable(made)[1]))
    norm = lambda x, w: x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * w
    x = weights["embedding"][text] * made.config.width**0.5
    for i in range(made.config.layers):
        block = jax.tree.map(lambda w, i=i: w[i], weights["blocks"])
        x = x + np.asarray(reference.linear_memory(layer, block["mixer"], jnp.asarray(norm(x, block["norm"])[0])))[None]
        x = forward(made.config.cms, block["cms"], x)
    out = weights["embedding"].T if made.config.tie_embeddings else weights["head"]
    np.testing.assert_allclose(read(made, text)[0], norm(x, weights["norm"]) @ out, rtol=1e-9)


@pytest.mark.parametrize("name", cases(READERS, DEFAULT))
def test_causal_and_rows_apart(x64, name):
    """Changing token t leaves logits before t as they are, CMS updates included, and does not touch another row."""
    made, text = model(config(**READERS[name])), tokens(2, 18)
    call = jax.jit(lambda text: read(made, text, 18)[0])
    whole = call(text)
    for t in (4, 9, 17):
        other = call(text.at[0, t].set((text[0, t] + 1) % 11))
        np.testing.assert_array_equal(other[0, :t], whole[0, :t])
        assert not np.allclose(other[0, t], whole[0, t])
        np.testing.assert_array_equal(other[1], whole[1])
    np.testing.assert_allclose(call(text[::-1]), whole[::-1], **CLOSE)
    alone = jax.jit(lambda text: read(made, text, 18)[0])(text[:1])
    np.testing.assert_allclose(alone, whole[:1], **tolerance(name))


FITTING = {
    "frozen": dict(mixer="delta"),
    "learning": dict(mixer="delta", blocks=1, **IN_CONTEXT),
    "attention": dict(mixer="attention"),
}
RESTARTS = [("sequence", "adam"), ("batch", "momentum"), ("sequence", "momentum"), ("batch", "adam")]
RESET = ("hope-attention", "hope, last block", "hope", "omega in context")


@pytest.mark.parametrize("name", cases(RESET, RESET[:1]))
def test_a_reset_is_a_fresh_start(x64, name):
    """Of one row, on the grid of documents; the other row goes on."""
    made, text = model(config(**READERS[name])), tokens(2, 24)
    assert made.config.alignment == 8
    call = jax.jit(lambda text, reset: read(made, text, 24, reset=reset)[0])
    logits = call(text, jnp.zeros((2, 24), bool).at[1, 8].set(True))
    whole = jax.jit(lambda text: read(made, text, 24)[0])
    np.testing.assert_allclose(logits[0], whole(text)[0], **tolerance(name))
    np.testing.assert_allclose(logits[1, :8], whole(text)[1, :8], **tolerance(name))
    np.testing.assert_allclose(logits[1, 8:], whole(text[:, 8:])[1], **tolerance(name))
    assert jnp.isnan(call(text, jnp.zeros((2, 24), bool).at[1, 5].set(True))[1]).all()
    with pytest.raises(UserError, match="model: reset at token 5: give documents that start on multiples of 8"):
        read(made, text, reset=np.arange(24)[None].repeat(2, 0) == 5)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_a_reset_is_seen_wherever_the_call_begins(x64, scope):
    """A promise of whole segments does not say where the slowest period ends: token 8 starts one inside the call."""
    made, text = model(config(scope=scope, **IN_CONTEXT)), tokens(2, 18)
    reset = jnp.zeros((2, 18), bool).at[:, 8].set(True)
    whole = jax.jit(lambda: read(made, text, reset=reset)[0])()
    np.testing.assert_allclose(whole[:, 8:], jax.jit(lambda: read(made, text[:, 8:])[0])(), **CLOSE)
    _, state = jax.jit(lambda: read(made, text[:, :4]))()
    call = jax.jit(
        lambda state, multiple: made(text[:, 4:], state, reset=reset[:, 4:], multiple=multiple)[0], static_argnums=1
    )
    for multiple in (4, 1):  # segment by segment; token by token
        np.testing.assert_allclose(call(state, multiple), whole[:, 4:], **CLOSE)
    short = jax.jit(lambda state: made(text[:, 4:10], state, reset=reset[:, 4:10], multiple=4)[0])
    np.testing.assert_allclose(short(state), whole[:, 4:10], **CLOSE)


@pytest.mark.parametrize("case", cases(RESTARTS, RESTARTS[:1]), ids=str)
def test_a_restart_is_of_the_rows_that_are_reset(x64, case):
    """Weights, gradients and the rule's memory; those of the whole batch are restarted with its last row alone."""
    scope, rule = case
    made = model(config(scope=scope, rule=rule, **IN_CONTEXT))
    fresh = made.init_state(2).learning.levels
    levels = jax.jit(lambda: read(made, tokens(2, 14)))()[1].learning.levels
    for rows in ([True, False], [True, True]):
        new = restart(made.config.cms, jnp.array(rows), fresh, levels)
        for start, before, after in zip(*map(cms.fast_weights, (fresh, levels, new)), strict=True):
            for part, axis in (("matrices", 1), ("gradient", 1), ("rule", 0)):
                for a, b, c in zip(*(jax.tree.leaves(getattr(x, part)) for x in (start, before, after)), strict=True):
                    assert part == "gradient" or not np.array_equal(a, b)
                    if scope == "batch":
                        np.testing.assert_array_equal(c, a if all(rows) else b)
                    else:
                        each = lambda x, row, axis=axis: jnp.take(x, row, axis)
                        for row, restarted in enumerate(rows):
                            np.testing.assert_array_equal(each(c, row), each(a if restarted else b, row))


@pytest.mark.slow
def test_every_weight_learns_from_the_start():
    """A new tiny Hope: non-zero, finite gradients for every leaf, the starts of all memories and CMS levels included."""
    small = dataclasses.replace(preset("tiny-hope"), width=16, layers=2, heads=2, chunk=8, memory_hidden=4)
    small = dataclasses.replace(small, cms=dataclasses.replace(small.cms, hidden=(8, 8), periods=(16, 8)))
    net, weights = nnx.split(LanguageModel(small, rngs=nnx.Rngs(0)), nnx.Param)
    text = jax.random.randint(jax.random.key(0), (2, 49), 0, 256)

    def loss(weights):
        logits, _ = read(nnx.merge(net, weights), text[:, :-1], 48)
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(weights)):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(g).all(), name
        assert jnp.abs(g).max() > 0, name
        if "start" in name:  # (L, H, M, ., .): every memory of every block
            assert (jnp.abs(g).max(axis=(1, 3, 4)) > 0).all(), name


def test_presets_are_equal_in_parameters_within_a_size():
    sizes = {}
    for name in PRESETS:
        made = nnx.eval_shape(lambda name=name: LanguageModel(preset(name), rngs=nnx.Rngs(0)))
        sizes.setdefault(name.split("-")[0], []).append(made.parameters)
    for size, counts in sizes.items():
        assert max(counts) / min(counts) < 1.03, (size, counts)
    nominal = {"140m": 1.4e8, "340m": 3.4e8, "760m": 7.6e8, "1.3b": 1.3e9}
    assert all(sizes[size][0] == pytest.approx(count, rel=0.25) for size, count in nominal.items())


@pytest.mark.slow
def test_hope_by_the_papers_equations_reads_a_short_text():
    """A chunk of 64 tokens, from random weights; nothing bounds what it learns from longer ones."""
    made = dataclasses.replace(preset("tiny-hope-paper"), layers=2, cms=CMSConfig(hidden=(8,)))
    net, weights = nnx.split(LanguageModel(made, rngs=nnx.Rngs(0)), nnx.Param)
    text = jax.random.randint(jax.random.key(1), (1, 64), 0, made.vocabulary)

    @jax.jit
    def call(weights):
        model = nnx.merge(net, weights)
        return model(text, model.init_state(1))

    logits, state = call(weights)
    assert jnp.isfinite(logits).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("mixer", "reading", "alignment"), [("self-modifying", 24, 48), ("titans", 12, 48), ("attention", 1, 16)]
)
def test_documents_align_with_the_longest_chunk_and_period(mixer, reading, alignment):
    """Chunks of 12 and 24 tokens, periods of 16 and 8: their least common multiple."""
    made = config(mixer=mixer, chunk=12, projection_chunk=24, periods=(16, 8))
    assert (made.reading, made.alignment) == (reading, alignment)


def test_options_reach_the_memory():
    made = lambda mixer, **fields: sequence_layer(config(mixer, **fields))
    assert made("oja") == linear.LinearMemory(8, 2, "oja", chunk=4)
    assert made("lp", lp_power=1.5) == OmegaMemory(8, 2, "lp", window=1, chunk=4, power=1.5)
    assert made("huber", huber_threshold=0.3) == OmegaMemory(8, 2, "huber", window=1, chunk=4, threshold=0.3)
    assert made("linear", gated=False) == linear.LinearMemory(8, 2, "linear", gated=False, chunk=4)
    assert made("gated-delta", max_rate=2.0) == linear.LinearMemory(8, 2, "gated-delta", 2.0, chunk=4)
    assert made("huber", max_rate=0.1, surprise=1.0) == OmegaMemory(8, 2, "huber", 1, max_rate=0.1, surprise=1.0, chunk=4)
    fields = dict(retention="zero", errors="exact", step="normalised", read="boundary", surprise=1.5, features="boundary")
    own = dict(max_rate=0.5, targets="rms", rates="own", generated=("keys",))
    layer = made("self-modifying", erase="memory", **own, **fields)
    own["rule"] = Rule(erase="memory", **fields)
    assert layer == SelfModifyingTitans(8, 2, 3, chunk=4, **own)
    rule = Rule(erase="none", **fields)
    assert made("titans", max_rate=0.5, values="raw", **fields) == Titans(8, 2, 3, True, 0.5, rule, "raw", chunk=4)
    assert not made("titans", damped=False).rule.damped and not made("titans", momentum=False).momentum
    norm = lambda layer: float(jnp.linalg.norm(layer.normalised(jnp.full((1, 4), 2.0))))
    norms = [norm(layer) for layer in (made("delta", values="unit"), made("oja"), made("delta"))]
    assert norms == pytest.approx([1, 1, 4], rel=1e-6)
    assert made("omega", values="raw").values == "raw"
    assert (made("self-modifying").rule.erase, made("titans").rule.erase) == ("layer", "none")
    for features in ("identity", "polynomial"):
        layer = made("omega", omega_window=3, omega_features=features)
        assert layer == OmegaMemory(8, 2, "l2", window=3, features=features, chunk=4)


@pytest.mark.parametrize("tied", cases([True, False], [False]))
def test_the_first_loss_is_near_chance(tied):
    made = LanguageModel(dataclasses.replace(preset("tiny-hope-attention"), tie_embeddings=tied), rngs=nnx.Rngs(0))
    text = jax.random.randint(jax.random.key(0), (2, 65), 0, made.config.vocabulary)
    logits = jax.jit(lambda: read(made, text[:, :-1], 64)[0])()
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()
    assert loss == pytest.approx(math.log(made.config.vocabulary), rel=0.05)


def test_bfloat16_keeps_fast_state_in_float32():
    small = dataclasses.replace(config(blocks=1, **IN_CONTEXT), dtype="bfloat16")
    made = LanguageModel(small, rngs=nnx.Rngs(0))
    text = tokens(1, 20)
    logits, state = jax.jit(lambda: read(made, text, 20))()
    assert logits.dtype == jnp.float32 and state.learning.open.inputs.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state.learning.levels)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    exact = LanguageModel(dataclasses.replace(small, dtype="float32"), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(logits, jax.jit(lambda: read(exact, text, 20)[0])(), atol=0.04)


def test_second_call_does_not_compile():
    made = LanguageModel(config(**IN_CONTEXT), rngs=nnx.Rngs(0))
    call = jax.jit(lambda text, state: made(text, state, multiple=8))
    _, state = call(tokens(1, 8), jax.tree.map(jnp.asarray, made.init_state(1)))
    call(tokens(1, 8), state)
    assert call._cache_size() == 1


def test_what_is_refused():
    made = LanguageModel(config(), rngs=nnx.Rngs(0))
    for wrong in (-1, 11):
        with pytest.raises(UserError, match=f"token {wrong} is out of range"):
            read(made, np.array([[1, wrong]]))
        assert jnp.isnan(jax.jit(lambda text: read(made, text)[0])(jnp.array([[1, wrong]]))[0, 1]).all()
    with pytest.raises(UserError, match="preset 'tiny-hop' is unknown.*tiny-hope"):
        preset("tiny-hop")
    for fields, message in [
        (dict(periods=(6, 4)), "6 is not a multiple of 4"),
        (dict(periods=(8, 4, 2)), "more than the 2 levels"),
        (dict(variant="nested", hidden=(4, 5), periods=(8, 4)), "equal widths"),
        (dict(lp_power=0.5), "model.lp_power 0.5: give a finite number of at least 1 and at most 8"),
        (dict(huber_threshold=0.0), "model.huber_threshold 0.0: give a finite number above 0"),
        (dict(mixer="hope"), "model.mixer 'hope': give one of self-modifying, titans"),
        (dict(variant="parallel"), "model.cms.variant 'parallel': give one of sequential, nested, independent"),
        (dict(width=9), "width 9 is not a multiple of model.heads 2"),
        (dict(projection_chunk=6), "6 is not a multiple of model.chunk 4"),
        (dict(blocks=0), "model.cms.blocks 0: give a whole number of at least 1 or None"),
        (dict(blocks=3), "model.cms.blocks 3 must be from 1 to model.layers 2"),
    ]:
        with pytest.raises(UserError, match=message):
            LanguageModel(config(**fields), rngs=nnx.Rngs(0))


def test_states_weights_and_promises_that_do_not_fit_are_refused():
    made = {name: LanguageModel(config(**fields), rngs=nnx.Rngs(0)) for name, fields in FITTING.items()}
    text = tokens(2, 12)
    for name, of in (("frozen", "learning"), ("learning", "frozen"), ("frozen", "attention"), ("attention", "frozen")):
        with pytest.raises(UserError, match="the state is of another config: give init_state"):
            made[name](text, made[of].init_state(2))
    with pytest.raises(UserError, match="the state is of another config"):
        made["frozen"](text, None)
    for fields in ({"width": 32}, {"layers": 3}, {"mixer": "titans"}):
        other = config(**FITTING["frozen"] | fields)
        with pytest.raises(UserError, match="the state is of another config"):
            made["frozen"](text, init_state(other, init_weights(other, jax.random.key(0)), 2))
    with pytest.raises(UserError, match="weights have 2 layers, the config 3"):
        init_state(config("delta", layers=3), made["frozen"].weights, 2)
    for wrong in (0, -4, 2.5, "4", None):
        with pytest.raises(UserError, match="multiple .*: give a whole number of at least 1"):
            made["frozen"](text, made["frozen"].init_state(2), multiple=wrong)
        with pytest.raises(UserError, match="batch_size .*: give a whole number of at least 1"):
            made["frozen"].init_state(wrong)
    with pytest.raises(UserError, match="max_length 0: give a whole number"):
        made["attention"].init_state(2, max_length=0)
    with pytest.raises(UserError, match=r"model: reset is int64\[2, 12\]: give bools \[2, 12\]"):
        made["frozen"](text, made["frozen"].init_state(2), reset=np.zeros((2, 12), np.int64))


@pytest.mark.parametrize("name", ["self-modifying", "titans", "delta", "omega", "attention"])
def test_inputs_of_another_shape_or_type_are_refused(name):
    made = LanguageModel(config(name), rngs=nnx.Rngs(0))
    state = made.init_state(2)
    for wrong in (np.ones((2, 3)), np.ones(3, int), np.ones((2, 0), int), np.ones((2, 3), bool)):
        with pytest.raises(UserError, match=r"give integers of shape \(B, T\)"):
            made(wrong, state)
    with pytest.raises(UserError, match="model: 1 rows of tokens, 2 of the state: give init_state batch_size=1"):
        made(np.ones((1, 3), int), state)
    with pytest.raises(UserError, match=r"model: reset is bool\[1, 3\]: give bools \[2, 3\]"):
        made(np.ones((2, 3), int), state, reset=np.zeros((1, 3), bool))


@pytest.mark.parametrize(("blocks", "fused"), [(1, 2), (None, 1)])
def test_attention_outside_of_inner_gradients_may_be_fused(monkeypatch, blocks, fused):
    """Of three blocks: those before the first that learns, in one loop, and its own; those inside its CMS have no kernel."""
    traced = []

    def kernel(q, k, v, document, window):
        traced.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(attention, "fits", lambda shape: True)
    monkeypatch.setattr(attention, "splash", kernel)
    made = config("attention", layers=3, periods=(8, 4), blocks=blocks)
    weights = init_weights(made, jax.random.key(0))
    jax.eval_shape(lambda: apply(made, weights, jnp.zeros((1, 16), int), init_state(made, weights, 1), multiple=16))
    assert len(traced) == fused

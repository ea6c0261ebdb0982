# ruff: noqa: E501 (one call a row)
"""The table of wrong calls: whatever a user gives by mistake is answered by one line with the thing, its value and the remedy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nested_jax
from nested_jax import CMSConfig, LanguageModel, Level, ModelConfig, data, describe, meta, nest, optim, preset, run
from nested_jax.cms import init_weights as init_cms
from nested_jax.cms import inner_rule
from nested_jax.data import tasks
from nested_jax.memory import (
    Attention,
    Gates,
    LinearMemory,
    MemoryState,
    OmegaMemory,
    Rule,
    SelfModifyingTitans,
    Titans,
    chunked,
    objective,
    tokenwise,
)
from nested_jax.models.language_model import apply, init_state, init_weights
from nested_jax.train.config import TrainConfig

KEY, NAN = jax.random.key(0), float("nan")
CMS = CMSConfig(hidden=(5, 5), periods=(8, 4))
CONFIG = ModelConfig(vocabulary=11, width=8, layers=2, heads=2, mixer="gated-delta", chunk=4, memory_hidden=3, cms=CMS)
FROZEN = CMSConfig(hidden=(5,))
TOKENS = np.ones((2, 4), int)
zeros = lambda make: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(make))


@functools.cache
def weights(**fields):
    """Weights of zeros, which no call here computes with."""
    return zeros(lambda: init_weights(dataclasses.replace(CONFIG, **fields), KEY))


@functools.cache
def state(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    return zeros(lambda: init_state(config, init_weights(config, KEY), 2))


@functools.cache
def model(**fields):
    config = dataclasses.replace(CONFIG, **fields)
    graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, weights(**fields))))


def cms(**fields):
    return dataclasses.replace(CMS, **fields)


def call(tokens=TOKENS, now=None, **options):
    return lambda: model()(tokens, state() if now is None else now(), **options)


def pure(config=CONFIG, of=weights, tokens=TOKENS, now=state, **options):
    return lambda: apply(config, of() if callable(of) else of, tokens, now(), **options)


def layer(of=lambda: LAYER_WEIGHTS, now=lambda: LAYER_STATE, x=None, position=0, **options):
    x = np.ones((2, 4, 8), np.float32) if x is None else x
    return lambda: LAYER(of(), now(), x, position, **options)


LAYER = LinearMemory(8, 2, chunk=4)
LAYER_WEIGHTS = zeros(lambda: LAYER.init_weights(KEY))
LAYER_STATE = zeros(lambda: LAYER.init_state(LAYER.init_weights(KEY), 2))
PARAMS = {"dense": {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}}
MEMORY, GATE = MemoryState(np.zeros((2, 3), np.float32)), np.ones(5, np.float32)
GATES, KEYS, VALUES = Gates(GATE, GATE, GATE), np.ones((5, 3), np.float32), np.ones((5, 2), np.float32)
TOTAL = Level(lambda slower: jnp.zeros(()), lambda state, x, slower: (state + x.sum(), state), period=2, name="total")
BYTES = data.ByteTokenizer()
COUNT, OTHER = "give a whole number of at least 1", "the state is of another config: give init_state"

MODELS = [
    (lambda: LanguageModel("tiny-hope"), r"config 'tiny-hope': give a ModelConfig, such as preset\('tiny-hope'\)"),
    (lambda: LanguageModel("tiny-hop", rngs=nnx.Rngs(0)), r"config 'tiny-hop': give a ModelConfig, such as preset"),
    (lambda: LanguageModel(ModelConfig, rngs=nnx.Rngs(0)), "config <class 'nested_jax.models.config.ModelConfig'>: give a ModelC"),
    (lambda: LanguageModel({"width": 8}, rngs=nnx.Rngs(0)), "config {'width': 8}: give a ModelConfig"),
    (lambda: LanguageModel(None, rngs=nnx.Rngs(0)), "config None: give a ModelConfig"),
    (lambda: LanguageModel(CONFIG), r"LanguageModel: rngs None: give nnx.Rngs\(seed or key\)"),
    (lambda: LanguageModel(CONFIG, rngs=0), r"LanguageModel: rngs 0: give nnx.Rngs\(0\)"),
    (lambda: LanguageModel(CONFIG, rngs=KEY), r"LanguageModel: rngs key<fry>\[\]: give nnx.Rngs\(seed or key\)"),
    (lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), rule="adam"), "rule 'adam': give an optax transformation"),
    (lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), rule=optax.sgd), "rule <function sgd.*: give an optax transformation"),
    (lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), rule=0.1), "rule 0.1: give an optax transformation"),
    (lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), rule=[optax.sgd(1.0)]), "1 inner rules for the 2 levels.*give one rule"),
    (lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0), rule=[optax.sgd(1.0), "adam"]), "rule .*: give an optax transf"),
    *((lambda wrong=wrong: model().init_state(wrong), f"batch_size .*: {COUNT}") for wrong in (0, -1, 2.0, "2", True, TOKENS)),
    (lambda: model().init_state(2, max_length=-3), f"max_length -3: {COUNT}"),
    (lambda: model().init_state(2, max_length=2.5), f"max_length 2.5: {COUNT}"),
    *((call(now=lambda wrong=wrong: wrong), OTHER) for wrong in (2, {}, "state", (1, 2))),
    (lambda: model()(TOKENS, None), OTHER),
    (lambda: model()(state(), TOKENS), OTHER),
    (call(None), "tokens object.*: give integers of shape"),
    (call("text"), "tokens <U4.*: give integers of shape"),
    (call([[1, 2], [3]]), r"tokens \[\[1, 2\], \[3\]\]: give integers of shape \(B, T\), rows of one length"),
    (call([["a", "b"]]), "tokens <U1.*: give integers of shape"),
    (call(np.ones((2, 4))), r"tokens float64\[2, 4\]: give integers of shape"),
    (call(np.ones(4, int)), r"tokens int64\[4\]: give integers of shape"),
    (call(np.ones((2, 0), int)), r"tokens int64\[2, 0\]: give .*, at least one"),
    (call(np.full((2, 4), 11)), "token 11 is out of range: the model's vocabulary has tokens 0 to 10"),
    (call(np.full((2, 4), -1)), "token -1 is out of range"),
    (call(np.ones((3, 4), int)), "3 rows of tokens, 2 of the state: give init_state batch_size=3"),
    (call(reset=True), r"reset is bool\[\]: give bools \[2, 4\]"),
    (call(reset=[True, False]), r"reset is bool\[2\]: give bools \[2, 4\]"),
    (call(reset="yes"), r"reset 'yes': give an array of bools \[2, 4\]"),
    (call(reset=np.ones((2, 4), int)), r"reset is int64\[2, 4\]: give bools \[2, 4\]"),
    (call(reset=np.arange(4)[None].repeat(2, 0) == 1), "reset at token 1: give documents that start on multiples of 8"),
    *((call(multiple=wrong), f"multiple .*: {COUNT}") for wrong in (0, "8", None, 1.5)),
    *(
        (call(now=lambda fields=fields: state(**fields)), OTHER)
        for fields in (
            dict(width=16), dict(layers=3), dict(heads=1), dict(mixer="titans"), dict(mixer="attention"), dict(cms=FROZEN),
            dict(cms=cms(periods=(4, 2))), dict(cms=cms(periods=(4,))), dict(cms=cms(hidden=(6, 6))),
            dict(cms=cms(rule="adam")), dict(cms=cms(scope="batch")), dict(cms=cms(blocks=1)),
        )
    ),
    (call(now=lambda: state()._replace(position=-5)), "state.position -5: give the tokens that the state has read"),
    *((call(now=lambda wrong=wrong: state()._replace(position=wrong)), OTHER) for wrong in ("3", None, 2.5)),
    (call(now=lambda: state()._replace(mixers=None)), OTHER),
    (call(now=lambda: state()._replace(learning=None)), OTHER),
    (lambda: init_weights("tiny-hope", KEY), "config 'tiny-hope': give a ModelConfig, such as preset"),
    (lambda: init_weights(CONFIG, 0), r"init_weights: key 0: give jax.random.key\(0\)"),
    (lambda: init_weights(CONFIG, nnx.Rngs(0)), r"init_weights: key Rngs.*: give jax.random.key\(seed\)"),
    (lambda: init_state(CONFIG, None, 2), "weights: .* has none, the config asks for shape .*: give those of its init_weights"),
    (lambda: init_state(CONFIG, {}, 2), "weights: .* has none"),
    (lambda: init_state(CONFIG, weights(layers=3), 2), "weights have 3 layers, the config 2: give those of its init_weights"),
    (pure("tiny-hope"), "config 'tiny-hope': give a ModelConfig"),
    (pure(of=model), "weights: .*: give those of its init_weights"),
    (pure(of=lambda: weights(width=16)), r"weights: .* has shape \[.*16.*\], the config asks for shape .*: give those of"),
    (pure(of=lambda: weights(vocabulary=12)), r"weights: embedding has shape \[12, 8\], the config asks for shape \[11, 8\]"),
    (pure(rules=optax.adam), "rule <function adam.*: give an optax transformation"),
    (pure(rules=[optax.identity()]), "1 inner rules for the 2 levels"),
    (pure(rules=[optax.trace(0.9)] * 2), OTHER),
]  # fmt: skip

CONFIGS = [
    *((lambda wrong=wrong: preset(wrong), "preset .* is unknown: give SIZE-FAMILY, such as") for wrong in ("tiny-hop", "", 3, None)),
    (lambda: preset(["tiny-hope"]), "is unknown: give SIZE-FAMILY, such as"),
    *(
        (lambda fields=fields: ModelConfig(**fields), f"model.{next(iter(fields))} .*: give {words}")
        for fields, words in (
            (dict(width="8"), "a whole number of at least 1"), (dict(width=0), "a whole"), (dict(layers=2.0), "a whole"),
            (dict(layers=True), "a whole"), (dict(vocabulary=-1), "a whole"), (dict(chunk=0), "a whole"),
            (dict(mixer="mamba"), "one of self-modifying"), (dict(mixer=None), "one of"), (dict(mixer=["delta"]), "one of"),
            (dict(momentum="yes"), "True or False"), (dict(retention="no"), "one of zero, initial, none"),
            (dict(read="never"), "one of after, before, boundary"), (dict(erase="second"), "one of layer, memory, none or None"),
            (dict(errors="exakt"), "one of boundary, exact"), (dict(step=1), "one of proximal, normalised, raw"),
            (dict(rates="mine"), "one of shared, own"), (dict(features=None), "one of token, boundary"),
            (dict(targets="L2"), "one of l2, rms, raw"), (dict(surprise=0), "a number above 0"), (dict(gated=1), "True or False"),
            (dict(surprise=float("nan")), "a number above 0"), (dict(max_rate=float("inf")), "a finite number of at least 1e-06 and at most 1000000 or None"),
            (dict(max_rate=1e39), "a finite number of at least 1e-06"), (dict(max_rate=5e-324), "a finite number of at least 1e-06"),
            (dict(damped=0.5), "True or False"), (dict(values="l2"), "one of unit, raw or None"),
            (dict(generated="keys"), "a tuple, each a different one of keys, values, rates, retention, queries"),
            (dict(generated=("keys", "rate")), "a tuple"), (dict(generated=None), "a tuple"),
            (dict(window=None), "a whole"), (dict(lp_power=float("inf")), "a finite number of at least 1"), (dict(lp_power=9), "a finite number of at least 1 and at most 8"),
            (dict(lp_power="3"), "a finite number"), (dict(huber_threshold=-1), "a finite number above 0"),
            (dict(cms={}), "a CMSConfig"), (dict(cms=CMSConfig), "a CMSConfig"),
            (dict(memory_policy="half"), "one of none, full, loops, blocks, sqrt, log"), (dict(memory_policy=0), "one of none"),
            (dict(dtype="float16"), "one of float32, bfloat16"), (dict(dtype=jnp.float32), "one of float32"),
            (dict(tie_embeddings=None), "True or False"), (dict(width=np.ones((2, 2))), "a whole number"),
        )
    ),
    *(
        (lambda fields=fields: ModelConfig(**fields), rf"model.max_rate {rate} makes what .* holds grow.*: give at most {most}$")
        for rate, most, fields in (
            (1.5, 1, dict(step="normalised", errors="exact", max_rate=1.5)),
            (2.5, 2, dict(step="normalised", errors="exact", erase="memory", max_rate=2.5)),
            (2.5, 2, dict(step="normalised", mixer="titans", erase="layer", max_rate=2.5)),
            (2, 1, dict(step="raw", errors="exact", momentum=False, max_rate=2.0)), (1.5, 1, dict(step="raw", max_rate=1.5)),
            (1.0000001, 1, dict(step="raw", mixer="titans", erase="memory", max_rate=1.0000001)),
            (4, 2, dict(step="normalised", mixer="titans", errors="exact", chunk=1)),
            (3, 2, dict(mixer="delta", max_rate=3.0)), (3, 2, dict(mixer="gated-delta", max_rate=3.0)), (2, 1, dict(mixer="oja", max_rate=2.0)),
        )
    ),
    *(
        (lambda fields=fields: ModelConfig(errors="exact", damped=False, **fields), "model.damped False makes .* grow .*: give True")
        for fields in ({}, dict(step="normalised", max_rate=0.01), dict(mixer="titans"), dict(step="raw"))
    ),
    *(
        (lambda make=make: make(max_rate=0.1, surprise=float("inf"), chunk=31), "max_rate 0.1 makes errors .* at most .*, 0.0625, or")
        for make in (functools.partial(ModelConfig, mixer="omega"), functools.partial(ModelConfig, mixer="lp"), functools.partial(OmegaMemory, 8, 2))
    ),
    *(
        (lambda make=make: make(surprise=float("inf"), values="raw"), "values raw makes errors of any norm to the power 2 grow: give unit, or")
        for make in (functools.partial(ModelConfig, mixer="lp"), functools.partial(OmegaMemory, 8, 2, "lp"))
    ),
    (lambda: ModelConfig(mixer="oja", values="raw"), "model.values raw may make what oja holds grow, .*: give unit"),
    (lambda: ModelConfig(width=9), "model.width 9 is not a multiple of model.heads 4: change one"),
    (lambda: ModelConfig(projection_chunk=48), "model.projection_chunk 48 is not a multiple of model.chunk 64: change one"),
    *(
        (lambda fields=fields: CMSConfig(**fields), f"model.cms.{next(iter(fields))} .*: give {words}")
        for fields, words in (
            (dict(hidden=256), "a tuple, each a whole number of at least 1"), (dict(hidden=[256]), "a tuple"),
            (dict(hidden=(256.0,)), "a tuple"), (dict(hidden=(0,)), "a tuple"), (dict(hidden=()), "one hidden width a level"),
            (dict(periods=64), "a tuple"), (dict(periods=np.array([8, 4])), "a tuple"), (dict(variant="chain"), "one of sequential"),
            (dict(activation="relu"), "one of gelu, swiglu"), (dict(meta_gradient=True), "one of full, first-order"),
            (dict(scope="token"), "one of sequence, batch"), (dict(blocks=0), "a whole number of at least 1 or None"),
            (dict(rule=optax.sgd(0.1)), "one of sgd, momentum, adam"), (dict(rate=-0.1), "a finite number of at least 0"),
            (dict(rate="0.1"), "a finite number"), (dict(clip=NAN), "a finite number"),
        )
    ),
    (lambda: CMSConfig(periods=(6, 4), hidden=(4, 4)), "6 is not a multiple of 4: give periods that divide"),
    (lambda: CMSConfig(periods=(8, 4)), "are more than the 1 levels of cms.hidden"),
    (lambda: TrainConfig(learning_rate=10**400), "--learning-rate 1000.*: give a finite number of at least 0"),
    (lambda: ModelConfig(huber_threshold=10**400), "huber_threshold 1000.*: give a finite"),
    *(
        (lambda name=name, wrong=wrong: TrainConfig(**{name: wrong}), f"--{name.replace('_', '-')} .*: give {words}")
        for name, wrong, words in (
            ("steps", 2**31, "a whole number of at least 1 and below 2147483648"), ("warmup", 10**30, "a whole number of at least 0"),
            ("data", "", "stdlib, the path of text"), ("data", "a\x1b[2J", "stdlib, the path"), ("run_dir", "a\0b", "the path of a folder"),
            ("run_dir", "a\udcff", "the path of a folder"), ("tokenizer", "", "sentencepiece, bytes or the path"),
        )
    ),
    (lambda: TrainConfig(steps=-1), "--steps -1: give a whole number"),
    (lambda: TrainConfig(model="tiny-hope"), "--model 'tiny-hope': give a ModelConfig"),
    (lambda: TrainConfig(batch_size=8, accumulate=3), "--batch-size 8 is not a multiple of --accumulate 3: change one"),
    (lambda: TrainConfig(optimizer="lion"), "--optimizer 'lion': give one of"),
    (lambda: TrainConfig(learning_rate="fast"), "--learning-rate 'fast': give a finite number"),
    (lambda: TrainConfig(task="pairity"), "task 'pairity' is unknown: give parity"),
    (lambda: TrainConfig(task=3), "--task 3: give the name of a task or None"),
    (lambda: TrainConfig(task="parity", data="text.txt"), "--data text.txt is for text, which --task parity takes the place of: leave one out"),
    (lambda: TrainConfig(task="parity", carry=True), "--carry is for text, which --task parity takes the place of: leave one out"),
    (lambda: TrainConfig(task="parity", model=ModelConfig(vocabulary=1)), "--model.vocabulary 1 is too small for --task parity: give 2"),
    (lambda: TrainConfig(task="parity", shortest=0), "--shortest 0: give a whole number"),
    (lambda: TrainConfig.from_preset("tiny-hop"), "preset 'tiny-hop' is unknown: give SIZE-FAMILY"),
    (lambda: TrainConfig.from_preset("tiny-hope", step=3), "TrainConfig has no field 'step': give some of its fields"),
    (lambda: nested_jax.load("no/such/run"), "holds no run: make one with nested-jax train"),
    (lambda: nested_jax.load(3), "run_dir 3: give the path of a run folder"),
    (lambda: nested_jax.load(None), "run_dir None: give the path of a run folder"),
]  # fmt: skip

MEMORIES = [
    (lambda: LinearMemory(8, 3), "LinearMemory: width 8 is not a multiple of heads 3: change one"),
    (lambda: LinearMemory("8", 2), "LinearMemory: width '8': give a whole number"),
    (lambda: LinearMemory(8, 2, "dleta"), "LinearMemory: rule 'dleta': give one of linear, delta"),
    (lambda: LinearMemory(8, 2, chunk=0), "LinearMemory: chunk 0: give a whole number"),
    (lambda: LinearMemory(8, 2, checkpoint=2.5), "LinearMemory: checkpoint 2.5: give"),
    (lambda: Titans(8, 2, rule="raw"), "Titans: rule 'raw': give a Rule"),
    (lambda: Titans(8, 2, momentum=0.9), "Titans: momentum 0.9: give True or False"),
    (lambda: Titans(8, 2, max_rate=0), "Titans: max_rate 0: give a finite number of at least 1e-06"),
    (lambda: Titans(8, 2, values="l2"), "Titans: values 'l2': give one of unit, raw"),
    (lambda: OmegaMemory(8, 2, values=None), "OmegaMemory: values None: give one of unit, raw"),
    (lambda: LinearMemory(8, 2, "oja", values="raw"), "LinearMemory: values raw may make what oja holds grow"),
    (lambda: SelfModifyingTitans(8, 2, generated=("query",)), r"generated \('query',\): give a tuple, each a different one of keys"),
    (lambda: SelfModifyingTitans(8, 2, generated=("keys",) * 2), r"generated \('keys', 'keys'\): give a tuple, each a different"),
    (lambda: SelfModifyingTitans(8, 2, generated=["keys"]), r"generated \['keys'\]: give a tuple"),
    (lambda: Rule(read="start"), "Rule: read 'start': give one of after, before, boundary"),
    (lambda: Rule(damped=1), "Rule: damped 1: give True or False"),
    (lambda: OmegaMemory(8, 2, objective=objective.l2), "OmegaMemory: objective <function l2.*: give one of l2, lp, huber"),
    (lambda: OmegaMemory(8, 2, window=-1), "OmegaMemory: window -1: give a whole number"),
    (lambda: SelfModifyingTitans(8, 2, projection_chunk=48), "projection_chunk 48 is not a multiple of chunk 64"),
    (lambda: Attention(8, 2, window=0), "Attention: window 0: give a whole number"),
    (lambda: Attention(8, 2, implementation="flash"), "Attention: implementation 'flash': give one of xla, cudnn"),
    (lambda: Rule(step="newton"), "Rule: step 'newton': give one of proximal, normalised, raw"),
    (lambda: objective.lp(0.5), "objective lp: power 0.5 must be at least 1"),
    (lambda: objective.huber(0.0), "objective huber: threshold 0.0 must be positive"),
    *(
        (lambda made=made, sizes=sizes: made.init_state(made.init_weights(KEY), **sizes), rf": {name} {wrong}: {COUNT}")
        for made in (LAYER, Attention(8, 2))
        for name, wrong in (("batch_size", 0), ("batch_size", 2.5), ("max_length", 0), ("max_length", -1), ("max_length", True))
        for sizes in ({"batch_size": 1} | {name: wrong},)
    ),
    *((lambda made=made: made.init_weights(0), r"key 0: give jax.random.key\(0\)") for made in (
        LAYER, Attention(8, 2), Titans(8, 2), OmegaMemory(8, 2), SelfModifyingTitans(8, 2))),
    (lambda: init_cms(0, CMS, 8), r"cms.init_weights: key 0: give jax.random.key\(0\)"),
    (layer(now=lambda: None), r"LinearMemory: the state is a NoneType: give this layer's init_state\(...\)"),
    (layer(now=lambda: (1, 2)), "LinearMemory: the state is a tuple: give this layer's init_state"),
    (layer(now=lambda: zeros(lambda: Titans(8, 2).init_state(Titans(8, 2).init_weights(KEY), 2))), "the state is a LevelState: give"),
    (layer(now=lambda: zeros(lambda: Attention(8, 2).init_state(Attention(8, 2).init_weights(KEY), 2))), "is a AttentionState: give"),
    (lambda: Attention(8, 2)(LAYER_WEIGHTS, LAYER_STATE, np.ones((2, 4, 8)), 0), "Attention: the state is a MemoryState: give"),
    (layer(of=dict), r"LinearMemory: weights {}: give those of its init_weights"),
    (layer(of=lambda: None), "LinearMemory: weights None: give those of its init_weights"),
    (layer(x=[[1.0]]), r"LinearMemory: x \[\[1.0\]\]: give an array of floats \(B, T, 8\)"),
    (layer(x=np.ones((2, 4, 7))), r"LinearMemory: x is float64\[2, 4, 7\]: give floats \(B, T, 8\), at least one token"),
    (layer(x=np.ones((2, 4, 8), int)), r"LinearMemory: x is int64\[2, 4, 8\]: give floats"),
    (layer(x=np.ones((3, 4, 8))), "LinearMemory: 3 rows of tokens, 2 of the state: give init_state batch_size=3"),
    (layer(position=None), "LinearMemory: position None: give the tokens that the state has read, from 0"),
    (layer(position=-1), "LinearMemory: position -1: give the tokens"),
    (layer(position=1.5), "LinearMemory: position 1.5: give the tokens"),
    (layer(reset=True), r"LinearMemory: reset True: give an array of bools \[2, 4\]"),
    (layer(reset=np.zeros((2, 5), bool)), r"LinearMemory: reset is bool\[2, 5\]: give bools \[2, 4\]"),
    (layer(reset=np.arange(4)[None].repeat(2, 0) == 3), "reset at token 3: give documents that start on multiples of 4"),
    *(
        entry
        for rule in (chunked, tokenwise)
        for entry in (
            (lambda rule=rule: rule(MEMORY.weights, KEYS, VALUES, GATES, KEYS), r"state float32\[2, 3\] .*: give a MemoryState"),
            (lambda rule=rule: rule(MEMORY, KEYS, VALUES, GATE, KEYS), r"gates float32\[5\]: give a MemoryState and Gates"),
            (lambda rule=rule: rule(MEMORY, VALUES, VALUES, GATES, KEYS), r"inputs float32\[5, 2\] .*: give \(..., C, 3\)"),
            (lambda rule=rule: rule(MEMORY, KEYS, KEYS, GATES, KEYS), r"errors float32\[5, 3\] .*: give \(..., C, 2\)"),
            (lambda rule=rule: rule(MEMORY, KEYS, VALUES, GATES, KEYS[:1]), "one length C of at least 1, not .*queries 1.*: give"),
            (lambda rule=rule: rule(MEMORY, KEYS, VALUES, GATES, VALUES), r"queries float32\[5, 2\] .*: give \(..., C, 3\)"),
            (lambda rule=rule: rule(MEMORY, KEYS[:4], VALUES, GATES, KEYS), "one length C of at least 1, not inputs 4.*: give"),
            (lambda rule=rule: rule(MEMORY, KEYS, VALUES, GATES._replace(momentum=GATE), KEYS), "state.momentum is None.*: give"),
        )
    ),
]  # fmt: skip

OPTIMIZERS = [
    (lambda: optim.momentum(0.1, "0.9"), "momentum.*: decay '0.9' is no number: give one"),
    (lambda: optim.momentum(0.1, NAN), "decay nan is not finite: give a finite number"),
    (lambda: optim.momentum("fast"), "'fast' is no number: give"),
    (lambda: optim.adam_memory(0.1, eps=-1.0), "eps -1.0 is out of range: give a number"),
    (lambda: optim.adagrad_memory(0.1, "fulll"), "'fulll' is unknown: give one of diagonal, full"),
    (lambda: optim.delta_momentum(0.1, erase=-0.1), "erase -0.1 is out of range: give a number"),
    (lambda: optim.deep_momentum(0.1, objective="l3"), "'l3' is unknown: give one of"),
    (lambda: optim.deep_momentum(0.1, retention="start"), "'start' is unknown: give one of"),
    (lambda: optim.deep_momentum(0.1, hidden=0), "hidden 0 is out of range: give a whole number"),
    (lambda: optim.m3(0.1, slow_period=0), "slow_period 0 is out of range: give a whole number"),
    (lambda: optim.m3(0.1, steps=2.5), "steps 2.5.*: give"),
    (lambda: optim.continuum(0.1, periods=0), "0.*: give"),
    (lambda: optim.generalized_gradient_descent(0.1, window=0), "window 0 is out of range: give a whole number"),
    (lambda: optim.generalized_gradient_descent(0.1, steps="2"), "steps '2' is out of range: give a whole number"),
    (lambda: optim.newton_schulz(np.ones((2, 2), np.float32), form="cubic"), "'cubic' is unknown: give one of quintic, gradient"),
    (lambda: optim.clip_by_norm(-1.0), "-1.0 is out of range: give a number"),
    (lambda: optim.nonlinear_momentum(0.1, on="rows"), "'rows' is unknown: give one of matrices, leaves"),
    *(
        (lambda make=make: make(0.1).init({"w": np.ones((2, 3), np.float32), "n": np.arange(3)}), "parameter n is int.*: make it a float, or leave")
        for make in (optim.momentum, optim.adam_memory, optim.deep_momentum, optim.continuum, optim.generalized_gradient_descent)
    ),
    (lambda: optim.matrices(), "matrices: no pattern: give some"),
    (lambda: optim.matrices("(")(PARAMS), r"matrices: '\(' is no regular expression.*: give one such as"),
    (lambda: optim.matrices(3), "matrices: 3 is no pattern: give strings"),
    (lambda: optim.matrices("dense/kernl")(PARAMS), "matrices: 'dense/kernl' matches no parameter: give paths such as dense/kernel"),
    (lambda: optim.scale_by_m3().init(PARAMS), r"m3 is for matrices and parameter dense/bias of shape \[4\] is none: give"),
]  # fmt: skip

META = [
    (lambda: meta.unroll(lambda s, x: (s, x), 0.0, np.ones(4), checkpoint="half"), "checkpoint='half': give 'none', 'full'"),
    (lambda: meta.unroll(lambda s, x: (s, x), 0.0, np.ones(4), checkpoint=9), "checkpoint=9: give .* from 1 to 4"),
    (lambda: meta.unroll(lambda s, x: (s, x), 0.0, np.ones(0)), r"leaves of one length of at least 1 .*, not \[0\]"),
    (lambda: meta.unroll(lambda s, x: (s, x), 0.0, np.ones(4), checkpoint=()), r"checkpoint=\(\): give .* from 1 to 4"),
    (lambda: meta.maml(lambda p, b: 0.0, lambda rate: rate, 1)(1.0, 0.0, 0.1), "maml: the optimizer's function returns .*: return an optax"),
    (lambda: meta.hypergradient(lambda s: 0.0, TOTAL, implicit="general", tolerance="1e-6"), "tolerance='1e-6': give"),
    (lambda: meta.hypergradient(lambda m, s, e: s, TOTAL, implicit="general", solver="cg", condition=lambda s, x, m: s - m)(1.0, np.ones(2)), "solver 'cg': give a function"),
    *((lambda wrong=wrong: meta.es_grad(jnp.sum, scale=wrong), "es_grad: scale=.*: give a positive scale") for wrong in ("1", None, float("inf"))),
    (lambda: meta.es_grad(jnp.sum)(1.0, 0), r"es_grad: key 0: give jax.random.key\(0\)"),
    (lambda: meta.es_grad(lambda w: w, pairs=2)(jnp.ones(2), KEY), r"es_grad: the loss has shape \[2\]: give a scalar"),
    (lambda: (pes := meta.pes_grad(lambda w, s: (s, w), pairs=2)).update(jnp.ones(2), KEY, pes.init(jnp.ones(2), 0.0)), r"pes_grad: the loss has shape \[2\]: give a scalar"),
    (lambda: meta.maml(lambda p, b: 0.0, optax.sgd(0.1), -1), "maml: steps=-1.*: give whole numbers"),
    (lambda: meta.descent(lambda p, b, h: 0.0, 0.1), "0.1 is no optax transformation: give one"),
    (lambda: meta.hypergradient(lambda s: 0.0, 3), "hypergradient: 3 is no Level: give one"),
    (lambda: meta.hypergradient(lambda s: 0.0, TOTAL, truncate=0), "hypergradient: truncate=0.*: give"),
    (lambda: meta.hypergradient(lambda s: 0.0, TOTAL, implicit="symmetric", tolerance=2), "tolerance=2: give"),
]  # fmt: skip

LEVELS = [
    (lambda: Level(3, TOTAL.step, 1), "level 'level': init 3: give a function"),
    (lambda: Level(TOTAL.init, None, 1), "level 'level': step None: give a function"),
    (lambda: Level(TOTAL.init, TOTAL.step, 0, name="slow"), "level 'slow': period 0: give a whole number of at least 1"),
    (lambda: Level(TOTAL.init, TOTAL.step, "2"), "level 'level': period '2': give a whole number"),
    (lambda: Level(TOTAL.init, TOTAL.step, 2, tokens=0), "level 'level': tokens 0: give a whole number"),
    (lambda: Level(TOTAL.init, TOTAL.step, 2, description="l2"), "level 'level': description 'l2': give a Description"),
    (lambda: nest(3, TOTAL), "nest: fast 3: give a Level"),
    (lambda: nest(TOTAL, LAYER), "nest: slow LinearMemory.*: give a Level"),
    (lambda: nest(TOTAL, dataclasses.replace(TOTAL, period=3)), "period 3 of level 'total' is not a multiple of period 2"),
    (lambda: nest(TOTAL, dataclasses.replace(TOTAL, tokens=3)), "give both the same"),
    (lambda: run(LAYER, None, np.ones(4)), "run: level LinearMemory.*: give a Level"),
    (lambda: run(TOTAL, None, np.ones(0)), "a stream has leaves of one length of at least 1"),
    (lambda: run(TOTAL, None, {"x": np.ones(4), "y": np.ones(3)}), r"leaves of one length .*, not \[3, 4\]"),
    (lambda: run(TOTAL, None, 3.0), "a stream has arrays with a leading axis, not numbers: stack them"),
    (lambda: run(TOTAL, None, np.ones(4), checkpoint="half"), "checkpoint='half': give"),
    (lambda: run(dataclasses.replace(TOTAL, step=lambda s, x, slower: ((s, s), x)), None, np.ones(4)), "level 'total': the step changes the state's structure.*: return it"),
    (lambda: describe(()), r"describe: \(\) is empty: give a level, layer, model, optimizer or tree of parameters"),
    (lambda: describe([]), r"describe: \(\) is empty: give a level"),
    (lambda: describe({}), "describe: dict is no level, layer, model.*: give one of these"),
    (lambda: describe(3), "describe: int is no level, layer, model, optimizer or tree of parameters: give one of these"),
    (lambda: describe("tiny-hope"), "describe: str is no level.*: give one of these"),
    (lambda: describe(None), "describe: NoneType is no level.*: give one of these"),
    (lambda: describe(optax.adam), "describe: function is no level.*: give one of these"),
    (lambda: describe((optax.sgd(0.1), optax.sgd(0.1))), "describe: 2 optimizers: give one"),
    (lambda: describe(PARAMS, tokens_per_step=0), "describe: tokens_per_step 0 is no positive number: give one, or None"),
    (lambda: describe(PARAMS, tokens_per_step="4"), "describe: tokens_per_step '4' is no positive number"),
    (lambda: describe(PARAMS, extra=3), "describe: extra 3: give a function of the parameters"),
    (lambda: describe({"w": np.zeros((0, 4), np.float32)}), "describe: nothing can learn in this: give parameters"),
    (lambda: nested_jax.local_surprise(3, PARAMS, 0.0), "local_surprise: loss 3: give a function"),
    (lambda: nested_jax.surprise_and_grad(None, PARAMS, 0.0), "local_surprise: loss None: give a function"),
    (lambda: nested_jax.local_surprise(lambda p, b: b, PARAMS, np.ones(2)), r"the loss has shape \[2\]: give a scalar"),
    (lambda: nested_jax.local_surprise(lambda p, b: 1, PARAMS, 0.0), "local_surprise: the loss .*: give"),
    (lambda: nested_jax.local_surprise(lambda p, b: b, PARAMS, 0.0), "the loss has no linear layer"),
    (lambda: nested_jax.local_surprise(lambda p, b: b, PARAMS, 0.0, has_aux=True), "single value: give a pair"),
    (lambda: inner_rule("adam"), "inner_rule: config 'adam': give a CMSConfig"),
]  # fmt: skip

DATA = [
    (lambda: data.open_documents("stdlib", "test"), "split 'test' is unknown: give \"train\" or \"heldout\""),
    (lambda: data.open_documents("no/such/path/at/all.txt"), "path no/such/path/at/all.txt does not exist"),
    (lambda: data.ngram_bits([], ["a"], data.ByteTokenizer()), "n-grams of no text: give documents"),
    (lambda: tasks.task("pairity"), "task 'pairity' is unknown: give parity"),
    (lambda: tasks.MQAR(pairs=40), "MQAR: vocabulary 64 for 40 pairs: give 80 or more"),
    (lambda: tasks.Parity().sample(np.random.default_rng(0), 2, 9, 8), "no sequence of parity has from 9 to 8 tokens: give 9 or more"),
    (lambda: tasks.Parity().sample(np.random.default_rng(0), 0, 2, 8), "parity: batch_size 0: give a whole number"),
    (lambda: BYTES.decode([256]), "token id 256 is out of range: this tokenizer's ids are 0 to 255"),
    (lambda: data.load_tokenizer("no/such/file"), "tokenizer no/such/file: No such file or directory; "),
    (lambda: data.train_batches([], BYTES, window=4, batch_size=1, alignment=1, seed=0), "no documents.*: give at least one"),
    *(
        (lambda wrong=wrong: data.train_batches(["ab"], BYTES, **{**dict(window=4, batch_size=1, alignment=1, seed=0), **wrong}), match)
        for wrong, match in (
            (dict(window=0), "window 0 must be a whole number of at least 1"),
            (dict(batch_size=2.5), "batch_size 2.5 must be a whole number"),
            (dict(alignment="2"), "alignment 2 must be a whole number"),
            (dict(rows=[3]), r"rows \[3\] of batch_size 1: give some of 0 to 0"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    "table", [MODELS, CONFIGS, MEMORIES, OPTIMIZERS, META, LEVELS, DATA], ids=lambda table: f"{len(table)} calls"
)
def test_a_wrong_call_is_one_line_with_the_remedy(table):
    unclear = []
    for wrong, message in table:
        try:
            said = f"no error: {wrong()!r:.100}"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if not said.startswith("UserError: ") or not re.search(message, said) or "\n" in said or len(said) > 400:
            unclear.append(f"{message!r} is expected, not {said}")
    assert not unclear, "\n\n".join(unclear)

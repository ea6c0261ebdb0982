"""Text from a model, token by token: the prompt in one call, then one token a call on the state it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from nested_jax.data import Tokenizer
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import apply, init_state
from nested_jax.typing import Array, Float, Int, PyTree


def sample(
    model: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Up to `tokens` token ids that continue a prompt, ended by the end of the document; the first of `samples`."""
    options = {"tokens": tokens, "temperature": temperature, "seed": seed}
    return next(samples(model, params, tokenizer, prompt, number=1, **options))


def samples(
    model: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    prompt: str | np.ndarray = "",
    *,
    number: int,
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Iterator[int]]:
    """Several continuations of a prompt, which is read once; the model learns in context as it reads and as it writes.

    Args:
        model: its config.
        params: its weights.
        tokenizer: its tokenizer.
        prompt: text to continue, at the start of a document, or tokens (T,) as they are.
        number: of continuations.
        tokens: most tokens of one; the end of the document ends it.
        temperature: of the softmax; 0 takes the likeliest token.
        top_k, top_p: as of `likeliest`.
        seed: of the draws of the first one; the others have the seeds after it.

    Returns:
        Iterators of token ids.
    """

    choose = partial(draw, tokenizer.vocabulary, bool(temperature), top_k, top_p, max(temperature, 1e-6))

    @jax.jit
    def read(params, ids_T):
        state = init_state(model, params, 1, max_length=len(ids_T) + tokens)
        logits, state = apply(model, params, ids_T[None], state)
        return logits[0, -1], state

    @jax.jit
    def write(params, token, state, key):
        logits, state = apply(model, params, token[None, None], state)
        return choose(logits[0, -1], key), state

    draw_first = jax.jit(choose)

    def continuation(key) -> Iterator[int]:
        token, state = draw_first(logits, jax.random.fold_in(key, 0)), after_prompt
        for n in range(1, tokens + 1):
            if int(token) in tokenizer.ends:
                return
            yield int(token)
            if n < tokens:
                token, state = write(params, token, state, jax.random.fold_in(key, n))

    if isinstance(prompt, str):
        prompt = np.concatenate([[tokenizer.boundary], tokenizer.encode(prompt)])
    logits, after_prompt = read(params, prompt.astype(np.int32))
    if tokens > 1:  # compiles it, before the first token is shown
        write(params, jnp.int32(tokenizer.boundary), after_prompt, jax.random.key(seed))
    return (continuation(jax.random.key((seed + i) % 2**32)) for i in range(number))


def draw(
    vocabulary: int, warm: bool, top_k: int, top_p: float, temperature: ArrayLike, logits: Float[Array, " V"], key: Array
) -> Int[Array, ""]:
    """A token of the first `vocabulary` ones; not warm: the likeliest, at whatever temperature above 0.

    >>> print(draw(2, False, 0, 1.0, 1.0, jnp.array([0.0, 1.0, 2.0]), jax.random.key(0)))
    1
    """
    logits = jnp.where(jnp.arange(logits.size) < vocabulary, logits, -jnp.inf)
    chosen = jax.random.categorical(key, likeliest(logits / temperature, top_k, top_p)) if warm else jnp.argmax(logits)
    return chosen.astype(jnp.int32)


def likeliest(logits: Float[Array, " V"], top_k: int, top_p: float) -> Float[Array, " V"]:
    """Logits of the tokens to draw from, -inf for the others.

    Args:
        logits: (V,).
        top_k: the so many likeliest tokens; 0 for all.
        top_p: of these, the fewest likeliest ones whose probabilities sum to at least this.

    Returns:
        (V,).

    >>> logits = jnp.log(jnp.array([0.5, 0.1, 0.3, 0.1]))
    >>> jnp.isfinite(likeliest(logits, 0, 0.7)).tolist(), jnp.isfinite(likeliest(logits, 1, 1.0)).tolist()
    ([True, False, True, False], [True, False, False, False])
    """
    if not top_k and top_p == 1:
        return logits
    order = jnp.argsort(-logits)
    sorted_logits = logits[order]
    rank = jnp.arange(logits.size)
    if top_k:
        sorted_logits = jnp.where(rank < min(top_k, logits.size), sorted_logits, -jnp.inf)
    chances = jax.nn.softmax(sorted_logits)
    enough = (jnp.cumsum(chances) - chances >= top_p) & (rank > 0)  # of the likelier ones alone; the first stays
    return jnp.zeros_like(logits).at[order].set(jnp.where(enough, -jnp.inf, sorted_logits))


def characters(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of token ids as they come: a character spelled in several tokens waits for the last of them.

    >>> from nested_jax.data import ByteTokenizer
    >>> list(characters(ByteTokenizer(), "né!".encode()))
    ['n', 'é', '!']
    """
    return (text for _, text in runs(tokenizer, ids))


def runs(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[tuple[list[int], str]]:
    """The shortest runs of token ids that are whole characters, of four tokens at most, and their texts."""
    run: list[int] = []
    for token in ids:
        run.append(token)
        text = tokenizer.decode(run)
        if not text.endswith("\ufffd") or len(run) == 4:
            yield run, text
            run = []
    if run:
        yield run, tokenizer.decode(run)

"""Text from a model, token by token: the prompt in one call, then one token a call on the state it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import apply, init_state
from nested_jax.typing import PyTree

Tokenizer = ByteTokenizer | SentencePieceTokenizer


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
    """Up to `tokens` token ids that continue a prompt, ended by the end of the document.

    Temperature 0 takes the likeliest token. The model learns in context as it reads and as it writes.
    """

    def draw(logits, key):
        logits = jnp.where(jnp.arange(logits.shape[-1]) < tokenizer.vocabulary, logits, -jnp.inf)
        warm = jax.random.categorical(key, logits / max(temperature, 1e-6))
        return (warm if temperature else jnp.argmax(logits)).astype(jnp.int32)

    @jax.jit
    def read(params, ids_T, key):
        state = init_state(model, params, 1, max_length=len(ids_T) + tokens)
        logits, state = apply(model, params, ids_T[None], state)
        return draw(logits[0, -1], key), state

    @jax.jit
    def write(params, token, state, key):
        logits, state = apply(model, params, token[None, None], state)
        return draw(logits[0, -1], key), state

    key = jax.random.key(seed)
    ids = np.concatenate([[tokenizer.boundary], tokenizer.encode(prompt)]).astype(np.int32)
    token, state = read(params, ids, jax.random.fold_in(key, 0))
    for n in range(1, tokens + 1):
        if int(token) == tokenizer.boundary:
            return
        yield int(token)
        if n < tokens:
            token, state = write(params, token, state, jax.random.fold_in(key, n))


def characters(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of token ids as they come: a character spelled in several tokens waits for the last of them.

    >>> list(characters(ByteTokenizer(), "né!".encode()))
    ['n', 'é', '!']
    """
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if not text.endswith("\ufffd") or len(waiting) == 4:
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)

"""Text from a model, token by token: the prompt in one call, then one token a call on the state it left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nested_jax.data import ByteTokenizer, SentencePieceTokenizer
from nested_jax.train.state import bind
from nested_jax.typing import PyTree

Tokenizer = ByteTokenizer | SentencePieceTokenizer


def sample(
    net: nnx.GraphDef,
    parameters: PyTree,
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
    def read(parameters, ids_T, key):
        model = bind(net, parameters)
        logits, state = model(ids_T[None], model.init_state(1, max_length=len(ids_T) + tokens))
        return draw(logits[0, -1], key), state

    @jax.jit
    def write(parameters, token, state, key):
        logits, state = bind(net, parameters)(token[None, None], state)
        return draw(logits[0, -1], key), state

    key = jax.random.key(seed)
    ids = np.concatenate([[tokenizer.boundary], tokenizer.encode(prompt)]).astype(np.int32)
    for n in range(tokens):
        now = jax.random.fold_in(key, n)
        token, state = write(parameters, token, state, now) if n else read(parameters, ids, now)
        if int(token) == tokenizer.boundary:
            return
        yield int(token)


def characters(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of token ids as they come: a character spelled in several tokens waits for the last of them.

    >>> list(characters(ByteTokenizer(), "né!".encode()))
    ['n', 'é', '!']
    """
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode(held)
        if not text.endswith("\ufffd") or len(held) == 4:
            yield text
            held = []
    if held:
        yield tokenizer.decode(held)

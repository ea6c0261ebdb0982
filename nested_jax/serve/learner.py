"""Learners: a model that goes on learning from what it reads, as often as it is asked, each with a fast state of its own.

(logits, state) = model(tokens, state)        the weights of the model never change: the state holds what was learned
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, overload

import jax
import numpy as np

from nested_jax.checks import is_number
from nested_jax.cms.in_context import fast_weights, with_level
from nested_jax.data import Tokenizer
from nested_jax.errors import UserError, assert_choice, is_whole, shown
from nested_jax.memory.stream import check_size
from nested_jax.models.module import LanguageModel
from nested_jax.serve import consolidation, reading
from nested_jax.serve.consolidation import Consolidation
from nested_jax.serve.file import Saved, assert_of, fingerprint, read_learner, state_of, write_learner
from nested_jax.serve.pool import Pool
from nested_jax.serve.reading import Reading
from nested_jax.serve.until import until
from nested_jax.train.sample import characters, draw
from nested_jax.train.trained import Trained
from nested_jax.typing import Array, Float, Int

LearnFrom = Literal["all", "prompt"]
Text = str | Sequence[int] | np.ndarray | Array


class Learners(Sequence):
    """Learners of one model that know nothing of one another, side by side on one device.

    Args:
        model: a `LanguageModel`, or what `nested_jax.load` gives.
        number: of learners.
        tokenizer: of the model's text; that of `load`'s result, else none: texts are then tokens.
        max_length: tokens that attention looks back on, which bounds its cache; other layers need no bound.
        learn_from: "all": the CMS learns from what a learner writes too; "prompt": from what it reads alone.

    Raises:
        UserError: another model, number, length or choice.

    Source: NL section 7; a learner's levels go on at test time as in training.

    >>> from flax import nnx
    >>> from nested_jax import LanguageModel, preset
    >>> learners = Learners(LanguageModel(preset("tiny-transformer"), rngs=nnx.Rngs(0)), 3)
    >>> {row: logits.shape for row, logits in learners.read({0: [1, 2, 3], 2: [4]}).items()}
    {0: (3, 1024), 2: (1, 1024)}
    >>> [learner.tokens_read for learner in learners]
    [3, 0, 1]
    """

    def __init__(
        self,
        model: LanguageModel | Trained,
        number: int,
        *,
        tokenizer: Tokenizer | None = None,
        max_length: int = 4096,
        learn_from: LearnFrom = "all",
    ):
        if isinstance(model, Trained):
            tokenizer, model = tokenizer or model.tokenizer, model.model
        if not isinstance(model, LanguageModel):
            raise UserError(f"Learner: model {shown(model)}: give a LanguageModel, or what nested_jax.load gives")
        check_size("Learners: number", number)
        check_size("Learner: max_length", max_length)
        assert_choice("Learner: learn_from", learn_from, ("all", "prompt"))
        self.model, self.tokenizer = model, tokenizer
        self.learn_from: LearnFrom = learn_from
        self._pool = Pool(model.config, model.weights, model.rules, number, max_length)

    def __len__(self) -> int:
        return len(self._pool.read_so_far)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"learner {row} of {len(self)}")
        learner = object.__new__(Learner)
        learner._all, learner._row = self, row % len(self)
        return learner

    def read(self, texts: Mapping[int, Text], *, learn: bool = True) -> dict[int, Float[np.ndarray, "T V"]]:
        """Several learners read, each its own text; see `Learner.read`.

        Args:
            texts: by learner.
            learn: as of `Learner.read`.

        Returns:
            Logits by learner.

        Raises:
            UserError: a learner that is none of these; as `Learner.read`.
        """
        given = {row: self._encode(row, text) for row, text in texts.items()}
        parts: dict[int, list[np.ndarray]] = {row: [] for row in given}
        for row, logits in self._pool.read(given, learn):
            parts[row].append(np.asarray(logits))
        empty = np.zeros((0, self.model.config.vocabulary), np.float32)
        return {row: np.concatenate(found) if found else empty for row, found in parts.items()}

    def generate(
        self,
        prompts: Mapping[int, Text],
        *,
        tokens: int = 400,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[tuple[int, int]]:
        """Several learners read a prompt each and write on, all at the same time; see `Learner.generate`.

        Args:
            seed: of the draws of learner 0; learner i has this one and i.

        Returns:
            An iterator of (learner, token), a token of every learner that goes on in turn, which it has read by then.

        Raises:
            UserError: as `Learner.generate`.
        """
        seeds = {row: (seed + row) % 2**32 if is_whole(seed, least=0) else seed for row in prompts}
        return self._write(prompts, seeds, tokens, temperature, top_k, top_p)

    def _write(
        self,
        prompts: Mapping[int, Text],
        seeds: Mapping[int, int],
        tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> Iterator[tuple[int, int]]:
        check_size("generate: tokens", tokens)
        _assert_sampling(temperature, top_k, top_p, seeds)
        self.read(prompts)
        if any(not self._pool.read_so_far[row] for row in prompts):
            raise UserError("generate: a learner that has read nothing and has no tokenizer: give a prompt of tokens")
        own = min(self.tokenizer.vocabulary if self.tokenizer else 2**31, self.model.config.vocabulary)
        choose = partial(_draw, own, bool(temperature), int(top_k), float(top_p), max(temperature, 1e-6))
        given = np.zeros(len(self) + 1, np.uint32)
        given[list(seeds)] = list(seeds.values())

        def write() -> Iterator[tuple[int, int]]:
            writing = list(prompts)
            for n in range(tokens):
                drawn = np.asarray(choose(self._pool.logits, given, n))
                writing = [row for row in writing if not self.tokenizer or int(drawn[row]) not in self.tokenizer.ends]
                for _ in self._pool.read({row: drawn[[row]] for row in writing}, self.learn_from == "all"):
                    pass
                yield from ((row, int(drawn[row])) for row in writing)

        return write()

    def _encode(self, row: int, text: Text) -> np.ndarray:
        """Tokens of a text; before the first one, of a learner with a tokenizer, the mark that a document starts."""
        if not is_whole(row, least=0) or row >= len(self):
            raise UserError(f"learner {shown(row)}: there are 0 to {len(self) - 1}")
        if isinstance(text, str):
            if self.tokenizer is None:
                raise UserError("text: the learner has no tokenizer: give tokens, or Learner(model, tokenizer=...)")
            ids = np.asarray(self.tokenizer.encode(text), np.int32)
            return ids if self._pool.read_so_far[row] else np.concatenate([[self.tokenizer.boundary], ids]).astype(np.int32)
        ids, most = np.asarray(text), self.model.config.vocabulary
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise UserError(f"text {shown(text)}: give a string, or whole numbers (T,)")
        if ids.size and not 0 <= (wrong := ids.min() if ids.min() < 0 else ids.max()) < most:
            raise UserError(f"token {wrong} is out of range: the model's vocabulary has tokens 0 to {most - 1}")
        return ids.astype(np.int32)


class Learner:
    """One model and what it has learned while reading: it reads pieces of any size, writes, is saved and restored.

    Its memory does not grow with what was read, and there is no last position.

    Args:
        model, tokenizer, max_length, learn_from: as of `Learners`.

    Raises:
        UserError: as `Learners`.

    Source: NL section 7.

    >>> from flax import nnx
    >>> from nested_jax import LanguageModel, preset
    >>> learner = Learner(LanguageModel(preset("tiny-transformer"), rngs=nnx.Rngs(0)))
    >>> learner.read([5, 7, 5]).shape, learner.tokens_read
    ((3, 1024), 3)
    >>> len(list(learner.generate([5], tokens=2, temperature=0.0))), learner.tokens_read
    (2, 6)
    """

    _all: Learners
    _row: int

    def __init__(
        self,
        model: LanguageModel | Trained,
        *,
        tokenizer: Tokenizer | None = None,
        max_length: int = 4096,
        learn_from: LearnFrom = "all",
    ):
        self._all, self._row = Learners(model, 1, tokenizer=tokenizer, max_length=max_length, learn_from=learn_from), 0

    @property
    def tokens_read(self) -> int:
        """Tokens that it has read and written."""
        return self._all._pool.read_so_far[self._row]

    @property
    def logits(self) -> Float[Array, " V"]:
        """Of the next token."""
        return self._all._pool.get(self._row)[1]

    @property
    def held(self) -> dict[str, float]:
        """What each level holds: the norm of the difference between its weights and their start, by its name."""
        pool = self._all._pool
        start, now = pool.start()[0], pool.get(self._row)[0]
        return dict(zip(reading.levels_of(pool.config, start), reading.difference(start, now).tolist(), strict=True))

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the CMS's levels that learn, slow to fast."""
        return reading.cms_levels(self._all.model.config)

    @overload
    def read(self, text: Text, *, learn: bool = True, record: Literal[False] = False) -> Float[np.ndarray, "T V"]: ...
    @overload
    def read(self, text: Text, *, learn: bool = True, record: Literal[True]) -> Reading: ...
    def read(self, text: Text, *, learn: bool = True, record: bool = False) -> Float[np.ndarray, "T V"] | Reading:
        """Reads on, and learns.

        Args:
            text: a string, at the start of which a learner that has read nothing reads the mark of a document's start; or
                tokens (T,).
            learn: False: the CMS does not learn to predict these tokens. Sequence layers remember them, so that what comes
                next is read in their context; nothing of the text is left in a `copy` made before.
            record: watch, segment by segment, which takes longer.

        Returns:
            Logits of the token after each; with record a `Reading`, a table of the tokens and of what each level wrote.

        Raises:
            UserError: no text, or tokens that the vocabulary has not.
        """
        if record:
            return reading.read(self._all._pool, self._row, self._all._encode(self._row, text), learn)
        return self._all.read({self._row: text}, learn=learn)[self._row]

    def generate(
        self,
        prompt: Text = "",
        *,
        tokens: int = 400,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[str] | Iterator[int]:
        """Reads a prompt and writes on, token by token, as the iterator is asked; it reads what it writes.

        Args:
            prompt: as of `read`.
            tokens: most tokens to write; the end of a document ends them.
            temperature: of the softmax; 0 takes the likeliest token.
            top_k: draw from this many likeliest tokens; 0 for all.
            top_p: draw from the fewest likeliest tokens whose probabilities sum to at least this.
            stop: strings before the first of which the text ends; what it is part of has been read.
            seed: of the draws.

        Returns:
            An iterator of parts of the text; of tokens, without a tokenizer.

        Raises:
            UserError: a temperature, seed or number that cannot be; stop strings without a tokenizer.
        """
        tokenizer = self._all.tokenizer
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if stop and tokenizer is None:
            raise UserError(f"generate: stop {shown(stop)}: the learner has no tokenizer and writes tokens: leave it out")
        if not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"generate: stop {shown(stop)}: give strings of one character or more")
        given = () if tokenizer is None and isinstance(prompt, str) and not prompt else prompt
        written = self._all._write({self._row: given}, {self._row: seed}, tokens, temperature, top_k, top_p)
        ids = (token for _, token in written)
        return ids if tokenizer is None else until(characters(tokenizer, ids), stop)

    def copy(self) -> Learner:
        """Another learner that has read the same; each goes on by itself."""
        one = Learner(
            self._all.model,
            tokenizer=self._all.tokenizer,
            max_length=self._all._pool.max_length,
            learn_from=self._all.learn_from,
        )
        one._all._pool.put(0, self._all._pool.get(self._row), self.tokens_read)
        return one

    def reset(self, level: str | None = None) -> None:
        """Forgets.

        Args:
            level: a level of the CMS, such as "level2": its weights and their gradient start anew, and the rest stays as it
                is. None: everything.

        Raises:
            UserError: the model has no such level that learns.
        """
        pool, row, fresh = self._all._pool, self._row, self._all._pool.start()
        if level is None:
            return pool.put(row, fresh, 0)
        assert_choice("reset: level", level, (None, *self.levels))
        index, (state, logits) = self.levels.index(level), pool.get(row)
        assert state.learning is not None and fresh[0].learning is not None
        now, start = (fast_weights(each.levels)[index] for each in (state.learning, fresh[0].learning))
        levels = with_level(state.learning.levels, index, start._replace(elapsed=now.elapsed))
        pool.put(row, (state._replace(learning=state.learning._replace(levels=levels)), logits), self.tokens_read)

    def consolidate(
        self,
        level: str,
        *,
        replay: int | Int[np.ndarray, "R T"] = 64,
        tokens: int = 256,
        steps: int = 100,
        rate: float = 1e-3,
        seed: int = 0,
    ) -> Consolidation:
        """Sleeps: distils what a level and the faster ones hold into it, and sets the faster ones back to their starts.

            min over the level of KL(p_before || p_after), by Adam, on texts that the learner writes itself

        Args:
            level: of the CMS, not the fastest, such as "level2".
            replay: how many texts the learner writes, from the start of a document; or texts of one length to go through,
                such as those that surprised it.
            tokens: of a text that it writes.
            steps: of Adam, 8 texts each.
            rate: of Adam.
            seed: of what it writes.

        Returns:
            Mean divergences on the texts, nats a token: `forgotten` without distillation, `distilled` with it. `logits` stay
            as they are until it reads on.

        Raises:
            UserError: no such level, or none faster; numbers that are not positive; tokens that the vocabulary has not.

        Source: Behrouz, Hashemi and Mirrokni, arXiv 2606.03979, without its reinforcement learning.
        """
        pool, row, names = self._all._pool, self._row, self.levels
        assert_choice("consolidate: level", level, names[:-1])
        check_size("consolidate: steps", steps)
        if not is_number(rate) or not 0 < rate < float("inf"):
            raise UserError(f"consolidate: rate {shown(rate)}: give a number above 0")
        _assert_seed("consolidate", seed)
        state, logits = pool.get(row)
        if isinstance(replay, np.ndarray | jax.Array):
            if replay.ndim != 2 or not replay.size:
                raise UserError(f"consolidate: replay {shown(replay)}: give a number of texts, or tokens (R, T)")
            texts = np.stack([self._all._encode(row, text) for text in replay])
        else:
            check_size("consolidate: replay", replay)
            check_size("consolidate: tokens", tokens)
            first = self._all.tokenizer.boundary if self._all.tokenizer else None
            levels = consolidation.matrices_of(state)
            texts = consolidation.write(pool.config, replay, tokens, first, pool.weights, levels, seed)
        index = names.index(level)
        state, found = consolidation.distil(
            pool.config, index, steps, pool.weights, state, pool.start()[0], texts, rate, seed
        )
        pool.put(row, (state, logits), self.tokens_read)
        return Consolidation(*map(float, found))

    def save(self, path: str | os.PathLike) -> None:
        """Writes what was learned to a file, whole or not at all.

        Args:
            path: of the file; safetensors, without the model's weights, but with their fingerprint.

        Raises:
            OSError: it cannot be written.
        """
        pool = self._all._pool
        write_learner(Path(path), pool.get(self._row), pool.fingerprint, self.tokens_read, pool.max_length)

    def load(self, path: str | os.PathLike) -> None:
        """Puts what a file has in place of what was learned: the next logits are those of the learner that was saved.

        Args:
            path: of a file that `save` wrote; it may be anyone's, and no code of it is run.

        Raises:
            UserError: no learner's file, a damaged one, one of another model or `max_length`.
            OSError: it cannot be read.
        """
        saved, pool = read_learner(Path(path)), self._all._pool
        assert_of(Path(path), saved, pool.fingerprint)
        if saved.max_length != pool.max_length:
            raise UserError(f"{path} has max_length {saved.max_length}, the learner {pool.max_length}: give the same")
        self._take(Path(path), saved)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike,
        model: LanguageModel | Trained,
        *,
        tokenizer: Tokenizer | None = None,
        learn_from: LearnFrom = "all",
    ) -> Learner:
        """A learner as `save` wrote it.

        Args:
            path: as of `load`.
            model: the one that it was saved with.
            tokenizer, learn_from: as of `Learners`.

        Raises:
            UserError, OSError: as `load`.
        """
        saved, own = read_learner(Path(path)), model.model if isinstance(model, Trained) else model
        if isinstance(own, LanguageModel):  # before there is room for the max_length of a file that is anyone's
            assert_of(Path(path), saved, fingerprint(own.config, own.weights))
        one = cls(model, tokenizer=tokenizer, max_length=saved.max_length, learn_from=learn_from)
        one._take(Path(path), saved)
        return one

    def _take(self, path: Path, saved: Saved) -> None:
        pool = self._all._pool
        shapes = jax.eval_shape(lambda: pool.get(self._row))
        pool.put(self._row, state_of(path, saved, shapes, pool.config), saved.read)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
    vocabulary: int,
    warm: bool,
    top_k: int,
    top_p: float,
    temperature: float,
    logits: Float[Array, "N V"],
    seeds: Int[Array, " N"],
    n: int,
) -> Int[Array, " N"]:
    """The n-th token of every learner, with a seed of its own."""
    key = lambda seed: jax.random.fold_in(jax.random.key(seed), n)
    one = lambda logits, seed: draw(vocabulary, warm, top_k, top_p, temperature, logits, key(seed))
    return jax.vmap(one)(logits, seeds)


def _assert_sampling(temperature: float, top_k: int, top_p: float, seeds: Mapping[int, int]) -> None:
    if not is_number(temperature) or not 0 <= temperature < float("inf"):
        raise UserError(f"generate: temperature {shown(temperature)}: give a number from 0")
    if not is_whole(top_k, least=0):
        raise UserError(f"generate: top_k {shown(top_k)}: give a whole number, 0 for all tokens")
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise UserError(f"generate: top_p {shown(top_p)}: give a number above 0 and at most 1")
    for seed in seeds.values():
        _assert_seed("generate", seed)


def _assert_seed(name: str, seed: int) -> None:
    if not is_whole(seed, least=0) or seed >= 2**32:
        raise UserError(f"{name}: seed {shown(seed)}: give a whole number from 0 to 2^32 - 1")

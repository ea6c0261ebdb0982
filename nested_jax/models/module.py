"""LanguageModel: the `flax.nnx` module around the functions of `language_model`."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import jax
import optax
from flax import nnx
from jax.typing import ArrayLike

from nested_jax.errors import UserError, is_whole, shown
from nested_jax.level import Level
from nested_jax.models.block import sequence_layer
from nested_jax.models.config import ModelConfig
from nested_jax.models.language_model import (
    ModelState,
    Rules,
    apply,
    as_rules,
    check_config,
    cms_reader,
    init_state,
    init_weights,
)
from nested_jax.typing import Array, Bool, Float


class LanguageModel(nnx.Module):
    """A language model over tokens: the module that holds the slow weights of `init_weights`, `init_state` and `apply`.

    A call is (tokens (B, T), state) -> (logits (B, T, V), state), with state from `init_state`. A call never changes the
    module, and every JAX transform can be applied to `nnx.split` of it.

    Args:
        config: see `ModelConfig`.
        rngs: source of the initial weights, such as `nnx.Rngs(0)`.
        rule: inner rule of the CMS, any optax transformation at learning rate 1, or one for each level, slow to fast;
            the default is the config's.

    Raises UserError (a ValueError) for another config or source, and for rules that are not one for each level.

    >>> import jax.numpy as jnp
    >>> from nested_jax import LanguageModel, preset
    >>> model = LanguageModel(preset("tiny-transformer"), rngs=nnx.Rngs(0))
    >>> logits, state = model(jnp.zeros((2, 8), int), model.init_state(2))
    >>> logits.shape, int(state.position)
    ((2, 8, 1024), 8)
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs | None = None,
        rule: optax.GradientTransformation | Rules | None = None,
    ):
        check_config(config)
        if not isinstance(rngs, nnx.Rngs):
            remedy = f"nnx.Rngs({rngs})" if is_whole(rngs, least=0) else "nnx.Rngs(seed or key)"
            raise UserError(f"LanguageModel: rngs {shown(rngs)}: give {remedy}")
        self.config = config
        self.rules = nnx.static(as_rules(config, rule))
        weights = init_weights(config, rngs.params())
        self.blocks = nnx.data(jax.tree.map(nnx.Param, weights.pop("blocks")))
        for name, weight in weights.items():
            setattr(self, name, nnx.Param(weight))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> ModelState:
        """The state before the first token, see `init_state`."""
        return init_state(self.config, self.weights, batch_size, max_length=max_length, rules=self.rules)

    def __call__(
        self,
        tokens: ArrayLike,
        state: ModelState,
        *,
        reset: ArrayLike | None = None,
        multiple: int = 1,
        learn: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T V"], ModelState]:
        """Logits of the next token at every token, and the state after the last, see `apply`."""
        return apply(self.config, self.weights, tokens, state, reset=reset, multiple=multiple, learn=learn, rules=self.rules)

    @property
    def weights(self) -> dict[str, Any]:
        """The slow weights, as of `init_weights`."""
        return nnx.to_pure_dict(nnx.state(self, nnx.Param))

    @property
    def parameters(self) -> int:
        """Number of learned parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def levels(self) -> list[tuple[Level, int]]:
        """What learns in context, from fast to slow, and in how many blocks."""
        config, weights = self.config, self.weights
        first = jax.tree.map(itemgetter(0), weights["blocks"]["mixer"])
        found = [(level, config.layers) for level in sequence_layer(config).levels(first, 1)]
        if config.adapting:
            found.append((cms_reader(config, weights, 1, self.rules).level, config.adapting))
        return found

    def serves(self, path: Sequence[str]) -> str:
        """What the parameter at a path is for."""
        config = self.config
        match path:
            case ("blocks", "mixer", *_):
                return "weights of sequence layers"
            case ("blocks", "cms", level, *_) if level != "mix":
                frozen = config.layers
                if int(level.removeprefix("level")) > config.cms.frozen:
                    frozen -= config.adapting
                if frozen == config.layers:
                    return f"CMS {level}, frozen in context"
                return f"starts of CMS {level}" + f", in {frozen} of {config.layers} blocks frozen in context" * (frozen > 0)
            case _:
                return "embedding, norms, head"

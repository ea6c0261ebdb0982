"""TrainConfig: every choice of a training run, as a frozen dataclass, as JSON and as command-line flags."""

from __future__ import annotations

import dataclasses
import math
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from nested_jax.errors import UserError, assert_choices
from nested_jax.models.config import ModelConfig, preset

_SAME_RUN = (
    "fresh",
    "run_dir",
    "log_every",
    "eval_every",
    "eval_bytes",
    "checkpoint_every",
    "sample_tokens",
    "show_surprise",
    "model.memory_policy",
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on text. Running the same command again resumes where the run stopped."""

    preset: str = "tiny-hope"
    """Model to start from, SIZE-FAMILY, such as tiny-hope or 140m-transformer; --model.FIELD flags change it."""
    data: str = "stdlib"
    """Text to learn: "stdlib" (what every Python carries), the path of a text file or folder, or a TFDS name."""
    steps: int = 280
    """Updates of the parameters in all. More than a run was made with: it goes on, its rate on the longer schedule."""
    run_dir: str = "runs/tiny-hope"
    """Folder that the run is written to, and resumed from."""
    fresh: bool = False
    """Start over. A run already in the folder is kept: its folder gets a number at the end of its name."""
    tokenizer: str = "byte"
    """byte, sentencepiece (learned from the text, with --model.vocabulary pieces), or the path of a saved tokenizer."""
    window: int = 512
    """Tokens T of one training window."""
    batch: int = 2
    """Windows B of one update."""
    accumulate: int = 1
    """Pieces that a batch is computed in, one after the other, to save memory; the update is the same."""
    carry: bool = False
    """Carry the fast state from one window of a document to the next (truncated back-propagation), instead of
    starting each window afresh."""
    optimizer: Literal[
        "adamw", "momentum", "delta-momentum", "deep-momentum", "delta-gradient-descent", "muon", "m3", "continuum"
    ] = "adamw"
    """Rule of the updates. muon, m3 and delta-gradient-descent take matrices and leave the rest to AdamW; continuum is
    AdamW at two frequencies, slow for all CMS levels but the fastest."""
    slow_period: int = 8
    """Updates between two steps of the slow memory of m3, or of the slow parameters of continuum."""
    learning_rate: float = 8e-3
    """Largest learning rate; rules other than AdamW may need another."""
    warmup: int = 20
    """Updates over which the learning rate grows to its largest; it then falls along a cosine to a tenth."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices; norms, biases and the starts of memories do not decay."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 for none."""
    seed: int = 0
    """Seed of the parameters, of the order of the text, and of the sample."""
    eval_every: int = 100
    """Updates between two evaluations on held-out text; 0 for one at the end only."""
    eval_bytes: int = 2**16
    """Bytes of held-out text that an evaluation reads, the same ones every time."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; the last two are kept."""
    show_surprise: bool = False
    """Show at evaluations, and in the report, which linear layers are surprised most."""
    log_every: int = 10
    """Updates between two rows of metrics.jsonl."""
    sample_tokens: int = 400
    """Tokens of the sample in the report."""
    model: ModelConfig = field(default_factory=lambda: preset("tiny-hope"))

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> TrainConfig:
        """The config of a preset, with its model, folder and sizes, `fields` changed, as `--preset` gives it.

        Raises UserError for an unknown name.

        >>> TrainConfig.from_preset("tiny-transformer", steps=10).run_dir
        'runs/tiny-transformer'
        """
        model = preset(name)
        own: dict[str, Any] = {"preset": name, "model": model, "run_dir": f"runs/{name}"}
        if model.vocabulary > 2**8:
            own["tokenizer"] = "sentencepiece"
        if not name.startswith("tiny-"):
            own |= {"window": 2048, "batch": 8, "steps": 20_000, "warmup": 500, "learning_rate": 6e-4, "eval_every": 1000}
        return cls(**(own | fields))

    def check(self) -> None:
        """Raises UserError for the first value that cannot be."""
        for name in ("steps", "window", "batch", "accumulate", "slow_period", "eval_bytes", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} {getattr(self, name)} must be at least 1")
        for name in ("learning_rate", "warmup", "weight_decay", "clip", "seed", "eval_every", "sample_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{flag(name)} {getattr(self, name)} must be a finite number and at least 0")
        assert_choices(self, "train")
        if self.seed >= 2**32:
            raise UserError(f"--seed {self.seed} must be below {2**32}")
        if self.batch % self.accumulate:
            raise UserError(f"--batch {self.batch} is not a multiple of --accumulate {self.accumulate}: change one")

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of numbers, strings and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`. Raises UserError naming a field that is missing, unknown or of another type."""
        return _from_json(cls, values, "")


def flag(name: str) -> str:
    """A field's dotted name as its flag.

    >>> flag("model.cms.meta_gradient")
    '--model.cms.meta-gradient'
    """
    return "--" + name.replace("_", "-")


def difference(saved: TrainConfig, given: TrainConfig) -> tuple[str, str, str] | None:
    """(flag, saved value, given value) of the first field that makes `given` another run than `saved`, if any.

    More steps are not another run, nor is what only says what is reported, how often, and what is kept or computed again.
    """
    theirs, ours = dict(flatten(saved)), dict(flatten(given))
    for name, value in ours.items():
        if name in _SAME_RUN or (name == "steps" and saved.steps <= given.steps):
            continue
        if theirs[name] != value:
            return flag(name), _words(theirs[name]) or "nothing", _words(value) or "nothing"
    return None


def command(config: TrainConfig) -> str:
    """The command line that trains (or resumes) with this config.

    >>> command(TrainConfig.from_preset("tiny-transformer", steps=10))
    'nested-jax train --preset tiny-transformer --steps 10'
    """
    words, default = ["nested-jax", "train"], dict(flatten(TrainConfig.from_preset(config.preset)))
    default["preset"] = TrainConfig.preset
    for name, value in flatten(config):
        if value == default[name] or name == "fresh":
            continue
        if isinstance(value, bool):
            group, _, last = name.rpartition(".")
            words.append(flag(".".join(filter(None, [group, last if value else f"no-{last}"]))))
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, nested ones in their place."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _from_json(cls: type, values: Any, prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) != fields:
        odd = sorted(set(values) ^ fields) if isinstance(values, dict) else [""]
        raise UserError(f"field {prefix}{odd[0]} is missing or unknown")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            built[name] = _from_json(hints[name], value, f"{prefix}{name}.")
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
            if not _fits(built[name], hints[name]):
                raise UserError(f"field {prefix}{name} is {value!r}, of another type")
    return cls(**built)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that a field of the configs may have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is not None:  # a union
        return any(_fits(value, one) for one in arguments)
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, (int, float) if hint is float else hint)

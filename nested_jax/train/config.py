"""TrainConfig: every choice of a training run, as a frozen dataclass, as JSON and as command-line flags."""

from __future__ import annotations

import dataclasses
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nested_jax.checks import Count, Folder, Interval, Named, NonNegative, check_fields
from nested_jax.errors import UserError, shown
from nested_jax.models.config import ModelConfig, preset
from nested_jax.parallel.mesh import parse

_SAME_RUN = (  # fields that may differ when a run is resumed
    "fresh",
    "run_dir",
    "data",  # the text itself is compared, by its fingerprint
    "log_every",
    "eval_every",
    "eval_bytes",
    "eval_sequences",
    "checkpoint_every",
    "max_loss_rise",
    "sample_tokens",
    "reading_documents",
    "show_surprise",
    "mesh",
    "model.memory_policy",
)

Optimizer = Literal[
    "adamw", "momentum", "delta-momentum", "deep-momentum", "delta-gradient-descent", "muon", "m3", "continuum"
]
Steps = Annotated[int, Interval(least=1, below=2**31)]  # counted in int32
Whole = Annotated[int, Interval(least=0, below=2**31)]
Seed = Annotated[int, Interval(least=0, below=2**32)]


@dataclass(frozen=True)
class TrainConfig:
    """Train a language model on text, or on a synthetic task. The same command again resumes a stopped run.

    On the command line --memory-policy is short for --model.memory-policy.
    """

    preset: str = "tiny-hope"
    """Model to start from, SIZE-FAMILY, such as tiny-hope or 140m-transformer; --model.FIELD flags change it."""
    data: Annotated[str, Named("stdlib, the path of text or a TFDS name")] = "stdlib"
    """Text to learn: "stdlib" (Python's standard library), the path of a text file or folder, or a TFDS name. PATH:FIELD
    names the field of JSON Lines that is read, else text."""
    steps: Steps = 280
    """Updates of the parameters in all. A finished run given more of them continues, on the longer schedule."""
    run_dir: Folder = "runs/tiny-hope"
    """Folder that the run is written to and resumed from. A run in it brings its own config: no other flag is needed."""
    fresh: bool = False
    """Start over. A run already in the folder is kept: its folder is renamed, with a number at the end."""
    init_from: Folder | None = None
    """Folder of a run whose weights, model and tokenizer a new run starts from, with its other choices where no flag changes
    them; the schedule and the optimizer's memory start anew."""
    tokenizer: Annotated[str, Named("sentencepiece, bytes or the path of a saved tokenizer")] = "sentencepiece"
    """sentencepiece (learned from the text, with --model.vocabulary pieces), bytes, or the path of a saved tokenizer."""
    task: Annotated[str, Named("the name of a task")] | None = None
    """Synthetic task to learn in place of text: parity, aa-star, abab-star, anbn, anbncn, shuffle-2, s3, a5, mqar,
    mad-recall, mad-fuzzy-recall, mad-noisy-recall, mad-selective-copying, mad-compression, mad-memorization or passkey.
    Sequences have --shortest to --window tokens; evaluations read longer ones too, up to three times --window."""
    shortest: Count = 2
    """Tokens of a task's shortest sequence."""
    window: Count = 512
    """Tokens T of one training window; of a task, of its longest sequence."""
    batch_size: Count = 2
    """Windows B of one update."""
    accumulate: Count = 1
    """Equal parts that a batch is computed in, one after the other, to save memory; the update is the same."""
    mesh: Annotated[str, Named("sizes of axes, such as data=2,fsdp=4")] | None = None
    """Devices along data, fsdp (rows; with fsdp the weights are split too), tensor (heads, hidden units and the vocabulary)
    and sequence (tokens), such as data=2,fsdp=4; without it as many as divide the rows of a part."""
    carry: bool = False
    """Carry the fast state from one window of a document to the next (truncated back-propagation), instead of
    starting each window afresh."""
    optimizer: Optimizer = "adamw"
    """Rule of the updates. muon, m3 and delta-gradient-descent take matrices and leave the rest to AdamW; continuum is
    AdamW at two frequencies, slow for all CMS levels but the fastest."""
    slow_period: Steps = 8
    """Updates between two steps of the slow memory of m3, or of the slow parameters of continuum."""
    learning_rate: NonNegative = 8e-3
    """Largest learning rate; rules other than AdamW may need another."""
    warmup: Whole = 20
    """Updates until the learning rate has grown to its largest; it then falls along a cosine to a tenth."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay of the matrices; norms, biases and the starts of memories do not decay."""
    clip: NonNegative = 1.0
    """Largest norm of the whole gradient; 0 for none."""
    max_loss_rise: Annotated[float, Interval(above=0, finite=False)] = 1.5
    """Nats by which the mean loss of the last ten updates may rise above its least value, or above that of a uniform guess;
    beyond them the run has diverged and stops. inf: it goes on while its numbers are finite."""
    seed: Seed = 0
    """Seed of the parameters, of the order of the text and of the sample."""
    eval_every: Whole = 100
    """Updates between two evaluations on held-out text, the first before any; 0 for one at the end only."""
    eval_bytes: Count = 2**16
    """Bytes of held-out text that an evaluation reads, the same ones each time."""
    eval_sequences: Count = 256
    """Sequences of a task that an evaluation reads of each range of lengths, the same ones each time."""
    checkpoint_every: Count = 100
    """Updates between two checkpoints; the last two are kept, and the one before the least mean loss of ten updates."""
    show_surprise: bool = False
    """Show at evaluations and in the report which linear layers have the largest local surprise."""
    log_every: Count = 10
    """Updates between two rows of metrics.jsonl."""
    sample_tokens: Whole = 400
    """Tokens of the sample in the report."""
    reading_documents: Whole = 16
    """Most held-out documents that the report reads to show what is learned while reading; 0 for none."""
    model: ModelConfig = field(default_factory=lambda: preset("tiny-hope"))
    """The language model; the preset's where no flag changes it."""

    def __post_init__(self):
        check_fields(self, flag)
        own = preset(self.preset)
        if self.model == preset(TrainConfig.preset) != own:
            raise UserError(
                f"--preset {self.preset} with the model of {TrainConfig.preset}: give TrainConfig.from_preset(...)"
            )
        if self.batch_size % self.accumulate:
            sizes = f"--batch-size {self.batch_size} is not a multiple of --accumulate {self.accumulate}"
            raise UserError(f"{sizes}: change one")
        if self.mesh is not None:
            parse(self.mesh)
        if self.task is not None:
            self._check_task(self.task)

    def _check_task(self, name: str) -> None:
        """Raises UserError for an unknown task, and for fields that do not go with it."""
        others = {"data": TrainConfig.data, "tokenizer": TrainConfig.tokenizer, "carry": False}
        for field_name, default in others.items():
            if (value := getattr(self, field_name)) != default:
                given = flag(field_name) + ("" if value is True else f" {value}")
                raise UserError(f"{given} is for text, which --task {name} takes the place of: leave one out")
        if self.model.vocabulary < (least := _vocabulary(name)):
            raise UserError(f"--model.vocabulary {self.model.vocabulary} is too small for --task {name}: give {least}")
        if self.shortest > self.window:
            raise UserError(f"--shortest {self.shortest} is more than --window {self.window}: change one")

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> TrainConfig:
        """The config that `--preset` makes: of the preset's model, folder and sizes.

        Args:
            name: SIZE-FAMILY.
            **fields: other values of these; with the tokenizer "bytes" the preset's model has the 256 tokens of bytes, and
                with a task the task's, as many windows of 64 as make a batch of the same size, and a folder of its own.

        Raises:
            UserError: the name or a field is unknown, or a value cannot be used.

        >>> TrainConfig.from_preset("tiny-transformer", steps=10).run_dir
        'runs/tiny-transformer'
        """
        if unknown := fields.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise UserError(f"TrainConfig has no field {min(unknown)!r}: give some of its fields")
        model = preset(name)
        if fields.get("tokenizer") == "bytes":
            model = dataclasses.replace(model, vocabulary=2**8)
        task = fields.get("task")
        if task is not None:
            model = dataclasses.replace(model, vocabulary=_vocabulary(task))
        own: dict[str, Any] = {"preset": name, "model": model, "run_dir": f"runs/{name}" + (f"-{task}" if task else "")}
        if not name.startswith("tiny-"):
            own |= {"window": 2048, "batch_size": 8, "steps": 20_000}
            own |= {"warmup": 500, "learning_rate": 6e-4, "eval_every": 1000}
        if task is not None:
            tokens = own.get("window", cls.window) * own.get("batch_size", cls.batch_size)
            own |= {"window": 64, "batch_size": tokens // 64, "steps": own.get("steps", 800)}
        return cls(**(own | fields))

    def to_json(self) -> dict[str, Any]:
        """Nested dicts of numbers, strings and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`. Raises UserError naming a field that is missing, unknown or of a value not allowed."""
        return _from_json(cls, values, "")


def flag(name: str) -> str:
    """The flag of a field's dotted name.

    >>> flag("model.cms.meta_gradient")
    '--model.cms.meta-gradient'
    """
    return "--" + name.replace("_", "-")


def difference(saved: TrainConfig, given: TrainConfig) -> tuple[str, str, str] | None:
    """The first field that makes `given` another run than `saved`.

    More steps are not another run, nor is a lower learning rate; nor are other fields of reports, of checkpoints and of
    rematerialisation.

    Returns:
        (flag, saved value, given value), or None where `given` resumes `saved`.

    >>> difference(TrainConfig(seed=1, log_every=1), TrainConfig(seed=2))
    ('--seed', '1', '2')
    """
    theirs, ours = dict(flatten(saved)), dict(flatten(given))
    for name, value in ours.items():
        if name in _SAME_RUN or (name == "steps" and theirs[name] <= value):
            continue
        if name == "learning_rate" and value < theirs[name]:
            continue
        if theirs[name] != value:
            return flag(name), _words(theirs[name]) or "nothing", _words(value) or "nothing"
    return None


def command(config: TrainConfig) -> str:
    """The command line that trains, or resumes, with this config.

    >>> command(TrainConfig.from_preset("tiny-transformer", steps=10))
    'nested-jax train --preset tiny-transformer --steps 10'
    """
    default = dict(flatten(TrainConfig.from_preset(config.preset, tokenizer=config.tokenizer, task=config.task)))
    words = ["nested-jax", "train"]
    default |= {"preset": TrainConfig.preset, "tokenizer": TrainConfig.tokenizer, "task": None}
    for name, value in flatten(config):
        if value == default[name] or name == "fresh":
            continue
        if isinstance(value, bool):
            group, dot, last = name.rpartition(".")
            words.append(flag(name if value else f"{group}{dot}no-{last}"))
        else:
            words += [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, those of nested configs in place of the config.

    >>> list(flatten(TrainConfig()))[:2]
    [('preset', 'tiny-hope'), ('data', 'stdlib')]
    """
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def _vocabulary(task: str) -> int:
    """The tokens that a model of a task needs. Raises UserError where there is no such task."""
    from nested_jax.data import tasks  # not above: it brings the libraries that read data

    own = tasks.task(task)
    return max(own.tokens, own.labels)


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is None else str(value)


def _from_json(cls: type, values: Any, prefix: str = "") -> Any:
    if not isinstance(values, dict):
        raise UserError(f"field {prefix[:-1] or 'train'} {shown(values)}: give an object of fields and values")
    values, hints = dict(values), typing.get_type_hints(cls)
    if odd := sorted(values.keys() ^ hints.keys()):
        raise UserError(f"field {prefix}{odd[0]} is missing or unknown")
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _from_json(hints[name], value, f"{prefix}{name}.")
        elif isinstance(value, list):
            values[name] = tuple(value)
    return cls(**values)

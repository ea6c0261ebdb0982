"""The flags of every command, as frozen dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from nested_jax.checks import Count, Folder, Interval, Named, NonNegative, check_fields
from nested_jax.errors import UserError
from nested_jax.models.config import ModelConfig, preset
from nested_jax.train.config import Optimizer, Seed, TrainConfig, Whole, flag


def check_folder(name: str, path: str | None) -> None:
    """Raises UserError where there is no folder for the file that a field names."""
    if path is not None and not (folder := Path(path).parent).is_dir():
        raise UserError(f"{flag(name)} {path}: there is no folder {folder}; make it, or give another one")


@dataclass(frozen=True)
class Program:
    """Where a command keeps what it compiles."""

    compilation_cache: Folder = "auto"
    """Folder of compiled programs, by which the next start need not compile. auto: JAX's own setting, else the user's cache
    folder; none: nowhere."""


class OfRun(TrainConfig):
    """The flags of a run, and a command's own."""

    @property
    def run(self) -> TrainConfig:
        """The fields of a run alone."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)})


@dataclass(frozen=True)
class Training(OfRun, Program):
    """Train a language model on text, or with --task on a synthetic task. The same command again resumes a stopped run, and
    so does --run-dir alone.

    On the command line --memory-policy is short for --model.memory-policy.
    """

    config: Annotated[str, Named("the path of a JSON file")] | None = None
    """JSON file of flags' values, such as a run's config.json; other flags change them."""


@dataclass(frozen=True)
class Planning(OfRun):
    """Compile the training step for TPUs, with none at hand, and say what it takes of memory, of links and of time. Needs
    libtpu: pip install "nested-jax[tpu]".
    """

    config: Annotated[str, Named("the path of a JSON file")] | None = None
    """JSON file of flags' values, as of train."""
    topology: Annotated[str, Named("kind and shape of TPUs")] = "v5e:2x2"
    """Kind and shape of the TPUs: v4, v5e, v5p or v6e, such as v5e:4x4 or v5p:4x4x4."""
    search: bool = False
    """Compile the step with other meshes, memory policies, pieces, chunks and batch sizes too, one flag after the other, and
    rank them. Each takes a minute or more."""
    bundles: bool = True
    """Compile the sequence layer once more, if Pallas' kernels read it, to count what they take: half a minute or more."""


@dataclass(frozen=True)
class Reading(Program):
    """What reads a run folder."""

    mesh: str | None = None
    """Devices that the model and its rows lie on, as of train, such as tensor=2; generate has one row. None: of all devices
    as many as divide the rows; one for generate."""


@dataclass(frozen=True)
class Evaluation(Reading):
    """Measure a trained model on held-out text, with --data next to what counting tokens gives, or on its task."""

    run_dir: Folder = TrainConfig.run_dir
    """Folder of the run."""
    data: str | None = None
    """Text whose held-out part is read: "stdlib", a path or a TFDS name. None: the run's own, as its folder keeps it."""
    eval_bytes: Count | None = None
    """Bytes of it to read. None: as many as the run's evaluations."""
    eval_sequences: Count | None = None
    """Sequences of the run's task to read of each range of lengths. None: as many as the run's evaluations."""

    def __post_init__(self):
        check_fields(self, flag)


@dataclass(frozen=True)
class Generation(Reading):
    """Write text with a trained model, token by token."""

    run_dir: Folder = TrainConfig.run_dir
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: the start of a document; -: what the standard input has."""
    chat: bool = False
    """Take the prompt for a user's message, and write the answer of a converted model that has a chat template."""
    tokens: Count = 400
    """Most tokens to write; a document may end sooner."""
    temperature: NonNegative = 0.8
    """Temperature of the softmax that tokens are drawn from; 0 always takes the likeliest token."""
    top_k: Whole = 0
    """Draw from this many likeliest tokens only; 0 for all."""
    top_p: Annotated[float, Interval(above=0, most=1)] = 1.0
    """Draw from the fewest likeliest tokens whose probabilities sum to at least this."""
    samples: Count = 1
    """Continuations to write, each with a seed of its own."""
    seed: Seed = 0
    """Seed of the draws of the first sample; the others have the seeds after it."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which a sample ends."""
    learner: Annotated[str, Named("the path of a file")] | None = None
    """File of a learner, which goes on from what it has learned, reads the prompt, writes, and is kept there. It is made if
    there is none."""
    learn_from: Literal["all", "prompt"] = "all"
    """What the CMS of a learner learns from: all, or the prompt alone and not what it writes."""

    def __post_init__(self):
        check_fields(self, flag)
        if "" in self.stop:
            raise UserError("--stop '': give a text of one character or more")
        if self.chat and not self.prompt:
            raise UserError("--chat: there is no message: give --prompt TEXT too")
        if self.learner is None and self.learn_from != "all":
            raise UserError(f"--learn-from {self.learn_from} is of a learner: give --learner FILE too")
        check_folder("learner", self.learner)
        if self.learner is not None and (self.samples > 1 or self.mesh is not None):
            other = "--samples" if self.samples > 1 else "--mesh"
            raise UserError(f"--learner {self.learner} writes one text on one device: leave out {other}")


@dataclass(frozen=True)
class Document(Program):
    """Read a text with a trained model, which learns as it reads, and show where it was surprised, learning and frozen."""

    file: str = ""
    """Text to read; the flag's name may be left out: nested-jax read FILE."""
    run_dir: Folder = TrainConfig.run_dir
    """Folder of the run."""
    learner: Annotated[str, Named("the path of a file")] | None = None
    """File of a learner, which goes on from what it has learned and is kept there. It is made if there is none."""
    against: Folder | None = None
    """Folder of another run with the same tokenizer, such as a Transformer's, which reads the text too."""
    html: Annotated[str, Named("the path of a page")] | None = None
    """Page to write, such as page.html, which needs no network: the text coloured by surprise, and what each level wrote."""

    def __post_init__(self):
        check_fields(self, flag)
        check_folder("learner", self.learner)
        check_folder("html", self.html)


@dataclass(frozen=True)
class Conversion(Program):
    """Make a run of a pretrained Llama and its tokenizer: attention is kept, MLPs become levels of a CMS."""

    source: str = ""
    """GGUF file, or folder with config.json, safetensors and tokenizer.json; the flag's name may be left out."""
    run_dir: Folder = "runs/converted"
    """Folder of the run, which generate, read and train --init-from take."""
    way: Literal["frozen", "dealt", "split", "deltas"] = "frozen"
    """How MLPs become levels: one that does not learn in context; each one a level, in turn by layer; their hidden units
    shared out to the levels; or kept, frozen, with a further MLP a level whose output starts at zero. With rates of 0 the
    logits are the source's."""
    periods: tuple[Count, ...] = ()
    """Tokens between two updates of each level that learns, slow to fast."""
    hidden: tuple[Count, ...] = ()
    """Hidden width of each level; none: equal shares of the MLP, or of a delta an eighth of it."""
    blocks: Count | None = None
    """How many of the last blocks learn. None: all."""
    rates: tuple[NonNegative, ...] = (0.0,)
    """Start of the learning rates: one of all levels, or one of each that learns, slow to fast."""
    seed: Seed = 0
    """Seed of what deltas read."""

    def __post_init__(self):
        check_fields(self, flag)


@dataclass(frozen=True)
class Depiction:
    """Show what learns in a model and its optimizer: levels by update frequency, context flows, objectives, rules."""

    preset: str = TrainConfig.preset
    """Model to show, SIZE-FAMILY; --model.FIELD flags change it."""
    optimizer: Literal[Optimizer, "none"] = TrainConfig.optimizer
    """Optimizer, as of train, with the batches of the preset's default run; none for the model alone."""
    run_dir: Folder | None = None
    """Folder of a run to show, in place of a preset."""
    markdown: bool = False
    """Print a Markdown table."""
    figure: str | None = None
    """Also draw the picture, to a file such as picture.png or picture.svg."""
    model: ModelConfig = field(default_factory=lambda: preset(TrainConfig.preset))
    """The language model to show."""

    def __post_init__(self):
        check_fields(self, flag)

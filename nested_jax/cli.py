"""The command line: nested-jax train | eval | generate | describe, each a frozen dataclass of flags."""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import logging
import math
import os
import re
import sys
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nested_jax.errors import UserError
from nested_jax.models.config import ModelConfig, preset
from nested_jax.train.config import TrainConfig, flag, flatten
from nested_jax.train.stopping import Interrupted, Interruption, NonFinite


@dataclass(frozen=True)
class Evaluation:
    """Measure a trained model on held-out text, next to what counting bytes and pairs of bytes gives."""

    run_dir: str = TrainConfig.run_dir
    """Folder of the run."""
    data: str | None = None
    """Text whose held-out part is read: "stdlib", a path or a TFDS name. None: the run's own."""
    eval_bytes: int | None = None
    """Bytes of it to read. None: as many as the run's evaluations."""


@dataclass(frozen=True)
class Generation:
    """Write text with a trained model, token by token."""

    run_dir: str = TrainConfig.run_dir
    """Folder of the run."""
    prompt: str = ""
    """Text to go on from; nothing for the start of a document."""
    tokens: int = 400
    """Most tokens to write; a document may end sooner."""
    temperature: float = 0.8
    """Spread of the choice among tokens; 0 always takes the likeliest."""
    seed: int = 0
    """Seed of the choices."""


Rule = Literal[(*typing.get_args(typing.get_type_hints(TrainConfig)["optimizer"]), "none")]


@dataclass(frozen=True)
class Depiction:
    """Show what learns in a model and its optimizer: levels by update frequency, context flows, objectives, rules."""

    preset: str = TrainConfig.preset
    """Model to show, SIZE-FAMILY; --model.FIELD flags change it."""
    optimizer: Rule = TrainConfig.optimizer
    """Rule of the updates, as of train, with the batches of the preset's default run; none for the model alone."""
    run_dir: str | None = None
    """Folder of a run to show, in place of a preset."""
    markdown: bool = False
    """Print a Markdown table."""
    figure: str | None = None
    """Also draw the picture, to a file such as picture.png or picture.svg."""
    model: ModelConfig = field(default_factory=lambda: preset(TrainConfig.preset))


def train(argv: Sequence[str]) -> None:
    """Train a language model on text; the same command again resumes."""
    config = _parse(TrainConfig.from_preset(_preset(argv)), "train", argv)
    with Interruption() as interruption:  # an import broken off half-way can end in a crash
        from nested_jax.train import loop
    if interruption.signal is not None:
        raise Interrupted("stopped before anything was trained", interruption.signal)
    loop.train(config)


def evaluate(argv: Sequence[str]) -> None:
    """Measure a trained model on held-out text."""
    flags = _parse(Evaluation(), "eval", argv)
    if flags.eval_bytes is not None and flags.eval_bytes < 1:
        raise UserError(f"--eval-bytes {flags.eval_bytes} must be at least 1")
    from nested_jax.data import open_documents
    from nested_jax.train import evaluation, trained

    config, net, parameters, tokenizer, step = trained.load(Path(flags.run_dir))
    data = flags.data or config.data
    documents = open_documents(data, "heldout")
    heldout = evaluation.HeldOut(config, net, tokenizer, documents, limit=flags.eval_bytes or config.eval_bytes)
    bits = heldout.bits_per_byte(parameters)
    print(f"{flags.run_dir}, step {step}, on {heldout.text_bytes:,} held-out bytes of {data}, bits per byte:")
    print(f"  unigram entropy  {heldout.entropies.unigram:.3f}")
    print(f"  bigram entropy   {heldout.entropies.bigram:.3f}")
    print(f"  this model       {bits:.3f}")


def generate(argv: Sequence[str]) -> None:
    """Write text with a trained model."""
    flags = _parse(Generation(), "generate", argv)
    if flags.tokens < 1:
        raise UserError(f"--tokens {flags.tokens} must be at least 1")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed {flags.seed} must be at least 0 and below {2**32}")
    if not 0 <= flags.temperature < math.inf:
        raise UserError(f"--temperature {flags.temperature} must be a finite number and at least 0")
    from nested_jax.train import sample, trained

    _, net, parameters, tokenizer, _ = trained.load(Path(flags.run_dir))
    options = {"tokens": flags.tokens, "temperature": flags.temperature, "seed": flags.seed}
    print(flags.prompt, end="", flush=True)
    for text in sample.characters(tokenizer, sample.sample(net, parameters, tokenizer, flags.prompt, **options)):
        print(text, end="", flush=True)
    print()


def depict(argv: Sequence[str]) -> None:
    """Show what learns in a model and its optimizer, and how often."""
    name = _preset(argv)
    flags = _parse(Depiction(preset=name, model=preset(name)), "describe", argv)
    import optax
    from rich.console import Console

    from nested_jax.picture import describe
    from nested_jax.train.folder import read_config
    from nested_jax.train.optimizer import WithInputs, optimizer

    if flags.run_dir is None:
        own = {} if flags.optimizer == "none" else {"optimizer": flags.optimizer}
        config = TrainConfig.from_preset(flags.preset, model=flags.model, **own)
    elif flags != Depiction(run_dir=flags.run_dir, markdown=flags.markdown, figure=flags.figure):
        raise UserError(
            "--run-dir shows a run with its own model and optimizer: leave out --preset, --optimizer and --model"
        )
    elif (config := read_config(Path(flags.run_dir))) is None:
        raise UserError(f"--run-dir {flags.run_dir} holds no run: make one with nested-jax train --run-dir {flags.run_dir}")
    if flags.figure is not None and (not flags.figure or Path(flags.figure).is_dir()):
        raise UserError(f"--figure {flags.figure!r} names no file: give one that ends in .png, .svg or .pdf")
    system, extra = config.model, None
    if flags.optimizer != "none":
        rule = optimizer(config)
        if isinstance(rule, WithInputs):
            extra = rule.examples
            rule = optax.GradientTransformationExtraArgs(rule.init, rule.update)
        system = config.model, rule
    picture = describe(system, tokens_per_step=config.window * config.batch, extra=extra)
    if flags.figure is not None:
        try:
            picture.plot().savefig(flags.figure)
        except ValueError as error:
            raise UserError(f"--figure {flags.figure}: {error}; end its name in .png, .svg or .pdf") from None
    if flags.markdown:
        print(picture.markdown())
    else:
        terminal = Console()
        terminal = terminal if terminal.is_terminal else Console(width=160)
        terminal.print(picture)


COMMANDS = {"train": train, "eval": evaluate, "generate": generate, "describe": depict}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 2 after one line on what the user can put right."""
    argv = sys.argv[1:] if argv is None else list(argv)
    _hush()
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            raise UserError(f"unknown command {argv[0]}{_nearest(argv[0], COMMANDS)}; see nested-jax --help")
    except UserError as error:
        return _fail(error, 2)
    except NonFinite as error:
        return _fail(error, 1)
    except Interrupted as stop:
        return _fail(stop, 128 + stop.signal)
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; what was saved before is kept", 2)
    return 0


def _fail(error: BaseException | str, code: int) -> int:
    print("nested-jax:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {run.__doc__}" for name, run in COMMANDS.items())
    return f"usage: nested-jax COMMAND [flags]\n\n{commands}\n\nnested-jax COMMAND --help lists the command's flags."


def _preset(argv: Sequence[str]) -> str:
    """The last --preset given, whose fields are the other flags' defaults."""
    name = TrainConfig.preset
    for word, following in itertools.pairwise([*argv, "-"]):
        if word == "--preset" and not following.startswith("-"):
            name = following
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    return name


def _parse(default: Any, command: str, argv: Sequence[str]) -> Any:
    """The flags of a command, as tyro reads them. Raises UserError, one line of what tyro has to say."""
    import tyro

    read = lambda: tyro.cli(type(default), args=argv, prog=f"nested-jax {command}", default=default)
    if {"-h", "--help"} & set(argv):
        return read()
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return read()
    except SystemExit:
        known = [flag(name) for name, _ in flatten(default)]
        raise UserError(f"{_one_line(said.getvalue(), known)}; see nested-jax {command} --help") from None


def _one_line(box: str, known: Sequence[str]) -> str:
    """What one of tyro's boxes says, up to its first rule.

    >>> _one_line("╭─ Unrecognized ─╮\\n│ Unrecognized options: --stpes, 3 │\\n╰──╯", ["--steps", "--seed"])
    'unknown flag --stpes (did you mean --steps?)'
    """
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).strip("│| ") for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match("[─╭╰+-]{2}", line)] or [-1]
    message = " ".join(lines[rules[0] + 1 : rules[1] if len(rules) > 1 else None]).rstrip(".")
    if not message.startswith("Unrecognized options: "):
        return message
    words = message.removeprefix("Unrecognized options: ").split(", ")
    wrong = next((word.split("=")[0] for word in words if word.startswith("-")), None)
    return f"unknown flag {wrong}{_nearest(wrong, known)}" if wrong else f"unexpected word {words[0]}"


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _hush() -> None:
    """Keeps the libraries' logs and warnings off the terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.simplefilter("ignore")
    for name in ("absl", "jax", "orbax", "tensorboardX"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())

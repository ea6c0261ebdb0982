"""The command line: nested-jax train | eval | generate | describe, each a frozen dataclass of flags."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from nested_jax.checks import Count, NonNegative, check_fields
from nested_jax.errors import UserError
from nested_jax.models.config import ModelConfig, preset
from nested_jax.train.config import Optimizer, Seed, TrainConfig, flag, flatten
from nested_jax.train.stopping import Interrupted, Interruption, NonFinite


@dataclass(frozen=True)
class Evaluation:
    """Measure a trained model on held-out text, with --data next to what counting tokens gives."""

    run_dir: str = TrainConfig.run_dir
    """Folder of the run."""
    data: str | None = None
    """Text whose held-out part is read: "stdlib", a path or a TFDS name. None: the run's own, as its folder keeps it."""
    eval_bytes: Count | None = None
    """Bytes of it to read. None: as many as the run's evaluations."""

    def __post_init__(self):
        check_fields(self, flag)


@dataclass(frozen=True)
class Generation:
    """Write text with a trained model, token by token."""

    run_dir: str = TrainConfig.run_dir
    """Folder of the run."""
    prompt: str = ""
    """Text to continue; empty: the start of a document."""
    tokens: Count = 400
    """Most tokens to write; a document may end sooner."""
    temperature: NonNegative = 0.8
    """Temperature of the softmax that tokens are drawn from; 0 always takes the likeliest token."""
    seed: Seed = 0
    """Seed of the draws."""

    def __post_init__(self):
        check_fields(self, flag)


@dataclass(frozen=True)
class Depiction:
    """Show what learns in a model and its optimizer: levels by update frequency, context flows, objectives, rules."""

    preset: str = TrainConfig.preset
    """Model to show, SIZE-FAMILY; --model.FIELD flags change it."""
    optimizer: Literal[Optimizer, "none"] = TrainConfig.optimizer
    """Optimizer, as of train, with the batches of the preset's default run; none for the model alone."""
    run_dir: str | None = None
    """Folder of a run to show, in place of a preset."""
    markdown: bool = False
    """Print a Markdown table."""
    figure: str | None = None
    """Also draw the picture, to a file such as picture.png or picture.svg."""
    model: ModelConfig = field(default_factory=lambda: preset(TrainConfig.preset))
    """The language model to show."""

    def __post_init__(self):
        check_fields(self, flag)


def train(argv: Sequence[str]) -> None:
    """Train a language model on text; the same command again resumes."""
    config = _parse(_defaults(argv), "train", argv)
    with Interruption() as interruption:  # an exception in the middle of an import can end in a crash
        from nested_jax.train import loop
    if interruption.signal is not None:
        raise Interrupted("stopped before anything was trained", interruption.signal)
    loop.train(config)


def evaluate(argv: Sequence[str]) -> None:
    """Measure a trained model on held-out text."""
    flags = _parse(Evaluation(), "eval", argv)
    from nested_jax.data import open_documents
    from nested_jax.train import evaluation, trained
    from nested_jax.train.text import count_ngrams, read_heldout

    config, params, tokenizer, step = trained.load_run(flags.run_dir, _warn)
    limit, ngrams = flags.eval_bytes or config.eval_bytes, None
    if flags.data is None:  # the run's own text, as its folder keeps it: what the folder only names is not opened
        data, documents = config.data, read_heldout(Path(flags.run_dir), config, limit)
    else:
        data, documents = flags.data, list(evaluation.first_bytes(open_documents(flags.data, "heldout"), limit))
        ngrams = count_ngrams(config, tokenizer, open_documents(flags.data, "train"), documents)
    heldout = evaluation.HeldOut(config, tokenizer, documents, limit=limit)
    bits = heldout.bits_per_byte(params)
    print(f"{flags.run_dir}, step {step}, on {heldout.text_bytes:,} held-out bytes of {data}, bits per byte:")
    if ngrams is not None:
        print(f"  counts of tokens  {ngrams.unigram:.3f}")
        print(f"  counts of pairs   {ngrams.bigram:.3f}")
    print(f"  this model        {bits:.3f}")


def generate(argv: Sequence[str]) -> None:
    """Write text with a trained model."""
    flags = _parse(Generation(), "generate", argv)
    from nested_jax.train import sample, trained

    config, params, tokenizer, _ = trained.load_run(flags.run_dir, _warn)
    options = {"tokens": flags.tokens, "temperature": flags.temperature, "seed": flags.seed}
    print(flags.prompt, end="", flush=True)
    for text in sample.characters(tokenizer, sample.sample(config.model, params, tokenizer, flags.prompt, **options)):
        print(text, end="", flush=True)
    print()


def depict(argv: Sequence[str]) -> None:
    """Show what learns in a model and its optimizer, and how often."""
    default = _defaults(argv)
    flags = _parse(Depiction(preset=default.preset, model=default.model), "describe", argv)
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
    picture = describe(system, tokens_per_step=config.window * config.batch_size, extra=extra)
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
    """Runs a command.

    Args:
        argv: its words, without the program's name; None: those of the process.

    Returns:
        The exit code: 2 after one line about what the user can correct.
    """
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
    except BrokenPipeError:  # the reader of the output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}; what was saved before is kept", 2)
    return 0


def _fail(error: BaseException | str, code: int) -> int:
    print("nested-jax:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _warn(line: str) -> None:
    print("nested-jax:", line, file=sys.stderr)


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {run.__doc__}" for name, run in COMMANDS.items())
    return f"usage: nested-jax COMMAND [flags]\n\n{commands}\n\nnested-jax COMMAND --help lists the command's flags."


def _defaults(argv: Sequence[str]) -> TrainConfig:
    """What the flags' defaults are: those of the last --preset and --tokenizer given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "tokenizer"):
        default = getattr(TrainConfig, name)
        parser.add_argument(flag(name), nargs="?", default=default, const=default)
    given = parser.parse_known_args(argv)[0]
    return TrainConfig.from_preset(given.preset, tokenizer=given.tokenizer)


Flags = TypeVar("Flags")


def _parse(default: Flags, command: str, argv: Sequence[str]) -> Flags:
    """The flags of a command, read by tyro. Raises UserError with one line of its error."""
    import tyro

    argv = [re.sub("^--memory-policy(?==|$)", "--model.memory-policy", word) for word in argv]
    read = lambda: tyro.cli(
        type(default), args=argv, prog=f"nested-jax {command}", default=default, return_unknown_args=True
    )
    if {"-h", "--help"} & set(argv):
        return read()[0]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):  # not a terminal: plain text
            flags, unknown = read()
    except SystemExit as stop:
        error: BaseException | None = stop
        while error and not isinstance(error, UserError):  # of the config that tyro was making
            error = error.__context__
        raise error or UserError(f"{_first_paragraph(printed.getvalue())}; see nested-jax {command} --help") from None
    if unknown:
        wrong = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        names = [flag(name) for name, _ in flatten(default)]
        what = f"unknown flag {wrong}{_nearest(wrong, names)}" if wrong else f"unexpected word {unknown[0]}"
        raise UserError(f"{what}; see nested-jax {command} --help")
    return flags


def _first_paragraph(box: str) -> str:
    """The first paragraph of an error that tyro prints where there is no terminal.

    >>> _first_paragraph(" Value error \\n -------- \\n --steps: no \\n number \\n -------- \\n Help \\n")
    '--steps: no number'
    """
    _, paragraph, *_ = re.split("\n *-* *\n", box)
    return " ".join(paragraph.split()).rstrip(".")


def _nearest(word: str, known: Iterable[str]) -> str:
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

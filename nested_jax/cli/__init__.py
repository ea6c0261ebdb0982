"""The command line: nested-jax COMMAND, of train, eval, generate, read, convert, describe and plan, each with its flags."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from nested_jax.cli.flags import Conversion, Depiction, Document, Evaluation, Generation, Planning, Program, check_folder
from nested_jax.cli.parsing import nearest, of_preset, parse, training
from nested_jax.errors import UserError
from nested_jax.train.config import TrainConfig, flag
from nested_jax.train.stopping import Diverged, Interrupted

if TYPE_CHECKING:
    import numpy as np

    from nested_jax.data import Tokenizer
    from nested_jax.parallel.mesh import Divided
    from nested_jax.serve.learner import Learner, LearnFrom
    from nested_jax.train.trained import Trained


def train(argv: Sequence[str]) -> None:
    """Train a language model on text, or on a synthetic task; the same command again resumes."""
    flags = parse(training(argv), "train", argv)
    from nested_jax.train import loop

    _join(flags)
    loop.train(flags.run)


def evaluate(argv: Sequence[str]) -> None:
    """Measure a trained model on held-out text, or on sequences of its task."""
    flags = parse(Evaluation(), "eval", argv)
    from nested_jax.train import trained
    from nested_jax.train.state import divided_by_reader

    def divided(config: TrainConfig) -> Divided:
        """Windows of text, all of a length; sequences of a task have several."""
        return divided_by_reader(config.model, config.batch_size, 1 if config.task else config.window)

    _join(flags)
    with trained.opened(flags.run_dir, flags.mesh, divided, _warn) as run:
        (_evaluate_task if run.tokenizer is None else _evaluate_text)(flags, run)


def _evaluate_text(flags: Evaluation, run: Trained) -> None:
    from nested_jax.data import open_documents
    from nested_jax.train import evaluation
    from nested_jax.train.progress import announced
    from nested_jax.train.text import count_ngrams, read_heldout

    config, params, tokenizer, step = run
    assert tokenizer is not None
    if flags.eval_sequences is not None:
        raise UserError(f"--eval-sequences: --run-dir {flags.run_dir} is of a run on text: give --eval-bytes")
    limit, ngrams = flags.eval_bytes or config.eval_bytes, None
    if flags.data is None:  # the run's own text, as its folder keeps it: what the folder only names is not opened
        data, documents = config.data, read_heldout(Path(flags.run_dir), config, limit)
    else:
        data, documents = flags.data, list(evaluation.first_bytes(open_documents(flags.data, "heldout"), limit))
        ngrams = count_ngrams(config, tokenizer, open_documents(flags.data, "train"), documents)
    heldout = evaluation.HeldOut(config, tokenizer, documents)
    with announced("compiling the evaluation"):
        heldout.compile(params)
    bits = heldout.bits_per_byte(params)
    print(f"{flags.run_dir}, step {step}, on {heldout.text_bytes:,} held-out bytes of {data}, bits per byte:")
    if ngrams is not None:
        print(f"  counts of tokens  {ngrams.unigram:.3f}")
        print(f"  counts of pairs   {ngrams.bigram:.3f}")
    print(f"  this model        {bits:.3f}")


def _evaluate_task(flags: Evaluation, run: Trained) -> None:
    from nested_jax.train.progress import announced
    from nested_jax.train.task_scores import TaskScores

    for name in ("data", "eval_bytes"):
        if getattr(flags, name) is not None:
            raise UserError(f"{flag(name)}: --run-dir {flags.run_dir} is of --task {run.config.task}: give --eval-sequences")
    number = flags.eval_sequences or run.config.eval_sequences
    scores = TaskScores(dataclasses.replace(run.config, eval_sequences=number))
    with announced("compiling the evaluation"):
        scores.compile(run.params)
    row = scores.measure(run.params) or {}
    print(
        f"{flags.run_dir}, step {run.step}, on {number:,} sequences of {run.config.task} a row, right labels and sequences:"
    )
    for (shortest, longest), labels, whole in scores.table(row):
        print(f"  {f'{shortest} to {longest} tokens':<20}{labels:>7.1%}{whole:>8.1%}")


def generate(argv: Sequence[str]) -> None:
    """Write text with a trained model."""
    flags = parse(Generation(), "generate", argv)
    prompt = _standard_input() if flags.prompt == "-" else flags.prompt
    from nested_jax.serve.until import until
    from nested_jax.train import sample, trained
    from nested_jax.train.progress import announced
    from nested_jax.train.state import divided_by_reader

    _join(flags)
    with trained.opened(flags.run_dir, flags.mesh, lambda config: divided_by_reader(config.model, rows=1), _warn) as run:
        config, params, tokenizer = run.config, run.params, _text_only(run, flags.run_dir)
        options = {"tokens": flags.tokens, "temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
        learner = _learner(flags.learner, run, flags.learn_from) if flags.learner else None
        given = _message(tokenizer, prompt, flags.run_dir) if flags.chat else prompt
        with announced("compiling the model"):
            if learner is None:
                number, seed = flags.samples, flags.seed
                texts = sample.samples(config.model, params, tokenizer, given, number=number, seed=seed, **options)
                texts = (sample.characters(tokenizer, ids) for ids in texts)
            else:
                texts = [cast("Iterator[str]", learner.generate(given, seed=flags.seed, **options))]
        for i, parts in enumerate(texts):
            print(f"\n--- sample {i + 1} of {flags.samples}, seed {flags.seed + i}" if flags.samples > 1 else "", end="")
            print("\n" * (flags.samples > 1) + ("" if flags.chat else prompt), end="", flush=True)
            for text in until(parts, flags.stop):
                print(text, end="", flush=True)
            print()
        if learner is not None:
            _keep(learner, flags.learner)


def _message(tokenizer: Tokenizer, prompt: str, run_dir: str) -> np.ndarray:
    """Tokens of a user's message, by the chat template."""
    from nested_jax.data.pretrained import PretrainedTokenizer

    if not isinstance(tokenizer, PretrainedTokenizer):
        raise UserError(
            f"--chat: the model in {run_dir} has no chat template: leave it out, or convert a model that has one"
        )
    return tokenizer.chat([{"role": "user", "content": prompt}])


def read(argv: Sequence[str]) -> None:
    """Read a text, learning, and show where it surprises."""
    argv = argv if not argv or argv[0].startswith("-") else ["--file", *argv]
    flags = parse(Document(), "read", argv)
    if not flags.file:
        raise UserError("there is no text to read: give nested-jax read FILE")
    import numpy as np

    from nested_jax.files import read_file, write_file
    from nested_jax.serve import Learner
    from nested_jax.serve.page import page, summary
    from nested_jax.train import trained
    from nested_jax.train.progress import announced

    text = read_file(flags.file, _LONGEST).decode(errors="replace")
    if not text:
        raise UserError(f"{flags.file} is empty: give a text")
    _join(flags)
    run = trained.load_run(flags.run_dir, _warn)
    tokenizer = _text_only(run, flags.run_dir)
    learner = _learner(flags.learner, run)
    learners = {"learning": learner, "frozen": learner.copy()}
    if flags.against is not None:
        other = trained.load_run(flags.against, _warn)
        if not np.array_equal(_text_only(other, flags.against).encode(text), tokenizer.encode(text)):
            raise UserError(
                f"--against {flags.against} has another tokenizer than {flags.run_dir}: give a run with the same"
            )
        learners[Path(flags.against).name] = Learner(other)
    readings = {}
    for name, one in learners.items():
        with announced(f"reading, {name}"):
            readings[name] = one.read(text, learn=name != "frozen", record=True)
    print(summary(tokenizer, readings))
    if flags.html is not None:
        write_file(Path(flags.html), page(Path(flags.file).name, tokenizer, readings).encode())
        print(flags.html)
    _keep(learner, flags.learner)


def convert(argv: Sequence[str]) -> None:
    """Make a run of a pretrained model."""
    argv = argv if not argv or argv[0].startswith("-") else ["--source", *argv]
    flags = parse(Conversion(), "convert", argv)
    if not flags.source:
        raise UserError("there is no model to convert: give nested-jax convert FILE")
    from nested_jax.train.converted import write_run

    config, size = write_run(flags)
    print(f"{flags.run_dir}: {size:,} parameters, levels of {' '.join(map(str, config.model.cms.hidden))} hidden units")


def _text_only(run: Trained, run_dir: str) -> Tokenizer:
    """The tokenizer of a run on text."""
    if run.tokenizer is None:
        raise UserError(f"--run-dir {run_dir} is of --task {run.config.task}, which has no text: give a run on text")
    return run.tokenizer


def _learner(path: str | None, run: Trained, learn_from: LearnFrom = "all") -> Learner:
    """The learner of --learner, as it was kept, or a new one."""
    from nested_jax.serve import Learner

    if path is not None and Path(path).exists():
        return Learner.restore(path, run, learn_from=learn_from)
    return Learner(run, learn_from=learn_from)


def _keep(learner: Learner, path: str | None) -> None:
    if path is not None:
        learner.save(path)
        print(f"{path}: {learner.tokens_read:,} tokens read", file=sys.stderr)


def depict(argv: Sequence[str]) -> None:
    """Show what learns in a model and its optimizer, and how often."""
    default = of_preset(argv)
    flags = parse(Depiction(preset=default.preset, model=default.model), "describe", argv)
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
    check_folder("figure", flags.figure)
    system, extra = config.model, None
    if flags.optimizer != "none":
        rule = optimizer(config)
        if isinstance(rule, WithInputs):
            extra = rule.examples
            rule = optax.GradientTransformationExtraArgs(rule.init, rule.update)
        system = config.model, rule
    try:
        picture = describe(system, tokens_per_step=config.window * config.batch_size, extra=extra)
    except OverflowError:
        raise UserError(f"--preset {config.preset} and --model flags: sizes that no model has; give smaller ones") from None
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


def plan(argv: Sequence[str]) -> None:
    """Say what a training step takes on TPUs, with none at hand."""
    default = training(argv).run
    flags = parse(Planning(**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)}), "plan", argv)
    from nested_jax.parallel import plan as planning
    from nested_jax.train.progress import announced

    if not flags.search:
        with announced("compiling the training step"):
            made = planning.plan(flags.run, flags.topology, count_bundles=flags.bundles)
    else:
        from nested_jax.parallel.search import ranking, search

        compile = functools.partial(planning.plan, count_bundles=flags.bundles)
        trials = search(
            flags.run, flags.topology, compile=compile, tell=lambda one: print(ranking([one]).splitlines()[1], flush=True)
        )
        print(f"\n{ranking(trials)}\n")
        made = trials[0].plan
    print(planning.table(made))


COMMANDS = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "read": read,
    "convert": convert,
    "describe": depict,
    "plan": plan,
}
_LONGEST = 2**24
"""Bytes of a text that is read at most."""


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
        elif argv[0] in ("-V", "--version"):
            print(f"nested-jax {version('nested-jax')}, jax {version('jax')}, Python {platform.python_version()}")
        elif argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            raise UserError(f"unknown command {argv[0]}{nearest(argv[0], COMMANDS)}; see nested-jax --help")
    except UserError as error:
        return _fail(error, 2)
    except Diverged as error:
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


def _join(flags: Program) -> None:
    """Joins the other processes, of which the first alone prints, and keeps what is compiled."""
    from nested_jax.parallel import processes
    from nested_jax.train.compilation import keep_compiled

    processes.start()
    if not processes.first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    keep_compiled(flags.compilation_cache)


def _fail(error: BaseException | str, code: int) -> int:
    print("nested-jax:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _warn(line: str) -> None:
    print("nested-jax:", line, file=sys.stderr)


def _help() -> str:
    commands = "\n".join(f"  {name:<10} {run.__doc__}" for name, run in COMMANDS.items())
    end = "nested-jax COMMAND --help lists the command's flags; nested-jax --version tells versions."
    return f"usage: nested-jax COMMAND [flags]\n\n{commands}\n\n{end}"


def _standard_input() -> str:
    if sys.stdin is None:  # closed by the caller
        raise UserError("--prompt -: there is no standard input; give the text itself")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("--prompt -: the standard input is no UTF-8 text") from None


def _hush() -> None:
    """Keeps the libraries' logs and warnings off the terminal, and what it cannot show from ending the program."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    warnings.simplefilter("ignore")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":  # of another encoding than the text
        sys.stdout.reconfigure(errors="backslashreplace")
    for name in ("absl", "asyncio", "jax", "orbax", "tensorboardX"):  # what concerns the user is an exception too
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)

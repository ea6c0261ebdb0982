"""The words of a command line as flags, read by tyro, and the defaults that a preset, a run or a file gives them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nested_jax.cli.flags import Training
from nested_jax.errors import UserError
from nested_jax.train.config import TrainConfig, flag, flatten

_LARGEST = 2**20  # bytes of a file of --config


def of_preset(argv: Sequence[str], preset: str | None = None, task: str | None = None) -> TrainConfig:
    """What the other flags' defaults are: of the last --preset, --tokenizer and --task given, or of others."""
    tokenizer = _given("tokenizer", argv) or TrainConfig.tokenizer
    preset, task = preset or _given("preset", argv) or TrainConfig.preset, task or _given("task", argv)
    return TrainConfig.from_preset(preset, tokenizer=tokenizer, task=task)


def _given(name: str, argv: Sequence[str]) -> str | None:
    """The last value given to a flag that decides the defaults of others; None where it has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag(name), f"--{name}", nargs="?", dest="value")
    return parser.parse_known_args(argv)[0].value


def training(argv: Sequence[str]) -> Training:
    """The defaults of train's flags: the run in its folder, else that of --init-from, else the preset; over it, --config."""
    if {"-h", "--help"} & set(argv):
        return _as_training(of_preset(argv))
    from nested_jax.train.folder import read_config

    path = _given("config", argv)
    values = _read_json(Path(path)) if path else {}
    given = lambda name: _given(name, argv) or (values.get(name) if isinstance(values.get(name), str) else None)
    source, theirs = given("init_from"), None
    if source and (theirs := read_config(Path(source))) is None:
        raise UserError(f"--init-from {source} holds no run: give the folder of one")
    preset = given("preset") or (theirs and theirs.preset)
    config = of_preset(argv, preset, given("task"))
    run_dir = given("run_dir") or config.run_dir
    saved = None if "--fresh" in argv or values.get("fresh") else read_config(Path(run_dir))
    if saved is None and theirs:
        saved = dataclasses.replace(theirs, init_from=source)
    if saved and preset in (None, saved.preset):
        config = dataclasses.replace(saved, fresh=False)
    if path:
        try:
            config = TrainConfig.from_json(_merge(config.to_json(), values))
        except (TypeError, ValueError) as error:
            raise UserError(f"--config {path}: {error}") from None
    return _as_training(dataclasses.replace(config, run_dir=run_dir))


def _as_training(config: TrainConfig) -> Training:
    return Training(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})


def _read_json(path: Path) -> dict[str, Any]:
    """The values in a file of --config; of a run's config.json those of its training."""
    try:
        with path.open("rb") as file:  # a pipe too, as of <(command)
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise UserError(f"--config {path} is larger than {_LARGEST:,} bytes: give a smaller JSON file")
        values = json.loads(data)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}; give a JSON file") from None
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path} is no JSON: {error}; give a JSON file such as a run's config.json") from None
    values = values.get("train", values) if isinstance(values, dict) else values
    if not isinstance(values, dict):
        raise UserError(f"--config {path} holds no object of flags and values: give one such as a run's config.json")
    return values


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts, those of `changes` in front."""
    both = lambda name: isinstance(values.get(name), dict) and isinstance(changes[name], dict)
    return values | {name: _merge(values[name], new) if both(name) else new for name, new in changes.items()}


Flags = TypeVar("Flags")


def parse(default: Flags, command: str, argv: Sequence[str]) -> Flags:
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
        said = f"{_first_paragraph(printed.getvalue())}; {_dashed(argv)}see nested-jax {command} --help"
        raise error or UserError(said) from None
    if unknown:
        wrong = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
        names = [flag(name) for name, _ in flatten(default)]
        what = f"unknown flag {wrong}{nearest(wrong, names)}" if wrong else _lone(unknown[0], argv, default)
        raise UserError(f"{what}; see nested-jax {command} --help")
    return flags


def _first_paragraph(box: str) -> str:
    """The first paragraph of an error that tyro prints where there is no terminal.

    >>> _first_paragraph(" Value error \\n -------- \\n --steps: no \\n number \\n -------- \\n Help \\n")
    '--steps: no number'
    """
    _, paragraph, *_ = re.split("\n *-* *\n", box)
    return " ".join(paragraph.split()).rstrip(".")


def _dashed(argv: Sequence[str]) -> str:
    """What to do about the first word that starts with - where a flag's value is missing.

    >>> _dashed(["--prompt", "-x", "--seed", "1"])
    'give a value that starts with - as --prompt=-x; '
    """
    for name, word in zip(argv, argv[1:], strict=False):
        if name.startswith("--") and re.match("-[^-]", word) and "=" not in name:
            return f"give a value that starts with - as {name}={word}; "
    return ""


def _lone(word: str, argv: Sequence[str], default: Any) -> str:
    """What to do about a word that no flag takes: where it follows a switch, how that is turned off.

    >>> argv = ["--batch-size", "no", "--model.tie-embeddings", "no"]
    >>> _lone("no", argv, TrainConfig()), _lone("x", ["x"], TrainConfig())
    ('unexpected word no: give --model.tie-embeddings alone, or --model.no-tie-embeddings', 'unexpected word x')
    """
    switches = {flag(name) for name, value in flatten(default) if isinstance(value, bool)}
    for switch, following in zip(argv, argv[1:], strict=False):
        if following == word and switch in switches:
            group, dot, name = switch.removeprefix("--").rpartition(".")
            return f"unexpected word {word}: give {switch} alone, or --{group}{dot}no-{name}"
    return f"unexpected word {word}"


def nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""

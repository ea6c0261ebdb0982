"""The command line: what it prints, what it refuses in one line, and how it stops."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import pty
import pydoc_data.topics
import re
import resource
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint
import pytest
from rare import cases

from nested_jax import cli
from nested_jax.cli import flags, main, parsing
from nested_jax.data import open_documents
from nested_jax.train import loop
from nested_jax.train.checkpoint import Checkpoints
from nested_jax.train.config import TrainConfig, flag, flatten
from nested_jax.train.folder import write_config

# As small_config of tests/train. Few different numbers of steps: each is a program of its own to compile.
SMALL = (
    "--preset tiny-transformer --window 32 --batch-size 4 --warmup 2 --eval-bytes 2000 --log-every 1 --checkpoint-every 2 "
    "--eval-every 0 --sample-tokens 0 --reading-documents 0 --tokenizer bytes "
    "--model.width 16 --model.layers 1 --model.heads 2 --model.chunk 16 "
    "--model.memory-hidden 8 --model.cms.hidden 16"
)
TEXT = "\n\n".join(pydoc_data.topics.topics.values())[:100_000]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with text.txt, an empty file, an empty folder and a binary one."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("empty.txt").write_text("")
    Path("picture.png").write_bytes(bytes(range(256)) * 20)
    Path("folder").mkdir()
    return tmp_path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, compiled_once):
    """The folder of a finished run of 6 steps on text.txt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        Path("text.txt").write_text(TEXT)
        assert main(f"train {SMALL} --data text.txt --run-dir a --steps 6".split()) == 0
        return Path("a").absolute()


@pytest.fixture
def run_of_6(place, trained_once):
    """A copy of it, named a."""
    return shutil.copytree(trained_once, place / "a")


@pytest.fixture
def say(capsys, compiled_once):
    """A function that runs a command in this process: (exit code, lines of stdout, lines of stderr)."""

    def run(line: str):
        capsys.readouterr()
        code = main(shlex.split(line))
        out, err = capsys.readouterr()
        return code, out.splitlines(), [line for line in err.splitlines() if not line.startswith("compiling ")]

    return run


@pytest.fixture
def start(compiled_once):
    """A function that starts a command in a process of its own."""
    return _start


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def _environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def _start(*words: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "nested_jax", *words], env=_environment(), **PIPES)


class Terminal:
    """A command and a pseudo-terminal that controls it, whose driver sends the signals of Ctrl-C and of its end."""

    def __init__(self, *words: str):
        self.said = ""
        self._ends = pty.openpty()
        script = f"""if True:
            import os, signal, sys
            terminal = os.open({os.ttyname(self._ends[1])!r}, os.O_RDWR)  # the first one that a session opens controls it
            for stream in range(3):
                os.dup2(terminal, stream)
            for number in (signal.SIGINT, signal.SIGHUP):  # which a job in the background and nohup ignore
                signal.signal(number, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, "-m", "nested_jax", *sys.argv[1:]])
        """
        env = _environment() | {"TERM": "xterm", "COLUMNS": "160"}
        self.process = subprocess.Popen([sys.executable, "-c", script, *words], env=env, start_new_session=True)

    def type(self, keys: str) -> None:
        os.write(self._ends[0], keys.encode())

    def read(self, until: Callable[[], object]) -> None:
        """Adds to `said` what is printed, until a condition holds or the process has ended."""
        limit = time.monotonic() + 120
        while not until():
            over = self.process.poll() is not None
            assert time.monotonic() < limit, self.said
            if select.select(self._ends[:1], (), (), 0.02)[0]:
                self.said += os.read(self._ends[0], 2**16).decode(errors="replace")
            elif over:
                break

    def hang_up(self) -> None:
        os.close(self._ends[0])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in self._ends:
            with contextlib.suppress(OSError):
                os.close(end)


@pytest.fixture
def terminal(compiled_once):
    """A function that starts a command on a terminal of its own."""
    with contextlib.ExitStack() as stack:

        def start(*words: str) -> Terminal:
            started = Terminal(*words)
            stack.callback(started.end)
            return started

        yield start


def wait_for_rows(process: subprocess.Popen, run_dir: str, number: int):
    path, limit = Path(run_dir, "metrics.jsonl"), time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < number:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("trian", r"unknown command trian \(did you mean train\?\)"),
        ("train --stpes 3", r"unknown flag --stpes \(did you mean --steps\?\); see nested-jax train --help"),
        ("train --model.widht=3", r"unknown flag --model.widht \(did you mean --model.width\?\)"),
        ("train 400", "unexpected word 400"),
        ("train --model.gated no", "unexpected word no: give --model.gated alone, or --model.no-gated"),
        ("train --steps many", "--steps: .*many"),
        ("train --steps", "--steps"),
        ("train --steps 0", "--steps 0: give a whole number of at least 1 and below 2147483648$"),
        ("train --learning-rate nan", "--learning-rate nan"),
        ("train --batch-size 6 --accumulate 4", "--batch-size 6 is not a multiple of --accumulate 4"),
        ("train --preset tiny-hoep", "tiny-hoep.*tiny-hope"),
        ("train --preset", "--preset"),
        ("train --preset ''", "preset ''"),
        (
            "train --seed 99999999999999999999",
            "--seed 99999999999999999999: give a whole number of at least 0 and below 4294967296$",
        ),
        ("generate --seed 99999999999999999999", "--seed 99999999999999999999: give"),
        ("train --model.cms.rate nan", "cms.rate nan"),
        ("train --model.cms.clip -1", "cms.clip -1"),
        ("train --data ~nosuchuser/text", "~nosuchuser/text does not exist"),
        (f"train --data {'x' * 300}", "File name too long"),
        (f"train --data text.txt --run-dir {'x' * 300}", "File name too long"),
        ("train --model.mixer transformer", "--model.mixer.*attention"),
        ("train --model.cms.periods 64 x", "--model.cms.periods"),
        ("train --model.cms.hidden 8 8 --model.cms.periods 100 30", "100.*30"),
        ("train --model.heads 3", "model.width 128 is not a multiple of model.heads 3: change one$"),
        ("train --model.chunk 2.5", "--model.chunk: .*2.5"),
        ("train --memory-policy sqr", "--model.memory-policy: .*sqr"),
        ("train --memory-policy 0", "model.memory_policy 0: give one of"),
        ("train --optimizer adam", "--optimizer.*'adamw', 'momentum'"),
        ("train --model.vocabulary 100 --data text.txt", "--model.vocabulary 100 is too small.* give"),
        ("train --data nowhere/text.txt", "path nowhere/text.txt does not exist"),
        ("train --data no_such_dataset", "dataset no_such_dataset is unknown"),
        ("train --data empty.txt", "empty.txt holds 0 bytes"),
        ("train --data folder", "folder holds 0 bytes"),
        ("train --data picture.png", "picture.png is binary"),
        ("train --data text.txt --tokenizer words", "--tokenizer words is no file"),
        ("train --data text.txt --tokenizer text.txt", "tokenizer text.txt is damaged or of another kind"),
        ("train --data text.txt --model.vocabulary 256", "--model.vocabulary 256 is too small"),
        ("train --data text.txt --run-dir text.txt", "--run-dir text.txt"),
        ("train --data text.txt --run-dir text.txt/run", "--run-dir text.txt/run"),
        ("eval", "--run-dir runs/tiny-hope holds no run"),
        ("eval --run-dir nowhere", "--run-dir nowhere holds no run: make one"),
        ("eval --run-dir cache", "cache holds files and no run"),
        ("eval --eval-bytes 0", "--eval-bytes 0"),
        ("generate --run-dir nowhere", "--run-dir nowhere holds no run"),
        ("generate --tokens 0", "--tokens 0"),
        ("generate --temperature -1", "--temperature"),
        ("generate --promt x", r"unknown flag --promt \(did you mean --prompt\?\)"),
        ("generate --prompt -x", "give a value that starts with - as --prompt=-x"),
        ("generate --learner no/l", "--learner no/l: there is no folder no; make it"),
        ("generate --learner l --samples 2", "--learner l writes one text on one device: leave out --samples"),
        ("generate --learner l --mesh data=2", "leave out --mesh"),
        ("generate --learn-from prompt", "--learn-from prompt is of a learner: give --learner FILE too"),
        ("generate --stop ''", "--stop '': give a text of one character or more"),
        ("generate --run-dir ''", "--run-dir '': give the path of a folder$"),
        ("eval --run-dir ''", "--run-dir '': give the path of a folder$"),
        ("train --run-dir ''", "--run-dir '': give the path of a folder$"),
        ("train --init-from nowhere", "--init-from nowhere holds no run: give"),
        ("train --config nowhere.json", "--config nowhere.json: No such file"),
        ("train --config text.txt", "--config text.txt is no JSON"),
        ("train --config /dev/zero", "--config /dev/zero is larger than 1,048,576 bytes: give a smaller JSON file"),
        ("train --config ''", "--config '': give the path of a JSON file or None"),
        (
            "describe --model.width 1000000000000",
            "--preset tiny-hope and --model flags: sizes that no model has; give smaller",
        ),
        ("train --config odd.json", "--config odd.json: field model.widht is missing or unknown"),
        ("train --max-loss-rise 0", "--max-loss-rise 0.0: give a number above 0$"),
        ("train --data text.txt --compilation-cache text.txt", "--compilation-cache text.txt cannot be written to"),
        ("describe --figure nowhere/a.png", "--figure nowhere/a.png: there is no folder nowhere; make it"),
        ("describe --figure ''", "--figure '' names no file"),
        ("generate --top-p 0", "--top-p 0.0: give a finite number above 0 and at most 1$"),
    ],
)
def test_bad_input_is_one_line(place, say, line, named):
    Path("cache").mkdir(exist_ok=True)
    Path("cache", "file").touch()
    Path("odd.json").write_text('{"model": {"widht": 3}}')
    code, out, err = say(line)
    assert code == 2 and out == []
    assert len(err) == 1 and err[0].startswith("nested-jax: ")
    assert re.search(named, err[0]), err[0]
    assert not Path("runs").exists() and not Path("nowhere").exists()


def test_help_has_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for name, _ in flatten(TrainConfig()):
        assert flag(name) in said
    assert ">>>" not in said
    for command, kind in (("eval", flags.Evaluation), ("generate", flags.Generation)):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert all(flag(f.name) in said for f in dataclasses.fields(kind))


def test_versions(say):
    code, (line,), err = say("--version")
    assert (code, err) == (0, []) and re.match(r"nested-jax \S+, jax \S+, Python 3", line)


def test_a_file_and_a_run_give_the_defaults(place):
    """The run in the folder, or that of --init-from; over it --config, over all the flags."""
    read = lambda line: parsing.parse(parsing.training(line.split()), "train", line.split()).run
    mine = TrainConfig.from_preset("tiny-transformer", run_dir="a", steps=7, batch_size=6)
    Path("a").mkdir()
    write_config(Path("a"), mine, "")
    assert read("--run-dir a") == read("--run-dir a --preset tiny-transformer") == mine
    assert read("--run-dir a --seed 3") == dataclasses.replace(mine, seed=3)
    assert read("--run-dir a --fresh") == TrainConfig(run_dir="a", fresh=True)
    assert read("--init-from a") == dataclasses.replace(mine, run_dir="runs/tiny-transformer", init_from="a")
    Path("c.json").write_text('{"preset": "tiny-titans", "steps": 9, "model": {"width": 64}}')
    titans = TrainConfig.from_preset("tiny-titans")
    model = dataclasses.replace(titans.model, width=64)
    assert read("--config c.json --seed 3") == dataclasses.replace(titans, steps=9, seed=3, model=model)
    assert read("--config a/config.json --run-dir b") == dataclasses.replace(mine, run_dir="b")
    Path("a").rename("moved")
    assert read("--run-dir moved") == dataclasses.replace(mine, run_dir="moved")


def test_no_command_is_help(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("train", "eval", "generate"))


def test_a_preset_sets_the_other_defaults():
    read = lambda *words: parsing.parse(parsing.of_preset(words), "train", words)
    assert read() == TrainConfig()
    assert read("--preset", "tiny-transformer", "--steps", "3") == TrainConfig.from_preset("tiny-transformer", steps=3)
    config = read("--model.width", "64", "--preset=tiny-transformer")
    assert config.model == dataclasses.replace(TrainConfig.from_preset("tiny-transformer").model, width=64)
    for words in (["--memory-policy", "sqrt"], ["--memory-policy=sqrt"], ["--model.memory-policy", "sqrt"]):
        assert read(*words).model == dataclasses.replace(TrainConfig().model, memory_policy="sqrt")


def test_train_resume_evaluate_generate(place, say, monkeypatch):
    command = f"train {SMALL} --data text.txt --run-dir a --steps"
    code, out, err = say(f"{command} 6")
    assert (code, err) == (0, []) and "a/report.md" in out[-1]
    code, out, _ = say(f"{command} 6")
    assert code == 0 and len(out) == 1 and "a is finished" in out[0]
    code, out, _ = say("train --run-dir a --steps 9")
    assert code == 0 and "from step 6" in out[0]
    code, out, err = say(f"{command} 9 --batch-size 2")
    assert code == 2 and len(err) == 1 and "--batch-size 4, not 2" in err[0]

    code, out, err = say("eval --run-dir a")
    assert (code, err) == (0, []) and "step 9" in out[0]
    (line,) = out[1:]
    assert f"**{line.removeprefix('  this model').strip()} bits per byte**" in Path("a/report.md").read_text()
    *counts, last = say("eval --run-dir a --data text.txt --eval-bytes 2000")[1][1:]
    assert last == line and [words.split()[2] for words in counts] == ["tokens", "pairs"]
    report = Path("a/report.md").read_text()
    assert all(f"| {words.split()[-1]} |" in report for words in counts), "the run's own"
    assert "on 900 held-out bytes of text.txt" in say("eval --run-dir a --eval-bytes 900")[1][0]
    Path("b.txt").write_text("Tyger Tyger, burning bright,\n\n" * 100)
    other = say("eval --run-dir a --data b.txt")[1]
    assert other[1:] != out[1:]
    code, out, err = say("train --init-from a --run-dir b --data b.txt --learning-rate 1e-4 --eval-every 100")
    assert (code, err) == (0, []) and "from the start with the weights of a;" in out[0]
    assert f"step 0/9  held-out {other[-1].split()[-1]} bits/byte" in "\n".join(out)
    code, _, err = say("train --init-from a --run-dir c --model.width 32")
    assert code == 2 and "--init-from a has --model.width 16, not 32" in err[0]

    code, out, err = say("generate --run-dir a --prompt Assertions --tokens 5")
    assert (code, err) == (0, []) and "\n".join(out).startswith("Assertions")
    written = lambda *words: say(shlex.join(["generate", "--run-dir", "a", *words]))[1]
    assert written("--tokens", "5") == written("--tokens", "5", "--seed", "0") != written("--tokens", "5", "--seed", "1")
    greedy = [written("--tokens", "5", "--temperature", "0", "--seed", seed, "--prompt", "q") for seed in "12"]
    assert greedy[0] == greedy[1]
    assert greedy[0][0][1:] != written("--tokens", "5", "--temperature", "0", "--prompt", "z")[0][1:]
    monkeypatch.setattr("sys.stdin", io.StringIO("q"))
    assert written("--tokens", "5", "--temperature", "0", "--prompt", "-") == greedy[0]
    monkeypatch.setattr("sys.stdin", None)  # closed by the caller
    no_input = "nested-jax: --prompt -: there is no standard input; give the text itself"
    assert say("generate --run-dir a --prompt -")[::2] == (2, [no_input])
    plain = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", plain)
        assert main(shlex.split("generate --run-dir a --prompt né --tokens 5 --temperature 0")) == 0
    plain.flush()
    assert plain.buffer.getvalue().startswith(b"n\\xe9")
    several = written("--tokens", "5", "--temperature", "0", "--samples", "2", "--seed", "4", "--prompt", "q")
    heads = [line for line in several if line.startswith("--- ")]
    assert heads == ["--- sample 1 of 2, seed 4", "--- sample 2 of 2, seed 5"]
    assert "\n".join(several).count("\n".join(greedy[0])) == 2

    stopped = written("--tokens", "5", "--temperature", "0", "--prompt", "q", "--stop", "\n".join(greedy[0])[3:])
    assert "\n".join(stopped) == "\n".join(greedy[0])[:3]
    learner = ("--learner", "it.learner", "--tokens", "5", "--temperature", "0")
    for prompt, read in (("q", "7"), ("z", "13")):  # the mark of a start, the prompt, what is written
        code, out, err = say(shlex.join(["generate", "--run-dir", "a", "--prompt", prompt, *learner]))
        assert code == 0 and err == [f"it.learner: {read} tokens read"]
    kept = Path("it.learner").read_bytes()
    code, out, err = say(shlex.join(["generate", "--run-dir", "b", *learner]))
    assert code == 2 and err == [
        "nested-jax: it.learner is of another model, or of other weights: give the model that it was saved with"
    ]
    assert Path("it.learner").read_bytes() == kept

    files = [f for f in Path("a/checkpoints/9/parameters").rglob("*") if f.is_file()]
    largest = max(files, key=lambda f: f.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    for line, told in (("eval --run-dir a", "step 8"), ("generate --run-dir a --prompt step --tokens 2", "step")):
        code, out, err = say(line)
        assert code == 0 and len(err) == 1 and "checkpoints/9 is damaged" in err[0] and told in out[0]
    code, out, err = say(f"{command} 9")
    assert (code, err) == (0, []) and "checkpoints/9 is damaged" in out[0] and "from step 8" in out[1]
    assert {path.name for path in Path("a/checkpoints").iterdir()} == {"8", "9", "9.damaged"}


def test_another_process_that_trained_meanwhile_keeps_its_run(place, say, monkeypatch):
    opened, inner = loop.open_source, []

    def slow(*arguments):
        monkeypatch.setattr(loop, "open_source", opened)
        inner.append(main(f"train {SMALL} --data text.txt --run-dir a --steps 6".split()))
        return opened(*arguments)

    monkeypatch.setattr(loop, "open_source", slow)
    code, _, err = say(f"train {SMALL} --data text.txt --run-dir a --steps 6 --seed 7")
    assert inner == [0] and code == 2 and "another process has trained in a" in err[0]
    assert say(f"train {SMALL} --data text.txt --run-dir a --steps 6")[1] == [
        "a is finished: give more --steps to go on with it, or --fresh to start over"
    ]


def test_a_signal_before_the_first_update_is_not_lost(place, say, monkeypatch):
    opened, before = (
        loop.open_source,
        signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a job in the background has none
    monkeypatch.setattr(loop, "open_source", lambda *arguments: os.kill(os.getpid(), signal.SIGINT) or opened(*arguments))
    code, _, err = say(f"train {SMALL} --data text.txt --run-dir a --steps 6")
    signal.signal(signal.SIGINT, before)
    assert code == 130 and len(err) == 1 and "stopped" in err[0]
    monkeypatch.setattr(loop, "open_source", opened)
    assert say(f"train {SMALL} --data text.txt --run-dir a --steps 6")[0] == 0


@pytest.mark.slow
def test_a_run_inside_its_own_text_resumes(place, say):
    for i in range(30):
        Path("folder", f"{i}.txt").write_text(f"Number {i} burns bright, in the forests of the night.\n" * 9)
    command = f"train {SMALL} --data folder --run-dir folder/runs/a --steps"
    assert say(f"{command} 1")[0] == 0
    bits = say("eval --run-dir folder/runs/a")[1][-1].split()[-1]
    assert f"**{bits} bits per byte**" in Path("folder/runs/a/report.md").read_text()
    inode = os.stat("folder/runs/a/tokenizer.model").st_ino
    assert say(f"{command} 6")[0] == 0
    assert os.stat("folder/runs/a/tokenizer.model").st_ino == inode  # not written again
    for split in ("train", "heldout"):
        file = Path("folder", f"{re.search(rb'[0-9]+', open_documents('folder', split)[0])[0].decode()}.txt")
        before = file.read_text()
        file.write_text("Tyger, tyger.\n" * 30)
        code, _, err = say(f"{command} 9")
        assert code == 2 and "the text of --data has changed" in err[0]
        file.write_text(before)
    assert say(f"{command} 9")[0] == 0


def test_damaged_pieces_of_a_run_are_named_and_nothing_is_lost(place, say):
    command = f"train {SMALL} --data text.txt --run-dir a --steps"
    Path("a").mkdir()
    Path("a/config.json.part").touch()  # what a start on a full disk leaves
    assert say(f"{command} 6")[0] == 0
    metrics, config = Path("a/metrics.jsonl"), Path("a/config.json")

    def refused(path, damage, named):
        whole = path.read_text()
        path.write_text(damage(whole))
        files = {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()}
        code, out, err = say(f"{command} 9")
        assert code == 2 and len(err) == 1 and re.search(named, err[0]), err
        assert {f: f.read_bytes() for f in Path("a").rglob("*") if f.is_file()} == files
        path.write_text(whole)

    for line in ("junk", "5", '{"a": 1}', '{"step": null}'):
        refused(
            metrics, lambda whole, line=line: whole.replace(whole.splitlines()[1], line), r"metrics.jsonl, line 2 is dam"
        )
    refused(
        config,
        lambda whole: whole.replace('"width": 16', '"width": "16"'),
        "config.json is damaged.*model.width '16': give a whole number",
    )
    refused(
        config,
        lambda whole: whole.replace('"attention"', '"junk"'),
        "config.json is damaged.*model.mixer 'junk': give one of",
    )
    refused(metrics, lambda whole: whole.split("\n", 1)[1], r"metrics.jsonl holds 5 of 6 rows before step 6: put it back")
    refused(metrics, lambda whole: "", "metrics.jsonl holds 0 of 6 rows before step 6: put it")
    Path("a/checkpoints").rename("elsewhere")
    code, _, err = say(f"{command} 9")
    assert code == 2 and "trained to step 6, and its checkpoints are gone" in err[0]
    assert len(metrics.read_text().splitlines()) == 7
    Path("elsewhere").rename("a/checkpoints")
    Path("a/checkpoints/7.orbax-checkpoint-tmp").mkdir()  # what a kill while saving leaves
    metrics.write_text(metrics.read_text() + '{"step": 7, "lo')  # cut short by a kill
    assert say(f"{command} 9")[0] == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(1, 7), 6, 7, 8, 9, 9]


def test_a_run_is_not_moved_from_under_the_working_directory(run_of_6, say, monkeypatch):
    monkeypatch.chdir("a")
    code, _, err = say(f"train {SMALL} --data ../text.txt --run-dir . --steps 6 --fresh")
    assert code == 2 and "holds the working directory" in err[0]


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(run_of_6, say, monkeypatch):
    command = f"train {SMALL} --data text.txt --run-dir a --steps 9 --checkpoint-every"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = max(Path("a", name).stat().st_size for name in ("metrics.jsonl", "config.json"))
    try:  # bytes of a file, in the place of room on the disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, before[1]))
        code, _, err = say(f"{command} 20")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and len(err) == 1
    assert re.fullmatch("nested-jax: .*File too large; what was saved before is kept", err[0]), err
    assert Path("a/checkpoints/6").is_dir()

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(orbax.checkpoint.AsyncCheckpointer, "save", full)
        code, _, err = say(f"{command} 8")
    assert code == 2 and len(err) == 1 and "checkpoints/8 cannot be written" in err[0] and "No space left" in err[0]
    assert say(f"{command} 8")[0] == 0
    steps = [row["step"] for row in map(json.loads, Path("a/metrics.jsonl").read_text().splitlines())]
    assert steps == [*range(1, 7), 6, 7, 8, 9, 9]


@pytest.fixture
def small_disk(place):
    """A function that makes the file system of the folder "disk" so many KiB large."""
    Path("disk").mkdir()
    mount = lambda *words: subprocess.run(["mount", *words, "tmpfs", "disk"], capture_output=True).returncode
    if not shutil.which("mount") or mount("-t", "tmpfs", "-o", "size=8m"):
        pytest.skip("a file system of its own cannot be mounted here")
    yield lambda size: mount("-o", f"remount,size={size}k")
    subprocess.run(["umount", "disk"], check=True)


def test_a_disk_that_is_full_is_one_line_and_what_was_saved_goes_on(run_of_6, small_disk, say, start):
    shutil.copytree("a", "disk/a")
    used = shutil.disk_usage("disk").used // 1024
    assert small_disk(used + 64) == 0  # a checkpoint takes more
    process = start("train", "--run-dir", "disk/a", "--steps", "9")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2 and len(err.splitlines()) == 1, err
    assert re.match("nested-jax: .*(No space left on device|RESOURCE_EXHAUSTED|ENOSPC)", err), err
    assert small_disk(used + 8192) == 0
    code, out, _ = say("train --run-dir disk/a --steps 9")
    assert code == 0 and "from step 6" in out[0]
    steps = [json.loads(line)["step"] for line in Path("disk/a/metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 7), 6, 7, 8, 9, 9]


def test_a_broken_run_stops_with_one_line(place, say):
    code, _, err = say(f"train {SMALL} --data text.txt --run-dir a --steps 20 --learning-rate 1e30")
    assert code == 1 and len(err) == 1
    assert re.match(r"nested-jax: step \d+, level .+: .+ is not finite.*; .*--learning-rate", err[0])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_resume(place, start, number, code):
    words = f"train {SMALL} --data text.txt --run-dir a --steps 100000 --checkpoint-every 100000".split()
    process = start(*words)
    wait_for_rows(process, "a", 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    stopped = re.fullmatch(r"nested-jax: stopped at step (\d+) of 100000, saved in a; resume with: (nested-jax .*)\n", err)
    assert stopped, err
    saved = Path("a/metrics.jsonl").read_text().splitlines()
    process = start(*shlex.split(stopped[2])[1:])
    wait_for_rows(process, "a", int(stopped[1]) + 1)
    assert Path("a/metrics.jsonl").read_text().splitlines()[: len(saved)] == saved
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code


STOPPED = "nested-jax: stopped; what was saved before is kept"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [False, True])
def test_a_run_on_a_terminal_stops_at_ctrl_c_and_where_the_terminal_is_lost(place, terminal, lost):
    rows = lambda: Path("a/metrics.jsonl").read_text().splitlines() if Path("a/metrics.jsonl").exists() else []
    run = terminal(*f"train {SMALL} --data text.txt --run-dir a --steps 100000 --checkpoint-every 100000".split())
    run.read(lambda: len(rows()) > 3)
    if lost:
        run.hang_up()
        assert run.process.wait(120) == 129
    else:
        before = run.said
        run.type("\x03")
        run.read(lambda: "again to stop now" in run.said)
        run.read(lambda: False)
        assert run.process.returncode == 130
        after = run.said.removeprefix(before)
        assert after.count("stopping after this step; again to stop now\r\n") == 1
        bar, line, rest = after.rsplit("\r\n", 2)
        last = re.search(r"step (\d+)/100000 .* left$", bar.rsplit("\r", 1)[-1])
        assert rest == "" and last and int(last[1]) == len(rows()), bar
        assert re.fullmatch(rf"(\x1b\[\?25h)?nested-jax: stopped at step {last[1]} of .*; resume with: nested-jax .*", line)
    saved = rows()
    again = terminal("train", "--run-dir", "a")
    again.read(lambda: len(rows()) > len(saved))
    assert f"from step {len(saved)};" in again.said and rows()[: len(saved)] == saved


@pytest.mark.parametrize("during", cases(["importing", "compiling"], ["importing"]))
def test_ctrl_c_on_a_terminal_before_the_first_update_is_one_line(place, terminal, during):
    run = terminal(*f"train {SMALL} --model.layers 3 --data text.txt --run-dir a --steps 6".split())
    run.read(lambda: catches(run.process, signal.SIGTERM) if during == "importing" else "compiling" in run.said)
    run.type("\x03")
    run.read(lambda: False)
    assert run.process.returncode == 130
    assert re.sub(r"\x1b\[[?0-9]*\w", "", run.said).split("^C")[1] == f"\r\n{STOPPED}\r\n", run.said
    assert ("compiling" in run.said) == (during == "compiling") and not Path("a/checkpoints").exists()


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGHUP, 1)])
@pytest.mark.parametrize("of", ["list", "write"])
def test_a_signal_inside_a_save_leaves_whole_checkpoints(place, say, number, of, times):
    """Before Orbax writes, or beside training before the list of files. After one the save goes on, at a second one the
    program ends."""
    script = f"""if True:
        import os, signal, sys
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        from nested_jax import __main__
        from nested_jax.train import checkpoint, stopping
        owner, name = dict(write=(checkpoint.ocp.AsyncCheckpointer, "save"), list=(checkpoint, "_list_files"))[{of!r}]
        inner = getattr(owner, name)

        def signalled(*arguments, **named):
            if any(str(x).endswith("4.part") for x in arguments):
                for i in range({times}):
                    os.kill(os.getpid(), {int(number)})
                    while stopping.Interruption.current or i == 1:  # a thread of the program answers it
                        pass
            return inner(*arguments, **named)

        setattr(owner, name, signalled)
        sys.exit(__main__.run())
    """
    command = f"train {SMALL} --data text.txt --steps 6 --run-dir"
    words = [sys.executable, "-c", script, *f"{command} a".split()]
    done = subprocess.run(words, env=_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == SIGNALS[number], done.stderr
    if times == 1:
        stopped = re.fullmatch(r"nested-jax: stopped at step ([4-6]) of .*\n", done.stderr)
        assert stopped and (of == "list" or stopped[1] == "4"), done.stderr
        last = int(stopped[1])
    else:
        assert done.stderr == f"{STOPPED}\n"
        last = 2
    assert Checkpoints(Path("a")).latest() == last
    code, out, err = say(f"{command} a")
    assert (code, err) == (0, []) and f"from step {last};" in out[0]
    assert {path.name for path in Path("a/checkpoints").iterdir()} == {"5" if last == 5 else "4", "6"}
    assert say(f"{command} straight")[0] == 0
    assert timeless("a") == timeless("straight")


def timeless(run_dir: str) -> str:
    """The rows of a run, without times."""
    return re.sub(r'"(seconds|tokens_per_second)": [^,}]*', "", Path(run_dir, "metrics.jsonl").read_text())


def catches(process: subprocess.Popen, number: int) -> int:
    """Whether a process catches a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(caught[1], 16) >> (number - 1) & 1


def test_a_signal_while_importing_is_one_line(start):
    process = start("train", "--help")
    while not catches(process, signal.SIGTERM):  # Python itself does not catch it: the program's first line has run
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (130, "", f"{STOPPED}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_answered_while_the_main_thread_cannot(number, code):
    """As while it compiles: here in one call of C, for an hour. In an `Interruption` the second signal ends it."""
    script = """if True:
        import hashlib, signal, sys
        from nested_jax.train.stopping import Interruption, watch
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has it ignore
        watch()
        with Interruption(lambda line: print(line, flush=True)):
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    """
    env = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, **PIPES)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "stopping after this step; again to stop now\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "", f"{STOPPED}\n")


def test_a_killed_run_resumes_to_the_same_rows(place, say, start):
    command = f"train {SMALL} --data text.txt --steps 40 --run-dir"
    process = start(*f"{command} killed".split())
    wait_for_rows(process, "killed", 7)
    process.kill()
    process.wait()
    assert say(f"{command} killed")[0] == say(f"{command} straight")[0] == 0
    assert timeless("straight") == timeless("killed")


def test_mistakes_and_help_are_quick_and_quiet(place, start):
    begun = time.monotonic()
    process = start("train", "--stpes", "3")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1
    assert time.monotonic() - begun < 30

"""Learners over ten million tokens, and many at once: `python experiments/learners/run.py` writes results/learners.*."""

from __future__ import annotations

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import finish, markdown, resume, save

from nested_jax import load, preset
from nested_jax.data import open_documents
from nested_jax.numerics import nats
from nested_jax.serve import Learners
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train
from nested_jax.train.trained import Trained

RESULTS = Path(__file__).parent / "results"
PIECE = 2**12  # tokens of one call
READ, WRITTEN = 2**9, 2**6  # tokens of each of the learners side by side


def trained(config: settings.Config) -> Trained:
    """The model, trained on bytes of the standard library; the one in the folder, if it has been."""
    hope = preset("tiny-hope")
    sizes = {"vocabulary": 2**8, "width": config.width, "layers": config.layers, "heads": 2}
    hope = dataclasses.replace(hope, **sizes, cms=dataclasses.replace(hope.cms, hidden=(2 * config.width,) * 3))
    folder, choices = Path(config.run_dir) / "model", {"steps": config.steps, "seed": config.seed, "reading_documents": 0}
    train(TrainConfig.from_preset("tiny-hope", tokenizer="bytes", model=hope, run_dir=str(folder), **choices))
    return load(folder)


def streams(config: settings.Config) -> dict[str, Callable[[int, int], np.ndarray]]:
    """Tokens from one position to another of each stream; the text is the training documents, again and again."""
    text = np.frombuffer(b"\0".join(open_documents("stdlib", "train")), np.uint8)
    repeated = lambda piece: lambda start, end: piece[np.arange(start, end) % len(piece)]
    pieces = np.frombuffer(b"a", np.uint8), np.frombuffer(b"ab", np.uint8)
    noise = lambda start, end: np.random.default_rng((config.seed, start)).integers(256, size=end - start)
    return dict(zip(settings.STREAMS, (repeated(text), *map(repeated, pieces), noise), strict=True))


def read_on(config: settings.Config, path: Path, results: dict[str, Any], model: Trained) -> None:
    """Lets a learner of each stream read to the end, all in one call, and goes on where the results end."""
    learners, given = Learners(model, len(settings.STREAMS)), streams(config)
    file = lambda stream, tokens: Path(config.run_dir) / f"{stream.replace(' ', '-')}-{tokens}.safetensors"
    done = max((row["tokens"] for row in results["runs"] if "stream" in row), default=0)
    if done:
        for learner, stream in zip(learners, given, strict=True):
            learner.load(file(stream, done))
    else:
        learners.read({i: np.zeros(2 * PIECE, np.int32) for i in range(len(given))})  # compiles
        for learner in learners:
            learner.reset()
    while done < config.tokens:
        bits, started = np.zeros(len(given)), time.monotonic()
        for start in range(done, done + config.every, PIECE):
            tokens = np.stack([part(start, start + PIECE) for part in given.values()])
            first = np.stack([learner.logits for learner in learners])
            logits = [found for _, found in sorted(learners.read(dict(enumerate(tokens))).items())]
            bits += np.asarray(_bits(first, np.stack(logits), tokens))
        seconds, before, done = time.monotonic() - started, done, done + config.every
        for i, (learner, stream) in enumerate(zip(learners, given, strict=True)):
            learner.save(file(stream, done))
            row = {"stream": stream, "tokens": done, "bits": bits[i] / config.every, "held": learner.held}
            size = {"file_bytes": file(stream, done).stat().st_size, "peak_bytes": _peak()}
            results["runs"].append(row | {"ms_per_token": 1000 * seconds / config.every / len(given)} | size)
        save(path, results)
        print({"tokens": done, "bits": (bits / config.every).round(3).tolist(), "seconds": round(seconds, 1)}, flush=True)
        for stream in given:
            file(stream, before).unlink(missing_ok=True)


@jax.jit
def _bits(first: jax.Array, logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Bits of the tokens (N, t) of each stream, by the logits before (N, V) and after each (N, t, V)."""
    before = jnp.concatenate([first[:, None], logits[:, :-1]], axis=1)
    return nats(before, tokens).sum(axis=1) / np.log(2)


def _peak() -> int:
    """Resident memory of the process at its largest, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def serve(config: settings.Config, path: Path, results: dict[str, Any], model: Trained) -> None:
    """Times learners side by side, each reading a text of its own and then writing on."""
    text = streams(config)["text"]
    for number in config.served:
        if any(row.get("learners") == number for row in results["runs"]):
            continue
        learners, prompts = Learners(model, number), {i: [ord(" ")] for i in range(number)}
        texts = {i: text(READ * i, READ * (i + 1)) for i in range(number)}
        row = {"learners": number, "tokens_read_a_second": READ * number / _seconds(lambda: learners.read(texts))}  # noqa: B023
        write = lambda: list(learners.generate(prompts, tokens=WRITTEN))  # noqa: B023
        row["tokens_written_a_second"] = WRITTEN * number / _seconds(write)
        results["runs"].append(row)
        save(path, results)
        print(row, flush=True)


def _seconds(call: Callable[[], object]) -> float:
    """The median of three calls, after one that compiles."""
    times = []
    for _ in range(4):
        started = time.monotonic()
        call()
        times.append(time.monotonic() - started)
    return float(np.median(times[1:]))


def table(results: dict[str, Any]) -> str:
    """Markdown: each stream after one part, half of them and all; learners side by side."""
    cells = []
    for stream in settings.STREAMS:
        rows = [row for row in results["runs"] if row.get("stream") == stream]
        for row in [rows[i] for i in sorted({0, min(1, len(rows) - 1), len(rows) // 2, len(rows) - 1})]:
            held = [f"{norm:.3g}" for norm in row["held"].values()]
            sizes = [f"{row['file_bytes'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"]
            cells.append([stream, f"{row['tokens']:,}", f"{row['bits']:.3f}", f"{row['ms_per_token']:.3f}", *held, *sizes])
    held = next((row["held"] for row in results["runs"] if "held" in row), {})
    heads = (
        "stream",
        "tokens",
        "bits a token",
        "ms a token",
        *(f"{name} holds" for name in held),
        "file, MB",
        "process, GB",
    )
    served = [row for row in results["runs"] if "learners" in row]
    rows = [
        [str(row["learners"])] + [f"{row[f'tokens_{did}_a_second']:,.0f}" for did in ("read", "written")] for row in served
    ]
    side_by_side = markdown(("learners", "tokens read a second, of all", "tokens written a second, of all"), rows)
    read = [row for row in results["runs"] if row.get("stream") == "text"]
    tenths = ", ".join(f"{np.mean([row['bits'] for row in part]):.3f}" for part in np.array_split(read, 10) if len(part))
    median = np.median([row["ms_per_token"] for row in read])
    note = f"A token takes {median:.3f} ms, median of all parts; bits of the text by tenths: {tenths}."
    return "\n".join([*markdown(heads, cells), "", note, "", *side_by_side]) + "\n"


def figure(results: dict[str, Any]) -> Figure:
    """Latency, memory of the process, and what each level holds, against the position."""
    fig, panels = plt.subplots(1, 4, figsize=(13, 2.8), layout="constrained")
    rows = {stream: [row for row in results["runs"] if row.get("stream") == stream] for stream in settings.STREAMS}
    for stream, of in rows.items():
        x = [row["tokens"] / 1e6 for row in of]
        panels[0].plot(x, [row["ms_per_token"] for row in of], color="C0", linewidth=1)
        panels[1].plot(x, [row["peak_bytes"] / 1e9 for row in of], color="C0", linewidth=1)
        for axes, part in zip(panels[2:], ("sequence", "CMS"), strict=True):
            norms = [sum(norm**2 for name, norm in row["held"].items() if name.startswith(part)) ** 0.5 for row in of]
            axes.plot(x, norms, label=stream, linewidth=1)
    titles = ("ms a token", "process at its largest, GB", "memories: distance from start", "CMS: distance from start")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="million tokens read", ylim=(0, None))
    panels[3].legend(fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = RESULTS / "learners"
    results = resume(path, config)
    model = trained(config)
    read_on(config, path, results, model)
    serve(config, path, results, model)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)

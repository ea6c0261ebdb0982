"""A model that reads one language after another: `python experiments/continual/reading.py --data FOLDER` writes
results/reading.*."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.console import Console

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Rates, Seed, Seeds
from record import Runs, each_once, finish, markdown, resume, rows_of, spread

from nested_jax import ModelConfig, load, preset
from nested_jax.checks import Count
from nested_jax.errors import UserError
from nested_jax.models.language_model import init_state, target_nats
from nested_jax.serve import Learner
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train
from nested_jax.train.trained import Trained

RESULTS = Path(__file__).parent / "results"
HELD, STEP = 2**13, 512  # bytes that a language is judged by; of an update of Adam


class Method(NamedTuple):
    """How a model goes on after its first language."""

    periods: tuple[int, ...] | None = None
    """Of the levels of Hope's CMS that learn while it reads; None: a Transformer that Adam trains on."""
    learn: bool = True
    """Whether the CMS learns while it reads."""
    sleep: bool = False
    """Whether what the faster levels hold is distilled into the slowest one after each language."""


PERIODS = ((64,), (256, 64), (1024, 256, 64))
METHODS = {
    "Transformer, trained on": Method(),
    "Hope, CMS not learning": Method(PERIODS[1], learn=False),
    **{f"Hope, {len(periods)} levels": Method(periods) for periods in PERIODS},
    **{f"Hope, {len(periods)} levels, consolidated": Method(periods, sleep=True) for periods in PERIODS[1:]},
}


@dataclass(frozen=True)
class Config(Runs):
    """A model trained on the first language of a folder, which then meets the others one after the other."""

    data: str = "data"
    """Folder with a folder languages of files NAME.txt, as texts.py writes them."""
    first: str = "en-US"
    """The language that models are trained on before."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of `METHODS`."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters, of the order of the text and of the order of the languages."""
    tuning_seed: Seed = 100
    """Seed of the Transformer's tries."""
    rates: Rates = (1e-4, 3e-4, 1e-3, 3e-3)
    """Learning rates that the Transformer tries; those of Hope's levels are learned."""
    steps: Count = 400
    """Updates of 2,048 bytes on the first language."""
    read: Count = 2**16
    """Bytes of every other language."""
    width: Count = 64
    """Width of the models."""

    def __post_init__(self):
        flags.check(self, "methods", "seeds", "rates")
        flags.check_known(self, "methods", METHODS)
        flags.check_tuning(self)
        if not (Path(self.data) / "languages" / f"{self.first}.txt").is_file():
            raise UserError(f"--data {self.data}: there is no languages/{self.first}.txt: give the folder that has it")


def model_of(method: Method, width: int) -> ModelConfig:
    """A Hope of two blocks, the last of which has a frozen level and those that learn; or a Transformer of its size."""
    sizes = {"vocabulary": 2**8, "width": width, "layers": 2, "heads": 2}
    if method.periods is None:
        transformer = preset("tiny-transformer")
        cms = dataclasses.replace(transformer.cms, hidden=(9 * width // 4,))
        return dataclasses.replace(transformer, **sizes, cms=cms)
    hope, levels = preset("tiny-hope"), len(method.periods) + 1
    cms = dataclasses.replace(hope.cms, hidden=(3 * width // levels,) * levels, periods=method.periods)
    return dataclasses.replace(hope, **sizes, cms=cms)


def languages(config: Config, seed: int) -> dict[str, np.ndarray]:
    """Bytes of each language, the first one first, the others in an order that the seed draws."""
    paths = sorted((Path(config.data) / "languages").glob("*.txt"), key=lambda path: path.stem)
    others = [path for path in paths if path.stem != config.first]
    order = [Path(config.data) / "languages" / f"{config.first}.txt", *np.random.default_rng(seed).permutation(others)]
    texts = {path.stem: np.frombuffer(path.read_bytes(), np.uint8).astype(np.int32) for path in order}
    for name, text in texts.items():
        if len(text) < config.read + HELD:
            raise UserError(f"{name}.txt has {len(text)} bytes: give {config.read + HELD} or more, or a smaller --read")
    return texts


def trained(config: Config, method: Method, seed: int, text: np.ndarray, folder: Path) -> Trained:
    """Trained on the first language but for its end, in windows of 2,048 bytes."""
    data = folder / "text.txt"
    data.write_bytes(text[:-HELD].astype(np.uint8).tobytes())
    none = dict.fromkeys(("eval_every", "reading_documents", "sample_tokens"), 0)
    sizes = {"window": 2048, "batch_size": 1, "steps": config.steps, "eval_bytes": 1000}
    run = {"model": model_of(method, config.width), "tokenizer": "bytes", "data": str(data), "run_dir": str(folder / "run")}
    train(TrainConfig.from_preset("tiny-hope", **run, **sizes, **none, seed=seed), Console(quiet=True))
    return load(folder / "run")


def run(config: Config, cells: list[dict]) -> list[dict]:
    """scores (languages + 1, languages): bits per byte, negative, before and after each language; their order."""
    rows = []
    for cell in cells:
        method, texts = METHODS[cell["method"]], languages(config, cell["seed"])
        first, *others = texts.values()
        with tempfile.TemporaryDirectory() as folder:
            model = trained(config, method, cell["seed"], first, Path(folder))
        by_adam = lambda: _by_adam(model, cell["rate"], others, config.read)  # noqa: B023
        states = _by_reading(model, method, others, config.read) if method.periods else by_adam()
        judged = [text[-HELD:] for text in texts.values()]
        scores = [[-bits(text) for text in judged] for bits in states]
        rows.append({"order": [*texts], "scores": np.round(scores, 5).tolist(), "device": jax.devices()[0].device_kind})
    return rows


Bits = Callable[[np.ndarray], float]


def _by_reading(model: Trained, method: Method, texts: list[np.ndarray], read: int) -> Iterator[Bits]:
    """A learner's bits per byte of a text that a copy reads without learning: before the texts, and after each."""
    learner = Learner(model)

    def bits(text: np.ndarray) -> float:
        logits = learner.copy().read(text, learn=False)
        return float(optax.softmax_cross_entropy_with_integer_labels(logits[:-1], text[1:]).mean() / np.log(2))

    yield bits
    for i, text in enumerate(texts):
        learner.read(text[:read], learn=method.learn)
        if method.sleep:
            learner.consolidate(learner.levels[0], seed=i)
        yield bits


def _by_adam(model: Trained, rate: float, texts: list[np.ndarray], read: int) -> Iterator[Bits]:
    """The same of a model that takes a step of Adam for every window of a text."""
    config, adam, params = model.config.model, optax.adam(rate), model.params

    @jax.jit
    def nats(params, text):
        start = init_state(config, params, 1, max_length=STEP)
        return target_nats(config, params, text[None, :-1], text[None, 1:], start, multiple=STEP)[0].mean()

    @jax.jit
    def update(params, state, text):
        updates, state = adam.update(jax.grad(nats)(params, text), state, params)
        return optax.apply_updates(params, updates), state

    windows = lambda text: [text[i : i + STEP + 1] for i in range(0, len(text) - STEP, STEP)]
    bits = lambda text: float(np.mean([nats(params, window) for window in windows(text)]) / np.log(2))
    yield bits
    state = adam.init(params)
    for text in texts:
        for window in windows(text[: read + 1]):
            params, state = update(params, state, window)
        yield bits


def measure(path: Path, config: Config, results: dict) -> dict:
    """The Transformer's tries on the tuning seed, then all seeds."""
    make = lambda cells: each_once(path, results, partial(run, config), cells, itemgetter("method"), config)
    tried = [name for name in config.methods if METHODS[name].periods is None]
    make({"method": name, "rate": rate, "seed": config.tuning_seed} for name in tried for rate in config.rates)
    make({"method": name, "rate": rate_of(results, name), "seed": seed} for seed in config.seeds for name in config.methods)
    return results


def rate_of(results: dict, name: str) -> float:
    """The Transformer's with the best final score on the tuning seed; 0 of Hope."""
    if METHODS[name].periods:
        return 0.0
    tries = rows_of(results, method=name, seed=results["config"]["tuning_seed"])
    return max(tries, key=lambda row: np.mean(row["scores"][-1]))["rate"]


def on_seeds(results: dict, name: str) -> list[np.ndarray]:
    """Scores (languages, languages) of each seed: before the others, and after each of them."""
    rows = rows_of(results, method=name, rate=rate_of(results, name))
    return [np.array(row["scores"]) for row in rows if row["seed"] in results["config"]["seeds"]]


def table(results: dict) -> str:
    """Markdown: bits per byte of the first language and of the others."""
    cells = []
    for name in results["config"]["methods"]:
        if found := on_seeds(results, name):
            own = lambda scores: np.diag(scores[:, 1:], -1)
            numbers = [
                [-scores[0, 0] for scores in found],
                [-scores[-1, 0] for scores in found],
                [-scores[0, 1:].mean() for scores in found],
                [-own(scores).mean() for scores in found],
                [-scores[-1, 1:-1].mean() for scores in found],
                [(own(scores) - scores[-1, 1:])[:-1].mean() for scores in found],
            ]
            rate = rate_of(results, name)
            cells.append([name, f"{rate:g}" if rate else "learned", *(spread(values) for values in numbers)])
    heads = (
        "method",
        "rate",
        "the first language",
        "at the end",
        "others, before",
        "just read",
        "at the end",
        "forgotten of them",
    )
    seeds = ", ".join(map(str, results["config"]["seeds"]))
    note = f"Bits per byte. Seeds {seeds}: mean ± standard deviation. The last language read is in no column of the end."
    return "\n".join([*markdown(heads, cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """The first language, and the mean of the others that have been read, after each language."""
    fig, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, name in enumerate(results["config"]["methods"]):
        if found := on_seeds(results, name):
            scores = -np.mean(found, axis=0)
            panels[0].plot(scores[:, 0], "o-", markersize=3, color=f"C{i}", label=name)
            so_far = [scores[n, 1 : n + 1].mean() for n in range(1, len(scores))]
            panels[1].plot(range(1, len(scores)), so_far, "o-", markersize=3, color=f"C{i}")
    panels[0].set(title="the first language", xlabel="other languages met", ylabel="bits per byte")
    panels[1].set(title="those met so far, without the first", xlabel="other languages met")
    fig.legend(loc="outside right upper", fontsize=8, frameon=False)
    return fig


def main() -> None:
    config = flags.parse(Config)
    path = config.path(RESULTS / "reading")
    results = resume(path, config)
    if not config.report:
        measure(path, config, results)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)

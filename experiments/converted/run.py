"""Pretrained Transformers as Hope: `python experiments/converted/run.py --source GGUF` writes results/converted.*."""

from __future__ import annotations

import sys
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import config as settings
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import each_once, finish, markdown, resume, rows_of

from nested_jax.data import Tokenizer, open_documents, pretrained
from nested_jax.errors import UserError
from nested_jax.models import reference
from nested_jax.models.convert import Llama, convert, read_llama
from nested_jax.models.language_model import apply, init_state, target_nats
from nested_jax.train.sample import sample
from nested_jax.typing import PyTree

RESULTS = Path(__file__).parent / "results"
PARTS = 8  # of a document
PROMPTS = ("The capital of France is", "Two plus two is", "Once upon a time, there was a")


def opened(path: str) -> tuple[Llama, Tokenizer]:
    """The source model and its tokenizer."""
    if not path:
        raise UserError("--source: give a GGUF file, or a folder with safetensors and tokenizer.json")
    source = read_llama(path)
    return source, pretrained.of_gguf(source.about) if Path(path).is_file() else pretrained.of_folder(Path(path))


def texts(config: settings.Config, tokenizer: Tokenizer, split: str) -> list[np.ndarray]:
    """The first documents (tokens + 1,) of a split that are as long."""
    number = config.tuning if split == "train" else config.documents
    cut = (tokenizer.encode(text)[: config.tokens + 1] for text in open_documents(config.text, split))
    found = list(islice((ids for ids in cut if len(ids) > config.tokens), number))
    if len(found) < number:
        have = f"--text {config.text} has {len(found)} documents of {config.tokens:,} tokens to {split}"
        raise UserError(f"{have}, not {number}: give fewer --documents or --tuning")
    return found


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """A form at several rates: bits and bytes of the parts of each document."""
    source, tokenizer = opened(config.source)
    documents = texts(config, tokenizer, cells[0]["split"])
    model, weights = convert(source, **settings.FORMS[cells[0]["form"]])
    parts = lambda each: each.reshape(PARTS, -1).sum(1).tolist()

    @jax.jit
    def read(weights, ids):
        state = init_state(model, weights, 1, max_length=config.tokens)
        return target_nats(model, weights, ids[None, :-1], ids[None, 1:], state, multiple=config.tokens)[0][0]

    rows = []
    for cell in cells:
        own = with_rate(weights, cell["rate"])
        bits = [parts(np.asarray(read(own, ids), float) / np.log(2)) for ids in documents]
        rows.append({"bits": bits, "bytes": [parts(tokenizer.byte_lengths[ids[1:]]) for ids in documents]})
    return rows


def with_rate(weights: PyTree, rate: float) -> PyTree:
    """The weights with all inner learning rates at this one."""
    last = lambda path: getattr(path[-1], "key", None) == "rate"
    put = lambda path, leaf: jnp.full_like(leaf, rate) if last(path) else leaf
    return jax.tree_util.tree_map_with_path(put, weights)


def faithful(config: settings.Config) -> dict[str, Any]:
    """With rates of 0: what each form writes, and how far its logits are from those of an independent forward pass."""
    source, tokenizer = opened(config.source)
    ids = tokenizer.encode(PROMPTS[0])
    expected, rows = reference.llama(source, ids), {}
    for form in config.forms:
        model, weights = convert(source, **settings.FORMS[form])
        logits = jax.jit(lambda weights: apply(model, weights, ids[None], init_state(model, weights, 1))[0][0])(weights)  # noqa: B023
        write = partial(sample, model, weights, tokenizer, tokens=6, temperature=0.0)
        said = [tokenizer.decode(list(write(prompt))) for prompt in PROMPTS]
        rows[form] = {"difference": float(np.abs(np.asarray(logits) - expected).max()), "completions": said}
    return rows | {"largest logit": float(np.abs(expected).max())}


def second_half(row: dict) -> np.ndarray:
    """Bits per byte of each document's second half."""
    bits, size = (np.array(row[name], float)[:, PARTS // 2 :].sum(1) for name in ("bits", "bytes"))
    return bits / size


def chosen(results: dict) -> dict[str, float]:
    """The rate of each form that is best on the tuning documents; of the frozen one 0."""
    found = {settings.FROZEN: 0.0}
    for form in results["config"]["forms"]:
        tries = [row for row in rows_of(results, form=form, split="train") if np.isfinite(second_half(row)).all()]
        if tries and form != settings.FROZEN:
            found[form] = min(tries, key=lambda row: second_half(row).mean())["rate"]
    return found


def best(results: dict) -> dict[str, float]:
    """The frozen form, and of those that learn the best on the tuning documents, with their rates."""
    rates = chosen(results)
    on_tuning = lambda form: second_half(rows_of(results, form=form, rate=rates[form], split="train")[0]).mean()
    if not (learned := rates.keys() - {settings.FROZEN}):
        raise UserError("there is no form that learns with finite readings of the tuning documents: make some")
    form = min(learned, key=on_tuning)
    return {settings.FROZEN: 0.0, form: rates[form]}


def measure(path: Path, config: settings.Config, results: dict) -> dict:
    """What rates of 0 write, the tries of every form and rate, then the held-out documents by the best of all and frozen."""
    make = partial(each_once, path, results, partial(run, config), kind=itemgetter("form", "split"), config=config)
    learning = [form for form in config.forms if form != settings.FROZEN]
    tried = [{"form": form, "rate": rate, "split": "train"} for form in learning for rate in config.rates]
    make(choices=[{"form": settings.FROZEN, "rate": 0.0, "split": "train"}, *tried])
    if config.report:
        return results
    make(choices=[{"form": form, "rate": rate, "split": "heldout"} for form, rate in best(results).items()])
    if "faithful" not in results:
        results["faithful"] = faithful(config)
    return results


def interval(values: np.ndarray) -> str:
    """Mean and its 95 % confidence interval, by Student's t.

    >>> interval(np.array([1.0, 2.0, 3.0]))
    '+2.000 (-0.484 to +4.484)'
    """
    if len(values) == 1:
        return f"{values[0]:+.3f}"
    mean, far = values.mean(), stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:+.3f} ({mean - far:+.3f} to {mean + far:+.3f})"


def table(results: dict) -> str:
    """Markdown: bits per byte of second halves, and how many more than frozen, document by document."""
    rates, cells = chosen(results), []
    for form in results["config"]["forms"]:
        line = [form, f"{rates[form]:g}" if form in rates else ""]
        for split in ("train", "heldout"):
            found = {row["rate"]: second_half(row) for row in rows_of(results, form=form, split=split)}
            base = [second_half(row) for row in rows_of(results, form=settings.FROZEN, split=split)]
            own = found.get(rates.get(form))
            line.append("" if own is None else f"{own.mean():.3f}")
            line.append("" if own is None or not base or form == settings.FROZEN else interval(own - base[0]))
        lower = [second_half(row) for row in rows_of(results, form=form, rate=rates.get(form), split="heldout")]
        base = [second_half(row) for row in rows_of(results, form=settings.FROZEN, split="heldout")]
        line.append(f"{(lower[0] < base[0]).sum()} of {len(lower[0])}" if lower and base and form != settings.FROZEN else "")
        cells.append(line)
    heads = ("form", "rate", "tuning", "more than frozen (95 %)", "held out", "more than frozen (95 %)", "documents lower")
    lines = [*markdown(heads, cells), "", "Bits per byte of the second half of each document.", ""]
    for form, row in results.get("faithful", {}).items():
        if isinstance(row, dict):
            lines.append(f"- {form}, rate 0: logits within {row['difference']:.1e}; writes {row['completions']}")
    return "\n".join(lines) + "\n"


def figure(results: dict) -> Figure:
    """Bits per byte more than the frozen model's by the place in held-out documents: means and their standard errors."""
    fig, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    per_byte = lambda row: np.array(row["bits"], float) / np.array(row["bytes"], float)
    base = [per_byte(row) for row in rows_of(results, form=settings.FROZEN, split="heldout")]
    size = results["config"]["tokens"] // PARTS
    for form, rate in chosen(results).items():
        for row in rows_of(results, form=form, rate=rate, split="heldout"):
            if base and form != settings.FROZEN:
                more = per_byte(row) - base[0]
                spread = stats.sem(more, axis=0)
                at, label = size * (np.arange(PARTS) + 0.5), f"{form}, {rate:g}"
                axes.errorbar(at, more.mean(0), spread, fmt="o-", capsize=2, label=label)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="tokens read", ylabel="bits per byte more than frozen")
    axes.legend(frameon=False, fontsize=8)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "converted")
    results = measure(path, config, resume(path, config))
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)

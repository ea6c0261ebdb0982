"""What training steps take on TPUs: `python experiments/pods/run.py` compiles them and writes results/pods.*."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from functools import partial
from operator import itemgetter
from pathlib import Path

import config as settings
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from record import each_once, finish, markdown, resume, rows_of

from nested_jax import preset
from nested_jax.parallel import hlo
from nested_jax.parallel.plan import plan
from nested_jax.train.config import TrainConfig

RESULTS = Path(__file__).parent / "results"


def run(config: settings.Config, cells: list[dict]) -> list[dict]:
    """What the compiler says of each job."""
    return [compiled(settings.JOBS[cell["row"]]) for cell in cells]


def compiled(job: settings.Job) -> dict:
    """A job's plan in numbers: bytes, operations, milliseconds."""
    started = time.monotonic()
    model = preset(job.preset)
    model = dataclasses.replace(model, **job.model, memory_policy=job.policy, cms=dataclasses.replace(model.cms, **job.cms))
    sizes = {"batch_size": job.rows, "window": job.window, "accumulate": job.pieces, "mesh": job.mesh}
    made = plan(TrainConfig.from_preset(job.preset, model=model, **sizes), job.topology)
    devices = math.prod(made.shape)
    row = {"fits": made.fits, "excess": made.excess, "arguments": made.arguments, "temporaries": made.temporaries}
    row |= {
        "host": made.host,
        "flops": made.flops // devices,
        "traffic": made.traffic,
        "tokens": job.rows * job.window // devices,
    }
    row |= {"milliseconds": {name: 1e3 * value for name, value in made.seconds.items()}}
    row |= {"kernels": [[*kernel, 1e3 * kernel.cycles / made.chip.clock] for kernel in made.kernels]}
    row |= {"loops": [[runs, 1e3 * cycles / made.chip.clock] for runs, cycles in made.cycles[:6]]}
    row |= {"costly": [[name, runs, 1e3 * cycles / made.chip.clock] for name, runs, cycles in made.costly]}
    row |= {"collectives": [[kind, list(axes), runs, sent] for kind, axes, runs, sent in hlo.by_kind(made.collectives)]}
    row |= {"kept": [[turns, laid.shape, laid.padded * n, n] for turns, laid, n in made.kept[:4]]}
    return row | {"seconds": round(time.monotonic() - started, 1)}


def table(results: dict) -> str:
    """Markdown: a row for each job."""
    cells = []
    for name in results["config"]["rows"]:
        for row in rows_of(results, row=name):
            gb, ms = lambda n: f"{n / 1e9:,.2f}", {name: n for name, n in row["milliseconds"].items() if "tiles" not in name}
            bound = max(ms, key=ms.__getitem__)
            memory = [
                gb(row["arguments"]),
                gb(row["temporaries"]),
                "yes" if row["fits"] else f"no: {row['excess'] or 'more'}",
            ]
            if row["excess"]:
                cells.append([name, *memory, f"{row['flops'] / 1e12:,.2f}", *[""] * 7])
                continue
            inner = sum(each for runs, each in row["loops"] if runs > 1)
            sent = sum(sent for *_, sent in row["collectives"])
            used = 100 * next(iter(ms.values())) / ms[bound]
            speed = 1e3 * row["tokens"] / ms[bound]
            times = [f"{value:,.1f}" for value in ms.values()]
            cells.append(
                [
                    name,
                    *memory,
                    f"{row['flops'] / 1e12:,.2f}",
                    gb(row["traffic"]),
                    gb(sent),
                    " / ".join(times),
                    f"{inner:,.1f}",
                    f"{sum(kernel[-1] for kernel in row['kernels']):,.1f}" if "kernels" in row else "not counted",
                ]
                + [f"{used:.1f}", f"{speed:,.0f}"]
            )
    heads = ("step", "state, GB", "temporaries, GB", "fits", "TFLOP", "HBM, GB", "sent, GB")
    heads += (
        "least ms by products / HBM / links / cycles",
        "cycles in loops, ms",
        "kernels, ms",
        "at most % of products",
        "tokens/s, at most",
    )
    note = "Of one device. Counted: GB and TFLOP. Estimated: the compiler's cycles. Nothing was run. Kernels take a cycle a"
    note += " bundle, in the last of the four alone; where they are not counted, memories are of XLA's form."
    return "\n".join([*markdown(heads, cells), "", note]) + "\n"


def figure(results: dict) -> Figure:
    """Least milliseconds and memory of a step against a sequence's length, for both families, and against devices."""
    fig, (by_length, memory, by_devices) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")

    def points(counts, name):
        found = [(n, rows_of(results, row=name(n))) for n in counts]
        return [(n, rows[0]) for n, rows in found if rows and not rows[0]["excess"]]

    for family in ("hope", "transformer"):
        found = points(settings.WINDOWS, lambda n, family=family: f"{n:,} tokens: {family}")
        x = [n for n, _ in found]
        by_length.plot(x, [max(row["milliseconds"].values()) for _, row in found], "o-", label=family)
        memory.plot(x, [(row["arguments"] + row["temporaries"]) / 1e9 for _, row in found], "o-", label=family)
    found = points(settings.SLICES.values(), lambda n: f"{n} devices: hope")
    by_devices.plot([n for n, _ in found], [max(row["milliseconds"].values()) for _, row in found], "o-", label="hope")
    memory.axhline(16, color="gray", linewidth=0.8)
    windows, devices = (settings.WINDOWS[0], settings.WINDOWS[-1]), (4, 256)
    panels = [(by_length, "tokens", windows, "least ms", (50, 50_000)), (memory, "tokens", windows, "memory, GB", (1, 100))]
    for axes, x, xs, y, ys in [*panels, (by_devices, "devices", devices, "least ms", (10, 1000))]:
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, xlim=(xs[0] / 1.3, xs[1] * 1.3), ylim=ys)
        axes.legend(frameon=False)
    return fig


def main() -> None:
    config = flags.parse(settings.Config)
    path = config.path(RESULTS / "pods")
    results = resume(path, config)
    each_once(path, results, partial(run, config), ({"row": row} for row in config.rows), itemgetter("row"), config)
    finish(path, results, table(results), figure(results))


if __name__ == "__main__":
    flags.run(main)

"""Small runs of the experiments on optimizers: measures, results, resumption."""

import doctest
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from nested_jax.errors import UserError

FOLDER = "optimizers"


@pytest.fixture
def call(load, monkeypatch, tmp_path):
    """Runs a command with flags, its results in a temporary folder; returns those of the JSON, all numbers finite."""

    def call(name, flags):
        monkeypatch.setattr(load(name), "RESULTS", tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
        load(name).main()
        return written(tmp_path, name)

    return call


def written(folder, name):
    """A command's results; its table has no missing number, its figure is not blank."""
    refuse = lambda word: pytest.fail(f"{name}.json has {word}")
    results = json.loads((folder / f"{name}.json").read_text(), parse_constant=refuse)
    table = (folder / f"{name}.md").read_text()
    assert table.startswith("|") or "\n|" in table
    assert not {"nan", "inf", "None"} & set(table.replace("|", " ").split())
    assert imread(folder / f"{name}.png").std() > 0.01
    assert f"{name}.py" in results["command"]
    return results


def test_the_surface_is_descended(load):
    """Delta momentum with erasure 0 is momentum; arrival is after the last value outside the tolerance."""
    surface, settings = load("surface"), load("config")
    config = settings.Surface(
        frequencies=(1.0,),
        starts=3,
        tuning_starts=2,
        steps=150,
        rates=(1e-3, 0.02),
        decays=(0.8,),
        erases=(0.0,),
        raw_erases=(),
    )
    rows = {row["optimizer"]: row for row in surface.measure(config)["rows"]}
    assert rows["momentum"]["rate"] == 0.02 and rows["momentum"]["arrived"] == 1
    for name in ("delta, erase 0", "delta by entries, erase 0"):
        assert rows[name]["steps"] == rows["momentum"]["steps"]
    start = jnp.array([2.0, -1.0])
    values = surface.descend(config, "momentum", 1.0, 0.02, 0.8, start)[1]
    (steps,) = surface.arrival(config, "momentum", 1.0, 0.02, 0.8, start[None])
    assert values[steps - 1] > config.tolerance and (values[steps:] <= config.tolerance).all()


def test_tasks_have_their_overlap(load):
    """Principal angles; gradient descent stays in its task's subspace; if subspaces are known it forgets nothing."""
    orthogonal, settings = load("orthogonal"), load("config")
    config = settings.Orthogonal(tasks=3, dimension=2, outputs=2, steps=80, noise=0.0, condition=2.0)
    for overlap in (0.0, 0.4):
        bases, *_, old = orthogonal.draw(config, overlap, jax.random.key(0))
        np.testing.assert_allclose(bases[1].T @ bases[1], np.eye(2), atol=1e-6)
        cosines = jnp.linalg.svd(bases[0].T @ bases[2], compute_uv=False)
        np.testing.assert_allclose(cosines, overlap, atol=1e-6)
        np.testing.assert_allclose(old[2] @ bases[1], bases[1], atol=1e-5)
        assert not old[0].any()
    ends = {}
    for name in ("gd", "gd, old subspaces known"):
        errors, leaving = orthogonal.train_all(config, name, False, 0.4, jnp.array([0.3]), jnp.array([0]))
        assert (jnp.diagonal(errors[0, 0]) < 1e-3).all()
        assert (name != "gd") or (leaving < 1e-9).all()
        ends[name] = errors[0, 0, -1, 0]
    assert ends["gd, old subspaces known"] < 1e-3 < 1e-2 < ends["gd"]


def test_a_falling_rate_restarts_with_each_task(load):
    """Gradient descent against a plain loop: rate * (1 - i / steps) in step i of every task."""
    orthogonal, settings = load("orthogonal"), load("config")
    config = settings.Orthogonal(tasks=3, dimension=2, outputs=2, steps=5, batch_size=4)
    rate, overlap = 0.4, 0.3
    begin, stream = jax.random.split(jax.random.key(7))
    tasks = orthogonal.draw(config, overlap, begin)
    weights, stages = jnp.zeros_like(tasks.target), []
    covariances = (tasks.bases * tasks.variances[None, None]) @ jnp.swapaxes(tasks.bases, -2, -1)
    error = lambda w: jnp.einsum("io,tij,jo->t", w - tasks.target, covariances, w - tasks.target)
    for basis, key in zip(tasks.bases, jax.random.split(stream, config.tasks), strict=True):
        for i, pair in enumerate(jax.random.split(key, config.steps)):
            one, two = jax.random.split(pair)
            x = jax.random.normal(one, (4, 2)) * jnp.sqrt(tasks.variances)[None] @ basis.T
            wrong = x @ (weights - tasks.target) - config.noise * jax.random.normal(two, (4, 2))
            weights -= rate * (1 - i / config.steps) * x.T @ wrong / 4
        stages.append(error(weights) / error(0 * weights))
    errors, _ = orthogonal.train_tasks(config, "gd", True, overlap, rate, 7)
    np.testing.assert_allclose(errors, jnp.stack(stages), rtol=1e-4)


def test_surface_writes_its_results(call):
    flags = (
        "--frequencies 1 2 --starts 2 --tuning-starts 2 --steps 5 --rates 0.001 0.01 --decays 0.8 --erases 0.1 --raw-erases"
    )
    rows = call("surface", flags)["rows"]
    assert [(row["frequency"], row["optimizer"]) for row in rows] == [
        (frequency, name)
        for frequency in (1, 2)
        for name in ("gd", "momentum", "delta, erase 0.1", "delta by entries, erase 0.1")
    ]


def test_orthogonal_writes_its_results(call, load, monkeypatch):
    orthogonal = load("orthogonal")
    names = ("gd", "momentum", "gd, old subspaces known")
    monkeypatch.setattr(orthogonal, "RULES", {name: orthogonal.RULES[name] for name in names})
    flags = "--tasks 2 --dimension 2 --outputs 2 --overlaps 0.3 --steps 2 --rates 0.1 --tuning-seeds 100 --seeds 0"
    results = call("orthogonal", f"{flags} --cost-width 4 --cost-updates 1 --cost-rounds 1")
    assert [(row["schedule"], row["optimizer"]) for row in results["rows"]] == [
        (schedule, name) for schedule in ("constant", "falling") for name in names
    ]
    assert [row["state_bytes_per_parameter"] for row in results["cost"]] == [0, 4, 0]
    assert all(row["seconds"] > 0 for row in results["cost"])


def test_vision_writes_its_results_and_repeats_no_run(call, load, monkeypatch):
    flags = "--optimizers m3 --steps 2 --batch-size 4 --warmup 1 --rates 0.01 0.1 --cost-steps 1 --cost-rounds 1"
    flags += " --model.width 8 --model.layers 1 --model.heads 2 --model.hidden 8 --validation 20 --test 20"
    first = call("vision", f"{flags} --seeds 0")
    assert [(row["optimizer"], row["seed"]) for row in first["runs"]] == [("m3", seed) for seed in (100, 100, 0)]
    assert [row["optimizer"] for row in first["cost"]] == ["m3"] and first["cost"][0]["seconds"] > 0
    assert all(len(row["losses"]) == 2 for row in first["runs"])
    vision = load("vision")
    monkeypatch.setattr(vision, "trainer", lambda *_: pytest.fail("a run was repeated"))
    assert call("vision", f"{flags} --seeds 0") == first


def test_text_writes_its_results_and_repeats_no_run(call, load, monkeypatch):
    flags = "--presets tiny-transformer --optimizers muon --steps 5 --batch-size 1 --window 16 --eval-bytes 200 --rates 0.01"
    first = call("text", f"{flags} --further --seeds 0")
    assert [(row["optimizer"], row["seed"]) for row in first["runs"]] == [("muon", 100), ("muon", 0)]
    assert all(row["heldout_bits_per_byte"] > 0 and row["training"][0][0] == 5 for row in first["runs"])
    monkeypatch.setattr(load("text"), "run", lambda *_: pytest.fail("a run was repeated"))
    assert call("text", f"{flags} --further --seeds 0") == first


def test_the_cost_of_updates_writes_its_results(load, monkeypatch, tmp_path):
    benchmark = load("optimizers", "benchmarks")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["optimizers.py", "--width=4", "--slow-period=2", "--steps=1", "--rounds=2"])
    benchmark.main()
    results = written(tmp_path, "optimizers")
    rows = {row["optimizer"]: row for row in results["rows"]}
    assert list(rows) == list(benchmark.rules(benchmark.settings.OptimizersConfig()))
    assert all(len(row["seconds"]) == 2 and row["median_seconds"] > 0 for row in rows.values())
    assert rows[benchmark.BASE]["ratio_to_muon"] == 1
    for name, memories in {"momentum": 1, "m3, no second moment": 4, "m3": 5}.items():
        assert 0 <= rows[name]["state_bytes_per_parameter"] - 4 * memories < 4  # the rest are counts


def test_the_cost_of_derivatives_writes_its_results(load, monkeypatch, tmp_path):
    """All memories and times; memory grows with the number of stored states."""
    benchmark = load("meta", "benchmarks")
    for name, value in {"RESULTS": tmp_path, "tpu": lambda: None, "torch_unroll": lambda config: []}.items():
        monkeypatch.setattr(benchmark, name, value)
    flags = "--width=64 --rows=2 --lengths 16 64 --timed=16 --layers=1 --batch-size=1 --tokens=8 --steps=2 --rounds=2"
    monkeypatch.setattr(sys, "argv", ["meta.py", *flags.split()])
    benchmark.main()
    results = written(tmp_path, "meta")
    used = {(row["checkpoint"], row["steps"]): row["temporary_mb"] for row in results["unroll"]}
    assert set(used) == {(checkpoint, length) for checkpoint in benchmark.CHECKPOINTS for length in (16, 64)}
    assert used["none", 64] > 3 * used["none", 16] > 3 * used["sqrt", 16] and used["none", 64] > 2 * used["sqrt", 64]
    rows = [(row["grain"], row["gradient"]) for row in results["mixflow"]]
    assert rows == list(itertools.product(benchmark.GRAINS, ("mixflow_grad", "jax.grad")))
    assert set(results["mixflow_seconds"]) == {" ".join(row) for row in rows}
    for times in (results["unroll_seconds"], results["mixflow_seconds"]):
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in times.values())


def test_the_best_rate_has_the_test_runs(load):
    """Further rates are tried while the largest is the best; NaN and None are worst; only the best rate has test runs."""
    tuning, settings = load("tuning"), load("config")
    loss = {0.001: 3.0, 0.01: None, 0.1: 2.0, 0.3: 1.0, 1.0: float("nan"), 3.0: 0.0}
    run = lambda rate, seed, optimizer: {"optimizer": optimizer, "rate": rate, "seed": seed, "loss": loss[rate]}
    config = settings.Text(rates=(0.1, 0.001, 0.01), seeds=(0, 1))
    for further, tries in [((), 3), ((0.3,), 4), ((0.3, 1.0), 5), ((0.3, 1.0, 3.0), 5)]:
        runs = tuning.tuned(run, config, "loss", further, optimizer="m3")
        best = 0.3 if further else 0.1
        assert [(row["rate"], row["seed"]) for row in runs] == [
            *((rate, 100) for rate in list(loss)[:tries]),
            (best, 0),
            (best, 1),
        ]
        results = {"config": {"tuning_seed": 100, "seeds": [0, 1]}, "runs": [*runs, run(0.001, 100, "other")]}
        assert tuning.chosen(results, optimizer="m3") == f"{best}{' (edge)' if tries < 5 else ''}"


@pytest.mark.parametrize("name, examples", [("record", 7), ("flags", 1), ("config", 1), ("vision_transformer", 3)])
def test_examples_in_docstrings(load, name, examples):
    assert doctest.testmod(load(name)) == (0, examples)


def test_a_stopped_command_resumes(load, monkeypatch, tmp_path):
    """A run is repeated only with --fresh; lists choose runs, rates may become more, all other flags are refused."""
    record, settings = load("record"), load("config")
    path = tmp_path / "optimizers" / "results" / "text"
    path.parent.parent.mkdir()
    made = []
    run = lambda rate: made.append(rate) or {"loss": rate / 2}
    for _ in range(2):
        results = record.resume(path, settings.Text())
        assert [record.once(path, results, run, rate=rate)["loss"] for rate in (0.5, 1.0)] == [0.25, 0.5]
    assert made == [0.5, 1.0]
    assert len(json.loads((path.parent / "text.json").read_text())["runs"]) == 2
    assert record.resume(path, settings.Text(fresh=True))["runs"] == []
    monkeypatch.setattr(sys, "argv", ["text.py", "--seeds", *"01234567"])
    more = record.resume(path, settings.Text(seeds=tuple(range(8))))
    assert more["runs"] == results["runs"] and len(more["config"]["seeds"]) == 8
    assert more["command"] == "python experiments/optimizers/text.py --seeds 0 1 2 3 4 5 6 7"
    fewer = record.resume(path, settings.Text(seeds=(7, 0), presets=("140m-hope",), rates=(0.5, *settings.Text.rates)))
    assert fewer["command"] == results["command"] != more["command"]
    assert fewer["runs"] == results["runs"] and fewer["config"]["seeds"] == [*results["config"]["seeds"], 7]
    assert fewer["config"]["presets"] == [*settings.Text.presets, "140m-hope"]
    assert fewer["config"]["rates"] == [0.5, *settings.Text.rates]
    for other in ({"steps": 3}, {"tuning_seed": 7}, {"rates": (0.003,)}, {"further": ()}):
        with pytest.raises(UserError, match="was made with other flags: give those, more rates, or --fresh"):
            record.resume(path, settings.Text(**other))

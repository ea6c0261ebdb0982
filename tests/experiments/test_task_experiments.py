"""Small runs of formal_languages, recall, chunks, ablation and streams; networks are of equal size and learn."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import scripts
from matplotlib.image import imread
from rich.console import Console

from nested_jax import ModelConfig, UserError, preset
from nested_jax.data.tasks import TASKS
from nested_jax.models.block import sequence_layer
from nested_jax.models.language_model import init_weights
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train
from nested_jax.train.optimizer import decayed
from nested_jax.train.record import read_rows

FOLDER = "formal_languages"
LINEAR = ("linear", "delta", "gated-delta", "oja")
LOW = {"rate": 0.0, "rate_bias": -1e9}  # of a rate that is 0


@pytest.mark.parametrize("name", ["hope exact, chunk 16", "titans, chunk 16", "gated-delta", "transformer", "lstm"])
def test_networks_are_of_equal_size_and_causal(load, name):
    """Within 2 % of Hope's parameters; a label depends on no later token."""
    networks = load("networks")
    count = lambda name: networks.count(networks.network(name, 4, 32, 2))
    assert abs(count(name) / count("hope, chunk 16") - 1) < 0.02
    made = networks.network(name, 4, 8, 1)
    params = jax.jit(made.init)(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 4)
    logits = jax.jit(made.logits)
    before, after = logits(params, tokens), logits(params, tokens.at[:, 7].add(1) % 4)
    np.testing.assert_allclose(before[:, :7], after[:, :7], atol=1e-6)
    assert (np.abs(before[:, 7] - after[:, 7]).max(-1) > 1e-6).all()


def test_lanes_learn_and_are_scored(load):
    """A token that is its own label is learned, not by a lane of rate 0; scores are those of the test sequences alone."""
    sequences, networks = load("sequences"), load("networks")
    task, lane = TASKS["abab-star"], load("sequences").Lane
    learned, untrained = sequences.run(
        networks.network("lstm", 4, 16, 1), [lane(task, 0, 0.03), lane(task, 0, 0.0)], sequences.Training(150, 8, 4, 12),
        [(4, 12), (16, 24)], 32,
    )  # fmt: skip
    assert learned["right"] == learned["labels"] == [1.0, 1.0] and untrained["right"][0] < 0.5
    assert learned["loss"][0] > 10 * learned["loss"][-1] > 0 and learned["norm"][1] >= learned["norm"][0] > 0
    assert abs(untrained["loss"][-1] - untrained["loss"][0]) < 0.05


def test_a_lane_is_a_run_of_its_own(load):
    """What is trained beside it changes nothing; seed and task are the lane's."""
    sequences, networks = load("sequences"), load("networks")
    lanes = [sequences.Lane(TASKS[name], seed, 0.01) for name, seed in (("parity", 0), ("parity", 1), ("aa-star", 0))]
    train = lambda *lanes: sequences.run(
        networks.network("gated-delta", 4, 16, 1), lanes, sequences.Training(4, 4, 2, 8), [(2, 8)], 16
    )
    together = train(*lanes)
    for row, lane in zip(together, lanes, strict=True):
        (alone,) = train(lane)
        np.testing.assert_allclose(row["loss"], alone["loss"], rtol=1e-5)
        assert row["labels"] == alone["labels"]
    assert len({row["loss"][0] for row in together}) == 3


@pytest.mark.parametrize(
    "folder, flags",
    [
        ("formal_languages", "--networks lstm transformer --tasks parity s3 --longest 6 --steps 3 --sequences 8"),
        ("recall", "--networks lstm --tasks mad-recall passkey --multiples 1 2 --steps 2 --sequences 4 --width 8"),
    ],
)
def test_a_grid_is_measured_and_resumed(load, tmp_path, monkeypatch, folder, flags):
    """Each cell once; the table has the mean of the seeds at the rate chosen on the tuning seed."""
    module = load("run", folder)
    monkeypatch.setattr(module, "RESULTS", tmp_path / folder / "results")
    (tmp_path / folder).mkdir()
    flags += " --seeds 0 1 --rates 0.01 0.1 --batch-size 2 --layers 1 --lanes 2"
    monkeypatch.setattr("sys.argv", ["run.py", *flags.split()])
    scripts.in_this_process(monkeypatch, load("record", folder))
    module.main()
    path = tmp_path / folder / "results" / f"{folder}.json"
    results = json.loads(path.read_text())
    names, tasks = results["config"]["networks"], results["config"]["tasks"]
    assert len(results["runs"]) == len(names) * (2 + 2 * len(tasks))
    grid = load("grid", folder)
    for name in names:
        tries = [row for row in results["runs"] if row["name"] == name and row["seed"] == 100]
        best = max(tries, key=lambda row: (sum(row["right"]), sum(row["labels"]), -row["loss"][-1]))
        assert grid.chosen(results, name) == best["rate"]
        assert all(len(grid.on_test_seeds(results, name, task)) == 2 for task in tasks)
    make = module.run
    monkeypatch.setattr(module, "run", lambda *_, **__: pytest.fail("a finished run was made again"))
    module.main()
    assert json.loads(path.read_text()) == results
    rows = path.with_suffix(".md").read_text()
    assert rows.count("| lstm |") >= 1 + 2
    monkeypatch.setattr("sys.argv", ["run.py", *flags.split(), "--networks", "lstm", "--tasks", tasks[1], "--seeds", "1"])
    module.main()  # these cells are there, and all others stay
    assert json.loads(path.read_text()) == results and path.with_suffix(".md").read_text() == rows

    monkeypatch.setattr(module, "run", make)
    monkeypatch.setattr("sys.argv", ["run.py", *flags.split(), "--steps", "1", "--networks", "lstm", "--into", "shorter"])
    module.main()
    shorter = json.loads(path.with_name("shorter.json").read_text())
    assert shorter["config"]["steps"] == 1 and len(shorter["runs"]) == 2 + 2 * len(tasks)
    assert json.loads(path.read_text()) == results
    monkeypatch.setattr("sys.argv", ["run.py", "--into", "../elsewhere"])
    with pytest.raises(UserError, match="--into ../elsewhere: give a name of letters, digits and _"):
        module.main()

    monkeypatch.setattr(module, "run", lambda *_, **__: pytest.fail("a report made a run"))
    monkeypatch.setattr("sys.argv", ["run.py", *flags.split(), "--networks", *names, "gated-delta", "--report"])
    rows = path.with_suffix(".md").read_text()
    module.main()
    assert json.loads(path.read_text())["runs"] == results["runs"] and path.with_suffix(".md").read_text() == rows
    monkeypatch.setattr("sys.argv", ["run.py", "--report", "--into", "nothing"])
    with pytest.raises(UserError, match=r"--report: .*nothing.json has no runs to report, make some"):
        module.main()


def test_more_calls_than_a_process_made_before_it_hung(load, tmp_path, monkeypatch):
    """Ten calls in one process of its own, each saved, none made twice."""
    monkeypatch.syspath_prepend(scripts.EXPERIMENTS)  # for the process
    record = load("record")
    results, config = {"runs": []}, record.Runs(jobs=1, lanes=1)
    for _ in range(2):
        made = record.each_once(tmp_path / "some", results, list, ({"n": i} for i in range(10)), itemgetter("n"), config)
        assert made == [{"n": i} for i in range(10)] and len(results["runs"]) == 10
    assert json.loads((tmp_path / "some.json").read_text()) == results


def fails_at_two(choices):
    """Of a module that a process can import."""
    (one,) = choices
    if one["n"] == 2:
        raise ValueError("two")
    return choices


def test_a_call_that_fails_loses_no_other(load, tmp_path, monkeypatch):
    """What had ended is saved, the error is raised, and none of the rest is made."""
    monkeypatch.syspath_prepend(scripts.EXPERIMENTS)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    record = load("record")
    results, config = {"runs": []}, record.Runs(jobs=1, lanes=1)
    with pytest.raises(ValueError, match="two"):
        record.each_once(tmp_path / "some", results, fails_at_two, ({"n": i} for i in range(10)), itemgetter("n"), config)
    saved = [row["n"] for row in json.loads((tmp_path / "some.json").read_text())["runs"]]
    assert saved == [row["n"] for row in results["runs"]] == [0, 1]


def sleeps(choices):
    """Of a module that a process can import: says that it runs, for a minute."""
    Path(choices[0]["file"]).write_text(str(os.getpid()))
    time.sleep(60)
    return choices


def test_a_killed_runner_leaves_no_process(tmp_path):
    """A call that runs ends with the process that started it, however that ends."""
    started, path = tmp_path / "started", [str(scripts.EXPERIMENTS), str(Path(__file__).parent)]
    code = f"""if __name__ == "__main__":
    from pathlib import Path
    from record import Runs, each_once
    from test_task_experiments import sleeps
    each_once(Path({str(tmp_path / "some")!r}), {{"runs": []}}, sleeps, [{{"file": {str(started)!r}}}], str, Runs(jobs=1))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    runner = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": os.pathsep.join([*path, *sys.path])})
    wait_for(lambda: started.exists() and started.read_text(), 120)
    runner.kill()
    runner.wait()
    wait_for(lambda: not is_running(int(started.read_text())), 20)


def wait_for(holds, seconds):
    """Until something holds, or fails."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.1)


def is_running(process):
    """Whether there is a process that has not ended."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_text_is_learned_as_by_the_command(load, tmp_path):
    """The updates and the held-out bits of `nested-jax train`, seed by seed; its rule, given by hand, at the rates given."""
    text_run = load("text_run")
    model = dataclasses.replace(preset("tiny-transformer"), width=16, layers=1, heads=2)
    rows = text_run.held_out(model, (0, 1), 3)
    for seed, row in enumerate(rows):
        config = TrainConfig(model=model, seed=seed, steps=3, run_dir=str(tmp_path / str(seed)), log_every=1)
        config = dataclasses.replace(config, eval_every=0, sample_tokens=0, reading_documents=0)
        train(config, Console(quiet=True))
        found = read_rows(tmp_path / str(seed))
        norms = [one["gradient_norm"] for one in found if "gradient_norm" in one]
        np.testing.assert_allclose(row[text_run.BITS], found[-1][text_run.BITS], rtol=1e-5)
        np.testing.assert_allclose(row["norm"], [np.median(norms), max(norms)], rtol=1e-4)
    adam, decay = optax.scale_by_adam(b1=0.9, b2=0.95), optax.add_decayed_weights(config.weight_decay, decayed)
    rule = lambda rate: optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
    still, same = text_run.held_out(model, (0, 0), 3, (0.0, config.learning_rate), rule)
    np.testing.assert_allclose(same[text_run.BITS], rows[0][text_run.BITS], rtol=1e-5)
    assert still[text_run.BITS] > same[text_run.BITS] + 0.003


def test_fidelity_compares_at_the_best_rate_of_each(load, tmp_path, monkeypatch):
    """Rows are models and optimizers; a rate is chosen on the tuning seed, and tries are in no mean."""
    fidelity, settings = load("run", "fidelity"), load("config", "fidelity")
    for row in settings.ROWS.values():
        dataclasses.replace(preset(row.preset), **row.changes)
        assert row.of in settings.ROWS and (row.rule is None or row.rule(lambda step: 0.1).init({"up": jnp.ones((1, 2, 3))}))

    def run(config, cells):  # the best rate is 0.1 on text and 0.01 on parity; sums are worse by the seed plus one
        of = lambda cell: abs(np.log10(cell["rate"]) + 1) + (cell["row"] == "Adam, sums") * (cell["seed"] % 100 + 1)
        right = lambda cell: [float(cell["rate"] == 0.01)] * 3
        text = lambda cell: {"heldout_bits_per_byte": 2.0 + of(cell)}
        parity = lambda cell: {"right": right(cell), "labels": [0.5] * 3, "loss": [1.0]}
        return [(text(cell) if cell["task"] == "text" else parity(cell)) | {"norm": [0.1, 0.5]} for cell in cells]

    monkeypatch.setattr(fidelity, "RESULTS", tmp_path)
    monkeypatch.setattr(fidelity, "run", run)
    scripts.in_this_process(monkeypatch, load("record", "fidelity"))
    flags = ["--rows", "titans", "Adam", "Adam, sums", "--rates", "0.01", "0.1", "1", "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", ["run.py", *flags])
    fidelity.main()
    results, table = json.loads((tmp_path / "fidelity.json").read_text()), (tmp_path / "fidelity.md").read_text()
    assert len(results["runs"]) == 2 * 2 * 3 + 3 * 2 * 2 and imread(tmp_path / "fidelity.png").std() > 0.01
    assert "| Adam | 0.1 and 0.01 | 2.000 ± 0.000 |  | 1.00 / 1.00 / 1.00 | 0.5 |" in table
    assert "| Adam, sums | 0.1 and 0.01 | 3.500 ± 0.707 | +1.500 ± 0.707 | 1.00 / 1.00 / 1.00 | 0.5 |" in table
    assert "| titans | 0.008 and 0.003 |" in table
    monkeypatch.setattr("sys.argv", ["run.py", "--rows", "Adam, sums"])
    with pytest.raises(UserError, match="--rows 'Adam, sums': give 'Adam' too, which it is compared with"):
        fidelity.main()


def test_tables_say_which_runs_diverged(load):
    """And are made with them; a chunk of text alone has its row."""
    diverged, run = {"heldout_bits_per_byte": None, "norm": [None, None]}, {"right": [1.0] * 3, "labels": [1.0]}
    run |= {"norm": [0.5, 20.5]}
    text = lambda bits: {"heldout_bits_per_byte": bits, "norm": [0.1, 2.0]}
    ablation, settings = load("run", "ablation"), load("config", "ablation")
    rows = [{"row": "hope", "task": "text", "seed": seed} | text(2.0) for seed in (0, 1)]
    rows += [
        {"row": "no decay", "task": "text", "seed": 0} | text(2.5),
        {"row": "no decay", "task": "text", "seed": 1} | diverged,
    ]
    rows += [{"row": "hope", "task": "parity", "seed": 0} | run]
    results = {"config": dataclasses.asdict(settings.Config(rows=("hope", "no decay"), seeds=(0, 1))), "runs": rows}
    assert "| no decay | 2.500, 1 of 2 diverged | +0.500 |  | inf |" in ablation.table(results)
    plt.close(ablation.figure(results))
    chunks, settings = load("run", "chunks"), load("config", "chunks")
    form = "exact, normalised"
    config = settings.Config(forms=(form,), chunks=(16, 32), seeds=(0,))
    rows = [{"form": form, "task": "text", "chunk": 16, "seed": 0} | diverged]
    rows += [
        {"form": form, "task": "text", "chunk": 32, "seed": 0} | text(2.5),
        {"form": form, "task": "parity", "chunk": 16, "seed": 0} | run,
    ]
    results = {"config": dataclasses.asdict(config), "runs": rows, "speeds": {form: {"16": 0.5}}, "device": "cpu"}
    table = chunks.table(results)
    assert (
        "| 16 | 1.00 / 1.00 / 1.00 |  |  | 1 of 1 diverged | inf | 500 |" in table
        and "| 32 |  |  |  | 2.500 | 2 |  |" in table
    )
    plt.close(chunks.figure(results))
    boundary = load("boundary", "chunks")
    config = boundary.Config(exact=("nothing more",), chunks=(16,), seeds=(0,))
    lost = {"exact": "nothing more", "chunk": 16, "seed": 0} | run | {"norm": [None, None]}
    assert "| nothing more | 1.00 / 1.00 / 1.00 | inf |" in boundary.table(
        {"config": dataclasses.asdict(config), "runs": [lost]}
    )


def test_the_token_loop_of_boundary_quantities_is_the_layer(load):
    """With nothing more exact it is the chunked model; each quantity made exact changes it, after the first token."""
    boundary, networks = load("boundary", "chunks"), load("networks", "chunks")
    fast = networks.network("hope exact, chunk 4", 2, 32, 2)
    params = jax.jit(fast.init)(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), params)
    tokens = jax.random.randint(jax.random.key(2), (2, 24), 0, 2)
    expected = jax.jit(fast.logits)(params, tokens)
    for exact in boundary.EXACT:
        found = jax.jit(boundary.token_loop(exact, 4).logits)(params, tokens)
        difference = jnp.abs(found - expected).max((0, 2))
        if exact == "nothing more":
            np.testing.assert_allclose(found, expected, atol=2e-5)
        else:
            assert difference[0] < 2e-5 < difference[1:].max(), exact


def test_what_is_made_exact_is_that_quantity_alone(load):
    """A memory that learns nothing makes the same at every token: refreshing it changes nothing, refreshing others does."""
    boundary, networks = load("boundary", "chunks"), load("networks", "chunks")
    fast = networks.network("hope exact, chunk 4", 2, 32, 2)
    params = jax.jit(fast.init)(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), params)
    tokens, mixer = jax.random.randint(jax.random.key(2), (2, 12), 0, 2), params["blocks"]["mixer"]
    names = ("keys", "values", "rates", "retention")  # in the order of the second layers' rates, after that of first layers
    still = lambda i: mixer | {name: mixer[name].at[:, :, jnp.array([0, i + 1])].set(low) for name, low in LOW.items()}
    for exact in names:
        logits = jax.jit(boundary.token_loop(exact, 4).logits)
        for i, name in enumerate(names):
            held = params | {"blocks": params["blocks"] | {"mixer": still(i)}}
            difference = jnp.abs(logits(held, tokens) - jax.jit(fast.logits)(held, tokens)).max()
            assert (difference < 2e-5) == (name == exact), (name, exact, difference)


def test_gates_start_where_a_start_says(load):
    """Rates and retention of the model at its start; all else is the default's."""
    starts, networks = load("starts", "chunks"), load("networks", "chunks")
    made = networks.network("hope exact, chunk 16", 2, 16, 1)
    usual, changed = (
        jax.jit(net.init)(jax.random.key(0)) for net in (made, starts.started(made, starts.Start(0.5, 0.25, 3.0)))
    )
    mixer, before = changed["blocks"]["mixer"], usual["blocks"]["mixer"]
    rates = jax.nn.sigmoid(mixer["rate_bias"])
    np.testing.assert_allclose(rates[..., 0], 0.25, rtol=1e-6)
    np.testing.assert_allclose(rates[..., -1], 0.5, rtol=1e-6)
    np.testing.assert_allclose(mixer["retention_bias"] - before["retention_bias"], 3.0, rtol=1e-6)
    default = jax.jit(starts.started(made, starts.Start()).init)(jax.random.key(0))
    assert all(jnp.allclose(*pair, atol=1e-6) for pair in zip(*map(jax.tree.leaves, (default, usual)), strict=True))


def test_rows_of_the_ablation_are_models(load):
    """Every row is a model of its own, of about as many parameters; the paper's rows are among them."""
    settings, networks = load("config", "ablation"), load("networks", "ablation")
    made = {
        row: dataclasses.replace(networks.config_of("hope, chunk 16", 2, 32, 2), **changes)
        for row, changes in settings.ROWS.items()
    }
    assert len(set(made.values())) == len(made)
    sizes = {row: networks.count(networks.language_model(config)) for row, config in made.items() if row != "no CMS"}
    assert all(abs(size / sizes["hope"] - 1) < 0.3 for size in sizes.values())
    assert settings.PERPLEXITIES.keys() <= settings.ROWS.keys()


def test_gates_of_the_streams_are_at_their_largest(load):
    """Rates are max_rate, one head never decays, one at once, momentum is 0.9 or swings; of every option."""
    streams, settings = load("run", "streams"), load("config", "streams")
    logistic = lambda x: 1 / (1 + np.exp(-np.asarray(x, float)))
    for option, fields in settings.OPTIONS.items():
        model = ModelConfig(width=8, heads=2, memory_hidden=4, layers=1, **fields)
        layer, swinging = sequence_layer(model), option in settings.SWINGING
        mixer = streams.largest(model, init_weights(model, jax.random.key(0)), swinging)["blocks"]["mixer"]
        mixer = jax.tree.map(itemgetter(0), mixer)
        if model.mixer == "self-modifying":
            np.testing.assert_allclose(logistic(mixer["rate_bias"]), 1, rtol=1e-6)
            theta = layer.project(mixer, jax.random.normal(jax.random.key(1), (1, 100, 8)))[2]
            retain, gates = logistic(mixer["retention_bias"]), [] if theta is None else [theta]
        else:
            _, _, _, rate, *gates = layer.project(mixer, jnp.zeros((1, 1, 8)))
            np.testing.assert_allclose(rate, getattr(layer, "max_rate", None) if model.mixer in LINEAR else 1, rtol=2e-4)
            retain, *gates = [np.ravel(gate) for gate in gates] or [np.array([1, 0])]
        np.testing.assert_allclose(retain, [1, 0], atol=1e-6)
        assert len(gates) == (layer.momentum if hasattr(layer, "momentum") else model.mixer == "omega"), option
        for gate in gates:
            if swinging:
                assert np.min(gate) < 0.01 < 0.99 < np.max(gate)
            elif model.mixer != "self-modifying":
                np.testing.assert_allclose(gate, 0.9 if model.mixer == "titans" else 1, rtol=1e-5)
            else:
                np.testing.assert_allclose(np.mean(gate), 0.9, atol=0.05)


def test_streams_are_what_they_say(load):
    """Four streams of bytes; the largest rates and no decay; the first piece that is no number ends a stream."""
    streams, settings = load("run", "streams"), load("config", "streams")
    found = streams.streams(10_000, 0)
    assert found.shape == (4, 10_000) and found.min() >= 0 and found.max() < 256
    assert [len(set(row[:4_096])) for row in found[:2]] == [1, 2] and len(set(found[2])) == 256
    assert (found[3, :4_096] == found[3, 4_096:8_192]).all() and (found[3, :2_048] != found[3, 2_048:4_096]).mean() > 0.5
    config = settings.Config(tokens=2 * streams.PIECE, width=8)
    rows = streams.run(config, [{"option": "linear"}, {"option": "hope-paper"}])
    sums, lost = (np.array(row["norms"], float) for row in rows)
    assert sums.shape == (2, 4) and rows[0]["finite"] == [2 * streams.PIECE] * 4
    np.testing.assert_allclose(sums[1] / sums[0], 2, rtol=0.1)  # of a head that neither erases nor decays
    assert rows[1]["finite"][1:] == [0, 0, 0] and not np.isfinite(lost[:, 1:]).any()

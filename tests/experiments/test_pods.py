"""Steps compiled for TPUs: every job is a run that there is, and the committed table is that of the committed numbers."""

import dataclasses
import json
import math
import re
import subprocess

import pytest
from scripts import EXPERIMENTS

from nested_jax import preset
from nested_jax.cli.parsing import parse, training
from nested_jax.parallel.mesh import parse as parse_mesh
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import divided

FOLDER = "pods"


def test_the_mesh_of_every_job_divides_it(load):
    for name, job in load("config").JOBS.items():
        model = preset(job.preset)
        model = dataclasses.replace(model, **job.model, cms=dataclasses.replace(model.cms, **job.cms))
        sizes = {"batch_size": job.rows, "window": job.window, "accumulate": job.pieces, "mesh": job.mesh}
        shape, slice_of = parse_mesh(job.mesh), math.prod(map(int, job.topology.partition(":")[2].split("x")))
        assert divided(TrainConfig.from_preset(job.preset, model=model, **sizes)).by(shape), name
        assert math.prod(shape) == (1 if job.mesh == "data=1" else slice_of), name


def test_the_table_is_that_of_the_numbers(load):
    results = json.loads((EXPERIMENTS / "pods/results/pods.json").read_text())
    assert (EXPERIMENTS / "pods/results/pods.md").read_text() == load("run").table(results)


@pytest.mark.parametrize(("size", "tokens"), [("760m", 30e9), ("1.3b", 100e9)])
def test_the_papers_runs_are_configs_of_train(load, size, tokens):
    """As many tokens as the paper's, in sequences as long, on every slice of the plans."""
    for mesh in load("config").TOPOLOGIES.values():
        words = ["--config", str(EXPERIMENTS / f"pods/{size}.json"), "--mesh", mesh, "--run-dir", "no/such/run"]
        config = parse(training(words), "train", words).run
        assert config.model == dataclasses.replace(preset(f"{size}-hope"), memory_policy="blocks")
        assert config.window == 4096 and config.model.vocabulary == 32000
        assert config.steps * config.batch_size * config.window == pytest.approx(tokens, rel=1e-4)
        assert divided(config).by(parse_mesh(config.mesh or ""))


def test_the_script_for_slurm_gives_each_process_one_of_its_gpus():
    script = EXPERIMENTS / "pods/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    number = lambda name: int(re.search(rf"--{name}=(\d+)", text)[1])
    assert number("ntasks-per-node") == number("gpus-per-node")
    mesh = parse_mesh(re.search(r"--mesh (\S+)", text)[1])
    assert math.prod(mesh) == number("nodes") * number("gpus-per-node")

"""Steps compiled for TPUs: every job is a run that there is, and the committed table is that of the committed numbers."""

import dataclasses
import json
import math

from scripts import EXPERIMENTS

from nested_jax import preset
from nested_jax.parallel.mesh import parse
from nested_jax.train.config import TrainConfig
from nested_jax.train.state import divided

FOLDER = "pods"


def test_the_mesh_of_every_job_divides_it(load):
    for name, job in load("config").JOBS.items():
        model = preset(job.preset)
        model = dataclasses.replace(model, **job.model, cms=dataclasses.replace(model.cms, **job.cms))
        sizes = {"batch_size": job.rows, "window": job.window, "accumulate": job.pieces, "mesh": job.mesh}
        shape, slice_of = parse(job.mesh), math.prod(map(int, job.topology.partition(":")[2].split("x")))
        assert divided(TrainConfig.from_preset(job.preset, model=model, **sizes)).by(shape), name
        assert math.prod(shape) == (1 if job.mesh == "data=1" else slice_of), name


def test_the_table_is_that_of_the_numbers(load):
    results = json.loads((EXPERIMENTS / "pods/results/pods.json").read_text())
    assert (EXPERIMENTS / "pods/results/pods.md").read_text() == load("run").table(results)

"""`train` on meshes: a run that is stopped goes on elsewhere, with the numbers of one that was not."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from io import StringIO

import jax
import llama_folder
import numpy as np
import pytest
from rich.console import Console

from nested_jax import UserError
from nested_jax.cli import main
from nested_jax.models.config import preset
from nested_jax.train import loop
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train
from nested_jax.train.trained import load_run


def config(folder, mesh, **fields):
    model = preset("tiny-transformer")
    small = {"vocabulary": 8, "width": 16, "layers": 1, "heads": 2, "cms": dataclasses.replace(model.cms, hidden=(16,))}
    sizes = {"window": 16, "batch_size": 16, "steps": 6, "warmup": 2}
    often = {"eval_every": 3, "eval_sequences": 16, "checkpoint_every": 3, "log_every": 1}
    own = {"task": "parity", "run_dir": str(folder), "mesh": mesh, "model": dataclasses.replace(model, **small)}
    return TrainConfig.from_preset("tiny-transformer", **(sizes | often | own | fields))


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(row["step"], name): row[name] for row in rows for name in ("loss", "heldout_loss") if name in row}


def test_a_stopped_run_goes_on_elsewhere(tmp_path):
    """On eight devices by rows; from the third update on as 2x2x2, and by three axes with part of the devices."""
    said = StringIO()
    whole, others = tmp_path / "whole", {"2x2x2": "data=2,fsdp=2,tensor=2", "sequence": "fsdp=2,tensor=2,sequence=2"}
    train(config(whole, None), Console(file=said))
    assert "on 8 x cpu, mesh fsdp=8" in said.getvalue()
    for name, mesh in others.items():
        again = tmp_path / name
        shutil.copytree(whole, again)
        shutil.rmtree(again / "checkpoints" / "6")
        state = train(config(again, mesh), Console(file=StringIO()))
        assert state.params["head"].sharding.spec[1] == "tensor" and state.params["head"].sharding.num_devices == 8
        assert losses(again).keys() == losses(whole).keys()
        for key, value in losses(again).items():
            np.testing.assert_allclose(value, losses(whole)[key], rtol=1e-5, err_msg=str(key))


def test_what_does_not_fit_is_told(tmp_path):
    for mesh, fault in (("data=16", "is 16 devices, there are 8: give data=8"), ("tensor=8", "does not divide 16 rows")):
        with pytest.raises(UserError, match=f"--mesh {mesh} {fault}"):
            train(config(tmp_path / "none", mesh), Console(file=StringIO()))
    assert not (tmp_path / "none").exists()


def test_what_was_trained_on_a_mesh_is_read_on_one_device(tmp_path):
    """By another process, which has but one."""
    state = train(config(tmp_path / "run", "fsdp=4,tensor=2", steps=1), Console(file=StringIO()))
    read = f"import nested_jax; run = nested_jax.load({str(tmp_path / 'run')!r}); print(float(run.params['head'].sum()))"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(float(done.stdout), float(state.params["head"].sum()), rtol=1e-5)


@pytest.mark.slow
def test_meshes_read_as_one_device_does(tmp_path, capsys):
    """Bits per byte of eval by three axes, text that generate writes by heads; generate's one row is not split."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question.\n" * 100)
    run = str(tmp_path / "run")
    model = dataclasses.replace(preset("tiny-hope"), vocabulary=264, width=16, layers=2, heads=2, chunk=8, memory_hidden=4)
    cms = dataclasses.replace(model.cms, hidden=(16, 16), periods=(16, 8))
    text = {"task": None, "data": str(tmp_path / "text.txt"), "tokenizer": "bytes", "window": 32, "eval_bytes": 500}
    fields = {"model": dataclasses.replace(model, cms=cms), "eval_sequences": TrainConfig.eval_sequences}
    train(config(tmp_path / "run", None, **text, **fields), Console(file=StringIO()))

    def said(line):
        capsys.readouterr()
        assert main(line.split()) == 0
        return capsys.readouterr().out

    bits, three = (said(f"eval --run-dir {run} {mesh}") for mesh in ("--mesh data=1", "--mesh fsdp=2,tensor=2,sequence=2"))
    assert three == bits and "bits per byte" in bits
    generate = f"generate --run-dir {run} --prompt to --tokens 12 --temperature 0"
    assert said(f"{generate} --mesh tensor=2") == said(generate)
    assert main(f"{generate} --mesh fsdp=2,tensor=2".split()) == 2
    assert "does not divide 1 rows (data, fsdp)" in (error := capsys.readouterr().err) and "give tensor=2" in error


@pytest.mark.slow
def test_what_a_run_starts_from_is_read_in_parts(tmp_path, monkeypatch):
    """No device ever holds the other run's weights whole; the first loss is that of its weights."""
    first = train(config(tmp_path / "first", None, steps=2), Console(file=StringIO()))
    read = []
    monkeypatch.setattr(loop, "load_run", lambda *given, **how: read.append(load_run(*given, **how)) or read[0])
    fields = {"steps": 1, "init_from": str(tmp_path / "first"), "learning_rate": 0.0, "weight_decay": 0.0}
    state = train(config(tmp_path / "second", "fsdp=4,tensor=2", **fields), Console(file=StringIO()))
    matrices = [leaf for leaf in jax.tree.leaves(read[0].params) if leaf.ndim > 1 and min(leaf.shape[-2:]) >= 16]
    assert matrices and all(leaf.addressable_shards[0].data.nbytes * 4 <= leaf.nbytes for leaf in matrices)
    jax.tree.map(np.testing.assert_array_equal, state.params, first.params)


@pytest.mark.slow
def test_a_converted_model_is_trained_on_in_parts(tmp_path, monkeypatch):
    """The README's recipe, on a mesh and on one device: the same losses, of a model that learns in context."""
    monkeypatch.chdir(tmp_path)
    llama_folder.write(tmp_path / "model")
    ways = "--way deltas --periods 16 8 --hidden 4 4 --blocks 1 --rates 0.1"
    assert main(f"convert model --run-dir from {ways}".split()) == 0
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question.\n" * 100)
    found = []
    for mesh in ("fsdp=4,tensor=2", "data=1"):
        sizes = "--window 32 --batch-size 8 --steps 3 --warmup 1 --log-every 1 --eval-bytes 500 --learning-rate 1e-3"
        line = f"train --init-from from --data text.txt --run-dir {mesh} --mesh {mesh} {sizes} --sample-tokens 0"
        assert main(line.split()) == 0
        found.append(losses(tmp_path / mesh))
    assert found[0].keys() == found[1].keys() and len(found[0]) >= 3
    np.testing.assert_allclose([*found[0].values()], [*found[1].values()], rtol=1e-4)


@pytest.mark.slow
def test_devices_without_a_part_are_told(tmp_path):
    said = StringIO()
    small = config(tmp_path / "few", None)
    train(dataclasses.replace(small, batch_size=2, steps=1, eval_sequences=2), Console(file=said))
    assert "on 2 x cpu, mesh fsdp=2" in said.getvalue()
    assert "note: 6 of 8 devices have no part; give another --batch-size or --mesh" in said.getvalue()

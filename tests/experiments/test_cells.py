"""The choices of a cell are those of the model that is trained for it: what the tables' rows say, written here once more."""

from __future__ import annotations

import dataclasses
import math

import pytest

from nested_jax import preset

FOLDER = "ablation"
USUAL = ("keys", "values", "rates", "retention")
ABLATION = {
    "hope": {},
    "with momentum": {"momentum": True},
    "plain gradient descent": {"erase": "none"},
    "no decay": {"retention": "none"},
    "fixed keys": {"generated": ("values", "rates", "retention")},
    "fixed values": {"generated": ("keys", "rates", "retention")},
    "fixed rates": {"generated": ("keys", "values", "retention")},
    "fixed retention": {"generated": ("keys", "values", "rates")},
    "memory of queries": {"generated": (*USUAL, "queries")},
    "features of the token": {"features": "token"},
    "one rate": {"rates": "shared"},
    "errors of the boundary, proximal": {
        **{"errors": "boundary", "step": "proximal", "features": "token", "rates": "shared", "momentum": True},
    },
    "targets of any norm": {"targets": "raw"},
    "raw steps": {"step": "raw"},
    "erase by keys alone": {"erase": "memory"},
    "errors of any norm": {"surprise": math.inf},
    "decay to zero": {"retention": "zero"},
    "reads before the write": {"read": "before"},
    "reads of the boundary": {"read": "boundary"},
}
BOUNDARY = ABLATION["errors of the boundary, proximal"]
CHUNKS = {
    "boundary, proximal": BOUNDARY,
    "boundary, normalised": BOUNDARY | {"step": "normalised"},
    "boundary, all else as exact": {"errors": "boundary"},
    "exact, proximal": {"step": "proximal"},
    "exact, normalised": {},
    "exact, normalised, features of the token": {"features": "token"},
    "exact, normalised, with momentum": {"momentum": True},
}
STARTS = {
    "features of the boundary": {},
    "features of the token": {"features": "token"},
    "features of the token, momentum": {"features": "token", "momentum": True},
}
FIDELITY = {
    "titans": ("titans", {}),
    "titans, values of any norm": ("titans", {"values": "raw"}),
    "titans, raw steps": ("titans", {"step": "raw"}),
    "titans, errors of any norm": ("titans", {"surprise": math.inf}),
    "titans, decay to zero": ("titans", {"retention": "zero"}),
    "titans, a sum as momentum": ("titans", {"damped": False}),
    "omega": ("omega", {}),
    "omega, values of any norm": ("omega", {"values": "raw"}),
    "omega, errors of any norm": ("omega", {"surprise": math.inf}),
    "omega, errors of the token": ("omega", {"chunk": 1}),
    "linear": ("linear", {}),
    "linear, rates and retention of 1": ("linear", {"gated": False}),
}


@pytest.fixture
def trained(load, monkeypatch):
    """What a script trains for a cell of choices, in place of training it: a model's config, its lanes and updates."""

    def of(folder: str, name: str = "run", **choices):
        script, networks = load(name, folder), load("networks", folder)
        network = lambda *args: networks.Network(lambda _: None, networks.config_of(*args))
        monkeypatch.setattr(script, "network", network)
        on_task = lambda made, lanes, training, *_: (made.logits, lanes, dataclasses.astuple(training))
        monkeypatch.setattr(script, "train_network" if hasattr(script, "train_network") else "train", on_task)
        monkeypatch.setattr(script, "held_out", lambda model, seeds, steps, *_: (model, seeds, steps), raising=False)
        config = (script if name != "run" else load("config", folder)).Config()
        return script.run(config, [choices | {"seed": seed} for seed in config.seeds])

    return of


def parity(load, chunk: int, **changes):
    """Hope of the experiments' size, with the presets' memories."""
    return load("networks").config_of("hope exact, chunk 16", 2, 32, 2, {"chunk": chunk} | changes)


def test_rows_of_the_ablation(load, trained):
    assert {*ABLATION, "no CMS", "hope-paper", "hope-paper, targets of unit norm"} == {*load("config", "ablation").ROWS}
    hope, paper = preset("tiny-hope"), preset("tiny-hope-paper")
    text = ABLATION | {
        name: {"paper": targets} for name, targets in (("hope-paper", "raw"), ("hope-paper, targets of unit norm", "l2"))
    }
    for row, changes in text.items():
        wanted = hope
        if "paper" in changes:
            wanted, changes = dataclasses.replace(paper, cms=hope.cms), {"targets": changes["paper"]}
        assert trained("ablation", row=row, task="text") == (dataclasses.replace(wanted, **changes), [0, 1, 2], 140), row
    for row, changes in ABLATION.items():
        model, lanes, training = trained("ablation", row=row, task="parity")
        assert model == parity(load, 16, **changes), row
        assert [lane.seed for lane in lanes] == [0, 1, 2] and {lane.rate for lane in lanes} == {0.003}
        assert training == (800, 16, 2, 50)
    model, *_ = trained("ablation", row="no CMS", task="text")
    assert model.adapting == 0 and sum(model.cms.hidden) == sum(hope.cms.hidden)


def test_forms_of_the_chunks(load, trained):
    for form, changes in CHUNKS.items():
        for chunk in (1, 64):
            model, lanes, training = trained("chunks", form=form, chunk=chunk, task="parity")
            assert model == parity(load, chunk, **changes) and training == (800, 16, 2, 50), form
            model, *_ = trained("chunks", form=form, chunk=chunk, task="text")
            assert model == dataclasses.replace(preset("tiny-hope"), chunk=chunk, **changes), form
    assert trained("chunks", form="exact, proximal", chunk=64, task="parity to 150")[2] == (800, 16, 2, 150)
    assert trained("chunks", form="exact, proximal", chunk=16, task="mqar")[2] == (2000, 32, 32, 32)
    for form, heads in (("exact, normalised, heads of 64", 2), ("exact, normalised, heads of 128", 1)):
        model, *_ = trained("chunks", form=form, chunk=128, task="text")
        assert model == dataclasses.replace(preset("tiny-hope"), chunk=128, heads=heads)


def test_starts_of_the_gates(load, trained):
    for form, changes in STARTS.items():
        choices = {"form": form, "start": "main rate 3/16", "rate": 0.01, "task": "parity"}
        model, lanes, training = trained("chunks", "starts", chunk=64, **choices)
        assert model == parity(load, 64, **changes) and training == (800, 16, 2, 50), form
        assert [lane.seed for lane in lanes] == [1000, 1001, 1002] and {lane.rate for lane in lanes} == {0.01}


def test_rows_of_the_fidelity(load, trained):
    for row, (family, changes) in FIDELITY.items():
        model, *_ = trained("fidelity", row=row, task="text", rate=0.003)
        assert model == dataclasses.replace(preset(f"tiny-{family}"), **changes), row
        model, lanes, training = trained("fidelity", row=row, task="parity", rate=0.003)
        wanted = load("networks").config_of("gated-delta", 2, 32, 2, {"mixer": family, "chunk": 16} | changes)
        assert model == wanted and training == (800, 16, 2, 50), row
    model, *_ = trained("fidelity", row="hope-attention, CMS not clipped", task="text", rate=0.003)
    assert model.cms.clip == 0 and model.adapting == 1

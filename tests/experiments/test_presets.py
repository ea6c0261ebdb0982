"""The committed table of the presets' parameters is that of the code."""

from scripts import EXPERIMENTS

FOLDER = "presets"


def test_the_table_of_parameters_is_committed(load):
    table = load("run").table()
    assert (EXPERIMENTS / "presets/results/parameters.md").read_text() == table
    assert table in (EXPERIMENTS / "presets/README.md").read_text()

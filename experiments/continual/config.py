"""The config of continual/run.py; its fields are the flags."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from methods import METHODS

from nested_jax.checks import Count
from nested_jax.errors import UserError

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags
from flags import Seed, Seeds
from record import Runs

FAMILIES = ("permuted images", "split images", "intents", "banking intents", "languages", "domains")
TEXTS = ("languages", "domains")


@dataclass(frozen=True)
class Config(Runs):
    """Tasks one after the other, seen once: what each method knows of the first ones at the end."""

    data: str = "data"
    """Folder of Fashion-MNIST's four files, of clinc150.json, of banking77_train.csv and banking77_test.csv, and of folders
    languages and domains, a file NAME.txt for each."""
    families: tuple[str, ...] = FAMILIES
    """Sequences of tasks: images under a permutation of their pixels each, or two more kinds of them each; intents of
    CLINC150 or Banking77, 15 or 11 more of them each; texts one after the other."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Names of `methods.METHODS`."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the parameters, of the tasks and of the order of examples."""
    tuning_seed: Seed = 100
    """Seed of the tries: of other tasks, and scored on examples that are held out of training's."""
    width: Count = 128
    """Width of the model."""
    hidden: Count = 128
    """Hidden width of each of its four levels."""
    examples: Count = 1000
    """Examples of a class to train on, at most; there are 5,900 images, 100 intents of CLINC150 and 25 of Banking77. Of a
    text, pieces of 257 bytes."""

    def __post_init__(self):
        flags.check(self, "families", "methods", "seeds")
        flags.check_known(self, "families", FAMILIES)
        flags.check_known(self, "methods", METHODS)
        flags.check_tuning(self)
        if not self.report and not Path(self.data).is_dir():
            raise UserError(f"--data {self.data} is no folder: give the one that holds the data")

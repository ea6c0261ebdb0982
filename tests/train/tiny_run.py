"""A model and a record small enough to be made many times."""

import dataclasses
import json
from pathlib import Path

from nested_jax.models.config import ModelConfig, preset
from nested_jax.train.config import TrainConfig


def small_model(name: str = "tiny-transformer", **fields) -> ModelConfig:
    model = preset(name)
    periods = (16, 8) if model.cms.periods else ()
    cms = dataclasses.replace(model.cms, hidden=tuple(16 for _ in model.cms.hidden), periods=periods)
    small = {"width": 16, "layers": 1, "heads": 2, "chunk": 16, "memory_hidden": 8, "cms": cms}
    return dataclasses.replace(model, **(small | fields))


def rows(config: TrainConfig) -> list[dict]:
    """The rows of metrics.jsonl, without times."""
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    timeless = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
    return [timeless(json.loads(line)) for line in lines]

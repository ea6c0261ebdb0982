"""A model and a record small enough to be made many times."""

import dataclasses
import json
from pathlib import Path

from nested_jax.models.config import ModelConfig, preset
from nested_jax.train.config import TrainConfig


def small_model(name: str = "tiny-transformer", **fields) -> ModelConfig:
    """A model of the 256 bytes."""
    model = preset(name)
    periods = (16, 8) if model.cms.periods else ()
    cms = dataclasses.replace(model.cms, hidden=tuple(16 for _ in model.cms.hidden), periods=periods)
    small = {"vocabulary": 256, "width": 16, "layers": 1, "heads": 2, "chunk": 16, "memory_hidden": 8, "cms": cms}
    return dataclasses.replace(model, **(small | fields))


def small_config(text: str, run_dir: Path, **fields) -> TrainConfig:
    """A run of a second on a file of text."""
    sizes = {
        "window": 32,
        "batch_size": 4,
        "steps": 6,
        "warmup": 2,
        "sample_tokens": 0,
        "reading_documents": 0,
        "model": small_model(),
        "tokenizer": "bytes",
    }
    every = {"eval_every": 3, "eval_bytes": 2000, "checkpoint_every": 2, "log_every": 1}
    return TrainConfig.from_preset("tiny-transformer", **(sizes | every | {"data": text, "run_dir": str(run_dir)} | fields))


def rows(config: TrainConfig) -> list[dict]:
    """The rows of metrics.jsonl, without times."""
    lines = Path(config.run_dir, "metrics.jsonl").read_text().splitlines()
    timeless = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
    return [timeless(json.loads(line)) for line in lines]

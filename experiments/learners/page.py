"""A picture of a document's page: `python experiments/learners/page.py --text FILE` writes results/page.png."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
import flags

from nested_jax import preset
from nested_jax.checks import Count
from nested_jax.cli import main as nested_jax
from nested_jax.errors import UserError
from nested_jax.train.config import TrainConfig
from nested_jax.train.loop import train

PICTURE = Path(__file__).parent / "results" / "page.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass(frozen=True)
class Config:
    """Train a small Hope on bytes, let it read the start of a text, and take a picture of the page."""

    text: str
    """File of the text."""
    run_dir: str = "runs/page"
    """Folder of the run; it is trained, in three minutes on two CPU cores, where there is none."""
    read: Count = 12_000
    """Bytes that are read."""

    def __post_init__(self):
        flags.check(self)
        if not Path(self.text).is_file():
            raise UserError(f"--text {self.text} is no file: give one of text")
        if CHROMIUM is None:
            raise UserError("the picture needs a Chromium: apt-get install chromium")


def trained(folder: str) -> None:
    """Trains the model of notebook 04 where there is no run."""
    hope = preset("tiny-hope")
    sizes = {"vocabulary": 256, "width": 64, "layers": 2, "heads": 2, "memory_hidden": 16}
    model = dataclasses.replace(hope, **sizes, cms=dataclasses.replace(hope.cms, hidden=(64, 64, 64)))
    fields = {"steps": 200, "batch_size": 4, "eval_every": 0, "sample_tokens": 0, "reading_documents": 0}
    if not Path(folder).exists():
        train(TrainConfig.from_preset("tiny-hope", model=model, tokenizer="bytes", run_dir=folder, **fields))


def main() -> None:
    config = flags.parse(Config)
    trained(config.run_dir)
    with tempfile.TemporaryDirectory() as folder:
        text, page = Path(folder, Path(config.text).name), Path(folder, "page.html")
        text.write_bytes(Path(config.text).read_bytes()[: config.read])
        if code := nested_jax(["read", str(text), "--run-dir", config.run_dir, "--html", str(page)]):
            sys.exit(code)
        still = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1420"]
        subprocess.run([*still, f"--screenshot={PICTURE}", page.as_uri()], check=True, capture_output=True)
    print(PICTURE)


if __name__ == "__main__":
    flags.run(main)

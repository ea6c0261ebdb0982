"""Parameters of all presets: `python experiments/presets/run.py` writes results/parameters.md."""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from nested_jax import PRESETS, LanguageModel, preset

RESULTS = Path(__file__).parent / "results"


def table() -> str:
    """Markdown: parameters in millions, a row for each size, a column for each family."""
    sizes, families = (list(dict.fromkeys(name.split("-", 1)[i] for name in PRESETS)) for i in (0, 1))
    lines = ["| | " + " | ".join(f"`{family}`" for family in families) + " |", "|---|" + "---:|" * len(families)]
    for size in sizes:
        counts = [millions(f"{size}-{family}") for family in families]
        lines.append(f"| `{size}` | " + " | ".join(f"{c:.3f}" if c < 1 else f"{c:,.1f}" for c in counts) + " |")
    return "\n".join(lines) + "\n"


def millions(name: str) -> float:
    """Parameters of a preset in millions; its weights are not allocated."""
    return nnx.eval_shape(lambda: LanguageModel(preset(name), rngs=nnx.Rngs(0))).parameters / 1e6


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "parameters.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()

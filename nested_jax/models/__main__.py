"""Parameters of all presets, in millions, as a Markdown table: `python -m nested_jax.models`."""

from flax import nnx

from nested_jax.models.config import PRESETS, preset
from nested_jax.models.language_model import LanguageModel


def table() -> str:
    """One row a size, one column a family."""
    sizes, families = (list(dict.fromkeys(name.split("-", 1)[i] for name in PRESETS)) for i in (0, 1))
    lines = ["| | " + " | ".join(f"`{family}`" for family in families) + " |", "|---|" + "---:|" * len(families)]
    for size in sizes:
        made = [nnx.eval_shape(lambda f=f, s=size: LanguageModel(preset(f"{s}-{f}"), rngs=nnx.Rngs(0))) for f in families]
        counts = [model.parameters / 1e6 for model in made]
        lines.append(f"| `{size}` | " + " | ".join(f"{c:.3f}" if c < 1 else f"{c:,.1f}" for c in counts) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

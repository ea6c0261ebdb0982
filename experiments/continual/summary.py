"""What a table of scores comes to: final score, forgetting, transfer."""

from __future__ import annotations

import numpy as np

from nested_jax.typing import Float


def summary(scores: Float[np.ndarray, "N tasks"]) -> dict[str, float]:
    """What a table of scores, of which more is better, comes to.

    final: mean score on all tasks after the last; learned: mean score on a task just after it. forgetting: mean over all
    tasks but the last of the best score so far less the final one. backward: of the final score less that just after the
    task. forward: of the score on a task just before it, less that before all of them.

    >>> summary(np.array([[0.5, 0.5], [1.0, 0.6], [0.7, 0.9]]))
    {'final': 0.8, 'learned': 0.95, 'forgetting': 0.3, 'backward': -0.3, 'forward': 0.1}
    """
    before, after = scores[0], scores[1:]
    last, own = after[-1], np.diag(after)
    values = {
        "final": last.mean(),
        "learned": own.mean(),
        "forgetting": (after.max(0) - last)[:-1].mean(),
        "backward": (last - own)[:-1].mean(),
        "forward": (np.diag(after, 1) - before[1:]).mean(),
    }
    return {name: round(float(value), 10) for name, value in values.items()}

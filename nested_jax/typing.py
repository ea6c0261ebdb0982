"""The dimension legend and the array aliases, once for the whole project.

    B batch    T tokens    D model width    H heads    K key width per head    V value width per head (or vocabulary)
    F hidden width    C chunk length    N number of levels    L layers    M memories of a layer    P segment length

Shapes are written with these letters, in docstrings, in names (`keys_BTHK`) and in annotations (`Float[Array, "B T D"]`).
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array
PyTree = Any  # a nest of tuples, lists and dicts of arrays
Position = Int[Array, ""] | np.int32 | int  # tokens read so far, known while tracing where it is no jax.Array

__all__ = ["Array", "Bool", "Float", "Int", "Position", "PyTree"]

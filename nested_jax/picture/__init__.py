"""The nested-learning picture: what learns in a system, on which level, how often, from what and towards what."""

from nested_jax.picture.component import Component, Picture
from nested_jax.picture.system import describe

__all__ = ["Component", "Picture", "describe"]

"""The nested-learning picture of a system: what learns in it, on which level, how often, from what and towards what."""

from nested_jax.picture.component import Component
from nested_jax.picture.picture import Picture
from nested_jax.picture.system import describe

__all__ = ["Component", "Picture", "describe"]

"""Trained models at work: learners that read, write and keep what they have learned."""

from nested_jax.serve.learner import Learner, Learners

__all__ = ["Learner", "Learners"]

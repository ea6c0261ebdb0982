"""The error for what the user can put right."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's, told in one line: the thing, its value, the remedy."""

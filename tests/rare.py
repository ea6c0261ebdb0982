"""Cases of a parametrised test of which the rarer ones are slow tests."""

from collections.abc import Collection, Iterable

import pytest


def cases(values: Iterable, default: Collection) -> list:
    """All values; those that are not in `default` are marked slow."""
    return [value if value in default else pytest.param(value, marks=pytest.mark.slow) for value in values]

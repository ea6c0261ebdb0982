"""A text that ends before the first of some strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def until(parts: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """Parts of a text as they come, up to the first of the strings; a part that may begin one waits for what follows.

    Args:
        parts: of the text.
        stop: strings, none empty.

    Yields:
        Parts of the text.

    >>> list(until(["Hel", "lo. ", "User", ": and"], ["User:"])), "".join(until(["a", "b"], ["bc"]))
    (['Hel', 'lo. '], 'ab')
    """
    pending = ""
    for part in parts:
        pending += part
        if found := [at for text in stop if (at := pending.find(text)) >= 0]:
            if min(found):
                yield pending[: min(found)]
            return
        begun = max((n for text in stop for n in range(1, len(text)) if pending.endswith(text[:n])), default=0)
        if ready := pending[: len(pending) - begun]:
            yield ready
            pending = pending[len(ready) :]
    if pending:
        yield pending

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
    waiting = ""
    for part in parts:
        waiting += part
        if found := [at for text in stop if (at := waiting.find(text)) >= 0]:
            if min(found):
                yield waiting[: min(found)]
            return
        begun = max((n for text in stop for n in range(1, len(text)) if waiting.endswith(text[:n])), default=0)
        if ready := waiting[: len(waiting) - begun]:
            yield ready
            waiting = waiting[len(ready) :]
    if waiting:
        yield waiting

"""The one exception that the commands print as a line instead of a traceback."""

import difflib
from collections.abc import Iterable


class StiefelError(Exception):
    """Something a user can put right: the message names the culprit and the remedy, in one line."""


def first_line(error: BaseException) -> str:
    """What a library's error says first; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, options: Iterable[str], count: int = 3) -> str:
    """'; did you mean a, b?' with the nearest of `options`, or '' if none is near."""
    # Case aside: 'ResNet18' is as near to 'resnet18' as can be.
    by_lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(word.lower(), by_lower, n=count, cutoff=0.6)
    return f"; did you mean {', '.join(by_lower[match] for match in near)}?" if near else ""

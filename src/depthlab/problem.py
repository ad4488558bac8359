import difflib
from collections.abc import Iterable


class Problem(ValueError):
    """Something the user can mend; its message is one readable line naming the key, the value and the way out."""


def closest(word: str, options: Iterable[str]) -> str:
    """What may have been meant, else all there is."""
    options = sorted(options)
    if near := difflib.get_close_matches(word, options, n=3, cutoff=0.5):
        return f"did you mean {' or '.join(near)}?"
    return f"there is: {', '.join(options)}"

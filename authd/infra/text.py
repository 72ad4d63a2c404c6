"""Text that a stranger sends, brought into one form: at a cost that is bounded before, and alike on every Python.

Python's normal form sorts combining marks by insertion, in quadratic time. So a text has a limit of its own, and of
marks no more may stand in a row than UAX 15's Stream-Safe Text Format allows, which is more than any language has.

What is stored under a normal form must mean the same on all replicas and after an upgrade, but the Pythons that authd
runs on bring the tables of Unicode 14, 15 and 15.1. Unicode guarantees that the forms of what is assigned never change.
So code points that came after version 14 are left as they are, which is what its tables do with them.
"""

import re
import unicodedata
from collections.abc import Callable

#: Combining marks in a row, counted as the decomposed text has them.
MARKS_MAX = 30

# All that Unicode 15 and 15.1 assigned. A Python with a newer table needs more here; tests/unit/test_text.py tells.
_NEWER = re.compile(
    "(["
    "\u0cf3\u0ece\u2ffc-\u2fff\u31ef\U00010efd-\U00010eff\U0001123f-\U00011241\U00011b00-\U00011b09"
    "\U00011f00-\U00011f10\U00011f12-\U00011f3a\U00011f3e-\U00011f59\U0001342f\U00013439-\U00013455"
    "\U0001b132\U0001b155\U0001d2c0-\U0001d2d3\U0001df25-\U0001df2a\U0001e030-\U0001e06d\U0001e08f"
    "\U0001e4d0-\U0001e4f9\U0001f6dc\U0001f774-\U0001f776\U0001f77b-\U0001f77f\U0001f7d9"
    "\U0001fa75-\U0001fa77\U0001fa87\U0001fa88\U0001faad-\U0001faaf\U0001fabb-\U0001fabd\U0001fabf"
    "\U0001face\U0001facf\U0001fada\U0001fadb\U0001fae8\U0001faf7\U0001faf8\U0002b739"
    "\U0002ebf0-\U0002ee5d\U00031350-\U000323af"
    "]+)"
)


def is_bounded(text: str, chars_max: int) -> bool:
    """Return whether the text has at most `chars_max` code points and MARKS_MAX combining marks in a row."""
    if len(text) > chars_max:
        return False
    return text.isascii() or not any(map(_has_a_long_run, _NEWER.split(text)[::2]))


def holds_newer(text: str) -> bool:
    """Return whether a code point stands in it that Unicode 14 does not have, but a newer one."""
    return not text.isascii() and _NEWER.search(text) is not None


def normalise(text: str, chars_max: int) -> str | None:
    """Make the text's NFKC by Unicode 14, or None of a text that is not bounded (`is_bounded`)."""
    return _change(text, _nfkc) if is_bounded(text, chars_max) else None


def fold(text: str, chars_max: int) -> str | None:
    """Make the NFKC without the difference of upper and lower case, or None of a text that is not bounded."""
    normal = normalise(text, chars_max)
    return None if normal is None else _change(normal, _nfkc_of_folded)


def _change(text: str, change: Callable[[str], str]) -> str:
    if text.isascii():
        return change(text)
    parts = _NEWER.split(text)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def _nfkc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def _nfkc_of_folded(text: str) -> str:
    # Folding can undo the normal form.
    return _nfkc(text.casefold())


def _has_a_long_run(text: str) -> bool:
    marks = 0
    for character in text:
        if character.isascii():
            marks = 0
            continue
        # One at a time: there is nothing to sort.
        for part in unicodedata.normalize("NFKD", character):
            marks = marks + 1 if unicodedata.combining(part) else 0
            if marks > MARKS_MAX:
                return True
    return False

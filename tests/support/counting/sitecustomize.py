"""Read by Python at its start where this folder is on its path: counts what `unicodedata.normalize` is given.

The function stays what it is. What it was given stands in a file of two numbers that the test reads: all code points so
far, and the most combining marks that ever stood in a row, which are what its time depends on.
"""

import mmap
import os
import struct
import threading
import unicodedata
from typing import Any

NUMBERS = struct.Struct("qq")

with open(os.environ["COUNTS"], "r+b") as _file:
    _counts = mmap.mmap(_file.fileno(), NUMBERS.size)
_lock = threading.Lock()
_normalize = unicodedata.normalize


def _marks_in_a_row(text: str) -> int:
    most = marks = 0
    for character in text:
        for part in _normalize("NFKD", character):
            marks = marks + 1 if unicodedata.combining(part) else 0
            most = max(most, marks)
    return most


def _counted(form: Any, text: str) -> str:
    with _lock:
        total, most = NUMBERS.unpack(_counts[:])
        _counts[:] = NUMBERS.pack(total + len(text), max(most, _marks_in_a_row(text)))
    return _normalize(form, text)


unicodedata.normalize = _counted

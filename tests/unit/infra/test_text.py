"""One form of a text, at a bounded cost, and the same on every Python."""

import sys
import unicodedata
from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.infra.text import MARKS_MAX, fold, holds_newer, is_bounded, normalise

CHARS_MAX = 2048
ANY = st.text(st.characters(), max_size=60)
#: Marks and what decomposes into them, where order and composition matter.
MARKED = st.text(
    st.sampled_from("ae\u03b1\u0e01\u0344\u0327\u0301\u0323\u0345\u0390\u1e9b\u1ec7\u0f73\u3099\ud55c"), max_size=60
)
#: Code points that Unicode 14 has, private use and surrogates among them.
OLD = [
    char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char) != "Cn" and not holds_newer(char)
]


def digest(texts: list[str]) -> str:
    return sha256("|".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


# A new Python that fails these two needs the ranges of its new code points in `_NEWER`. Nothing else may be changed:
# what is stored was made with these forms.


def test_what_is_newer_is_just_what_unicode_14_does_not_have() -> None:
    assert len(OLD) == 284_278
    assert digest(OLD) == "1df57d5bb6601ca6"


def test_all_forms_are_those_of_unicode_14_on_every_python() -> None:
    forms = [f"{normalise(char, 1)} {fold(char, 1)} {is_bounded(char * 16, 16)}" for char in OLD]
    assert digest(forms) == "2c927f81c05de972"


def test_what_came_later_stays_as_it_is() -> None:
    # U+1E030 has a form since Unicode 15, and U+1E08F is a mark since then: neither is in the tables of Python 3.11.
    assert normalise("\U0001e030\uff21\U0001e08f\uff21\u0301", CHARS_MAX) == "\U0001e030A\U0001e08f\u00c1"
    assert fold("\U0001e030\uff21\U0001e08f\uff21\u0301", CHARS_MAX) == "\U0001e030a\U0001e08f\u00e1"
    # Whatever it is to this Python, it ends a row of marks.
    marks = "\u0301" * MARKS_MAX
    assert is_bounded(f"a{marks}\U0001e08f{marks}", CHARS_MAX)


@given(ANY | MARKED)
def test_without_the_newer_it_is_pythons_own_form(text: str) -> None:
    if is_bounded(text, CHARS_MAX) and not holds_newer(text):
        assert normalise(text, CHARS_MAX) == unicodedata.normalize("NFKC", text)


@given(ANY | MARKED)
def test_the_form_of_a_form_is_itself(text: str) -> None:
    for change in (normalise, fold):
        once = change(text, CHARS_MAX)
        # A form may be longer than its text, but has no more marks in a row.
        assert once is None or change(once, CHARS_MAX) == once


@given(MARKED)
def test_canonical_spellings_of_a_text_have_one_form_and_one_bound(text: str) -> None:
    for spelling in (unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)):
        assert is_bounded(spelling, CHARS_MAX) == is_bounded(text, CHARS_MAX)
        assert normalise(spelling, CHARS_MAX) == normalise(text, CHARS_MAX)


@pytest.mark.parametrize(
    ("mark", "counts"), [("\u0301", 1), ("\u0344", 2), ("\u0f73", 2), ("\u0345", 1), ("\U000e0100", 0), ("\u00e9", 0)]
)
def test_marks_are_counted_as_the_decomposed_text_has_them(mark: str, counts: int) -> None:
    fitting = MARKS_MAX // counts if counts else CHARS_MAX - 1
    assert is_bounded("a" + mark * fitting, CHARS_MAX)
    assert is_bounded("a" + mark * (fitting + 1), CHARS_MAX) == (not counts and fitting + 2 <= CHARS_MAX)


@pytest.mark.parametrize("length", [0, 1, CHARS_MAX, CHARS_MAX + 1])
@pytest.mark.parametrize("letter", ["a", "é", "\u0301a", "\U0001fae8"])
def test_the_length_is_looked_at_first(length: int, letter: str) -> None:
    text = (letter * length)[:length]
    assert is_bounded(text, CHARS_MAX) == (length <= CHARS_MAX)
    assert (normalise(text, CHARS_MAX) is None) == (fold(text, CHARS_MAX) is None) == (length > CHARS_MAX)


@pytest.fixture
def normalised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that the real function is given."""
    texts: list[str] = []
    normalize = unicodedata.normalize

    def noted(form: Any, text: str) -> str:
        texts.append(text)
        return normalize(form, text)

    monkeypatch.setattr(unicodedata, "normalize", noted)
    return texts


def test_what_is_not_bounded_is_not_normalised(normalised: list[str]) -> None:
    for text in ("é" * (CHARS_MAX + 1), "a" + "\u0301" * (MARKS_MAX + 1), "\u0344" * 1000 + "\u0327" * 1000):
        assert normalise(text, CHARS_MAX) is fold(text, CHARS_MAX) is None
        assert max(map(len, normalised), default=0) <= 1, "more than one character at a time"

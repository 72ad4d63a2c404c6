"""One form for every token under a MAC: what was made is read, and nothing else."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.infra.encoding import decode_base64url, encode_base64url
from authd.tokens.mac import MacToken

SECRETS = {1: b"1" * 32, 2: b"2" * 32}
KIND = MacToken("k1.", "QH16sx", purpose="tests")
PLAIN = MacToken("k1.", "QH16sx")
BYTES = 31 + 32  # the fields, with the key's id, and the MAC


@given(st.sampled_from(sorted(SECRETS)), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.binary(min_size=16))
def test_what_was_made_is_read_from_equal_bytes(key_id: int, number: int, small: int, raw: bytes) -> None:
    for kind in (KIND, PLAIN):
        text = kind.make(key_id, SECRETS[key_id], number, small, raw[:16])
        assert kind.read(text, SECRETS.get) == (key_id, number, small, raw[:16])
        assert kind.make(key_id, SECRETS[key_id], number, small, raw[:16]) == text
        assert "=" not in text


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    chars = 3 + BYTES // 3 * 4
    for junk in (text, "k1." + text, ("k1." + text + "A" * chars)[:chars]):
        assert KIND.read(junk, SECRETS.get) is None


def test_any_changed_bit_makes_it_worthless() -> None:
    raw = decode_base64url(KIND.make(1, SECRETS[1], 7, 8, bytes(16))[3:])
    assert raw is not None
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        assert KIND.read("k1." + encode_base64url(bytes(changed)), SECRETS.get) is None


def test_a_key_that_is_not_known_proves_nothing() -> None:
    assert KIND.read(KIND.make(3, b"3" * 32, 7, 8, bytes(16)), SECRETS.get) is None
    assert KIND.read(KIND.make(2, SECRETS[1], 7, 8, bytes(16)), SECRETS.get) is None


def test_each_purpose_has_a_key_of_its_own() -> None:
    """So one prefix that came to be used twice would not let one kind pass for another."""
    fields = (1, SECRETS[1], 7, 8, bytes(16))
    other = MacToken("k1.", "QH16sx", purpose="others")
    texts = {kind.make(*fields) for kind in (KIND, other, PLAIN)}
    assert len(texts) == 3
    assert [KIND.read(text, SECRETS.get) is not None for text in sorted(texts)].count(True) == 1


def test_without_a_purpose_the_key_itself_is_used() -> None:
    raw = decode_base64url(PLAIN.make(1, SECRETS[1], 7, 8, bytes(16))[3:])
    assert raw is not None
    assert raw[-32:] == hmac.digest(SECRETS[1], b"k1." + raw[:-32], "sha256")


def test_a_form_that_would_need_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="k1"):
        MacToken("k1.", "Q")

"""A device token says who logged in there before, to whoever made it, and nothing to anybody else."""

import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.config import Secret, Settings
from authd.devices import DEVICE_ID_BYTES, DEVICE_TTL_S, Device, DeviceMint
from authd.tokens import KeyRing, MacKey, RefreshToken, TokenMint, decode_base64url, encode_base64url

NOW = 1_800_000_000.0
ID = bytes(range(DEVICE_ID_BYTES))
KEY = MacKey(1, b"k" * 32, 0.0)


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mint(clock: Clock) -> DeviceMint:
    return DeviceMint(KeyRing([], [KEY]), clock)


@pytest.mark.parametrize("user_id", [1, 2**53 + 1, 2**63 - 1])
def test_what_was_made_is_read(mint: DeviceMint, user_id: int) -> None:
    assert mint.read(mint.make(user_id, 2**31 - 1, ID)) == Device(user_id, 2**31 - 1, ID)


def test_each_new_device_has_an_id_of_its_own(mint: DeviceMint) -> None:
    made = [mint.read(mint.make(1, 1)) for _ in range(20)]
    assert len({device.id for device in made if device is not None}) == 20


def test_it_is_good_for_180_days_and_no_ms_longer(mint: DeviceMint, clock: Clock) -> None:
    text = mint.make(1, 1, ID)
    clock.now = NOW + DEVICE_TTL_S - 0.001
    assert mint.read(text) is not None
    clock.now = NOW + DEVICE_TTL_S
    assert mint.read(text) is None


def test_any_changed_character_makes_it_worthless(mint: DeviceMint) -> None:
    text = mint.make(7, 3, ID)
    for place in range(len(text)):
        for other in "A.B-_=":
            if text[place] != other:
                assert mint.read(text[:place] + other + text[place + 1 :]) is None


def test_another_key_or_one_that_is_gone_makes_it_worthless(mint: DeviceMint, clock: Clock) -> None:
    text = mint.make(7, 3, ID)
    for others in ([MacKey(1, b"o" * 32, 0.0)], [MacKey(2, KEY.secret, 0.0)], []):
        assert DeviceMint(KeyRing([], others), clock).read(text) is None
    # The next key makes new ones; the last one's are still good.
    ring = KeyRing([], [KEY, MacKey(2, b"n" * 32, NOW)])
    assert DeviceMint(ring, clock).read(text) is not None
    assert DeviceMint(ring, clock).read(DeviceMint(ring, clock).make(7, 3, ID)) is not None


def test_the_mac_of_one_kind_of_token_proves_none_of_the_other(mint: DeviceMint, clock: Clock) -> None:
    settings = Settings(database_url=Secret("-"), redis_url=Secret("-"), secret=Secret("-"))
    refresh = TokenMint(settings, KeyRing([], [KEY]), clock)
    token = refresh.make_refresh(RefreshToken(1, 7, ID, 1, 1, 1, 1, int(NOW * 1000) + 1))
    assert mint.read(token) is None
    assert mint.read("d1." + token[3:]) is None
    # The very fields under the MAC that a refresh token's would have.
    fields = decode_base64url(mint.make(7, 3, ID)[3:])
    assert fields is not None
    forged = fields[:-32] + hmac.digest(KEY.secret, b"v1." + fields[:-32], "sha256")
    assert mint.read("d1." + encode_base64url(forged)) is None


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    mint = DeviceMint(KeyRing([], [KEY]), Clock())
    assert mint.read(text) is None
    assert mint.read("d1." + text) is None
    assert mint.read(("d1." + text + "A" * 107)[:107]) is None

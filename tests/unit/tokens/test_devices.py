"""A device token says who logged in there before, to whoever made it, and nothing to anybody else."""

import hmac
import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.config import Secret, Settings
from authd.infra.encoding import decode_base64url, encode_base64url
from authd.infra.subject import Subject
from authd.tokens.access import MintSettings, TokenMint
from authd.tokens.device import DEVICE_ID_BYTES, DEVICE_TTL_S, Device, DeviceMint
from authd.tokens.refresh import RefreshToken
from authd.tokens.ring import KeyRing, MacKey

NOW = 1_800_000_000.0
ID = bytes(range(DEVICE_ID_BYTES))
KEY = MacKey(1, b"k" * 32, 0.0)
GOLDEN_V1 = "d1.AAAAAQAAAAAAAAAHAAAAAwABAgMEBQYHCAkKCwwNDg8AAAGmt1UAAOLCEeGDuOkWnbad_EcNqJhvfZzO2U_7EHKFm95yf2xa"
GOLDEN_V2 = "d2." + (
    "AAAAAQAAAAAAAAAH_ty6mAAAAAMAAQIDBAUGBwgJCgsMDQ4PAAABprdVAAAAAAAAAAAAAByH9ZKKyw1RXCG4ic91J-63jI7iau2Hs5QstGoD61ll"
)
ADA = Subject(7, 0xFEDCBA98)
NOW_AT = datetime.fromtimestamp(NOW, UTC)


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
    subject = Subject(user_id, 2**32 - 1)
    assert mint.read(mint.make(subject, 2**31 - 1, ID)) == Device(subject, 2**31 - 1, ID, int(NOW * 1000))


def v1(user_id: int, password_version: int, key: MacKey = KEY) -> str:
    """What version 1 made, by hand."""
    fields = struct.pack(">IQI16sQ", key.id, user_id, password_version, ID, int((NOW + DEVICE_TTL_S) * 1000))
    return "d1." + encode_base64url(fields + hmac.digest(key.secret, b"d1." + fields, "sha256"))


def test_a_device_token_is_these_bytes(mint: DeviceMint) -> None:
    text = mint.make(ADA, 3, ID)
    raw = decode_base64url(text.removeprefix("d2."))
    assert raw is not None
    assert raw[:-32].hex(" ", -4) == (
        "00000001 00000000 00000007 fedcba98 00000003 00010203 04050607 08090a0b 0c0d0e0f 000001a6 b7550000"
        " 00000000 00000000"
    )
    key = hmac.digest(KEY.secret, b"authd token device\1", "sha256")
    assert raw[-32:] == hmac.digest(key, b"d2." + raw[:-32], "sha256")
    assert text == GOLDEN_V2


def test_a_token_of_version_1_is_read(mint: DeviceMint) -> None:
    text = v1(7, 3)
    assert text == GOLDEN_V1
    assert mint.read(text) == Device(Subject(7, 0), 3, ID, int(NOW * 1000))
    assert mint.read(v1(7, 3, MacKey(1, b"o" * 32, 0.0))) is None


@pytest.mark.parametrize(
    ("subject", "version", "registered_s", "expected"),
    [
        (ADA, 3, -10, True),
        (ADA, 4, -10, False),
        (Subject(7, 1), 3, -10, False),
        (Subject(8, ADA.incarnation), 3, -10, False),
    ],
)
def test_it_is_of_the_user_of_its_incarnation_since_the_last_password(
    mint: DeviceMint, subject: Subject, version: int, registered_s: int, expected: bool
) -> None:
    device = mint.read(mint.make(ADA, 3, ID))
    assert device is not None
    assert device.is_of(subject, version, NOW_AT + timedelta(seconds=registered_s)) is expected


def test_a_token_of_version_1_is_of_nobody_who_registered_after_it(mint: DeviceMint) -> None:
    device = mint.read(v1(7, 3))
    assert device is not None
    assert device.is_of(ADA, 3, NOW_AT)
    assert not device.is_of(ADA, 3, NOW_AT + timedelta(milliseconds=1))
    assert not device.is_of(Subject(8, 1), 3, NOW_AT)
    assert not device.is_of(ADA, 4, NOW_AT)


def test_each_new_device_has_an_id_of_its_own(mint: DeviceMint) -> None:
    made = [mint.read(mint.make(ADA, 1)) for _ in range(20)]
    assert len({device.id for device in made if device is not None}) == 20


def test_it_is_good_for_180_days_and_no_ms_longer(mint: DeviceMint, clock: Clock) -> None:
    text = mint.make(ADA, 1, ID)
    clock.now = NOW + DEVICE_TTL_S - 0.001
    assert mint.read(text) is not None
    clock.now = NOW + DEVICE_TTL_S
    assert mint.read(text) is None


def test_any_changed_character_makes_it_worthless(mint: DeviceMint) -> None:
    text = mint.make(ADA, 3, ID)
    for place in range(len(text)):
        for other in "A.B-_=":
            if text[place] != other:
                assert mint.read(text[:place] + other + text[place + 1 :]) is None


def test_another_key_or_one_that_is_gone_makes_it_worthless(mint: DeviceMint, clock: Clock) -> None:
    text = mint.make(ADA, 3, ID)
    for others in ([MacKey(1, b"o" * 32, 0.0)], [MacKey(2, KEY.secret, 0.0)], []):
        assert DeviceMint(KeyRing([], others), clock).read(text) is None
    # The next key makes new ones; the last one's are still good.
    ring = KeyRing([], [KEY, MacKey(2, b"n" * 32, NOW)])
    assert DeviceMint(ring, clock).read(text) is not None
    assert DeviceMint(ring, clock).read(DeviceMint(ring, clock).make(ADA, 3, ID)) is not None


def test_the_mac_of_one_kind_of_token_proves_none_of_the_other(mint: DeviceMint, clock: Clock) -> None:
    settings = Settings(database_url=Secret("-"), redis_url=Secret("-"), secret=Secret("-"))
    refresh = TokenMint(settings.section(MintSettings), KeyRing([], [KEY]), clock)
    token = refresh.make_refresh(
        RefreshToken(
            key_id=1,
            user_id=7,
            incarnation=1,
            session_id=ID,
            epoch=1,
            counter=1,
            created_ms=1,
            issued_ms=1,
            expires_ms=int(NOW * 1000) + 1,
            authenticated_s=1,
        )
    )
    assert mint.read(token) is None
    assert mint.read("d2." + token[3:]) is None
    # The very fields under the MAC that another kind's would have: of the key itself, and of the other kind's.
    raw = decode_base64url(mint.make(ADA, 3, ID)[3:])
    assert raw is not None
    fields = raw[:-32]
    of_refresh = hmac.digest(KEY.secret, b"authd token refresh\1", "sha256")
    for secret in (KEY.secret, of_refresh):
        for prefix in (b"v1.", b"v2.", b"d1.", b"d2."):
            forged = fields + hmac.digest(secret, prefix + fields, "sha256")
            assert mint.read("d2." + encode_base64url(forged)) is None


@given(st.text(max_size=200))
def test_any_text_is_read_without_an_error(text: str) -> None:
    mint = DeviceMint(KeyRing([], [KEY]), Clock())
    assert mint.read(text) is None
    for prefix, chars in (("d1.", 99), ("d2.", 115)):
        assert mint.read(prefix + text) is None
        assert mint.read((prefix + text + "A" * chars)[:chars]) is None

"""Which mailboxes are one user, which are two, and which are nobody's: over the wire."""

import pytest
from support.api import Api, assert_problem

PASSWORD = "correct horse battery"
WRONG = "wrong horse battery"


async def test_a_domain_with_a_sharp_s_is_not_that_with_ss(api: Api) -> None:
    own = {}
    for username in ("ada@strasse.de", "ada@stra\u00dfe.de"):
        answer = await api.register(username, f"{PASSWORD} of {username}")
        assert answer.status_code == 201
        own[username] = answer.json()["user_id"]
    assert len(set(own.values())) == 2
    assert_problem(await api.register("ada@xn--strae-oqa.de", PASSWORD), 409, "username_taken")
    # The domain in ASCII is the same mailbox, and so is it in capitals.
    for spelling in ("ada@xn--strae-oqa.de", "ADA@STRA\u1e9eE.DE", "ada@stra\u00dfe.de"):
        pair = await api.login(spelling, f"{PASSWORD} of ada@stra\u00dfe.de")
        assert pair.status_code == 200, spelling
        assert (await api.me(pair.json()["access_token"])).json()["user_id"] == own["ada@stra\u00dfe.de"]


@pytest.mark.parametrize(
    ("taken", "other"),
    [
        pytest.param("k@example.com", "\u212a@example.com", id="Kelvin sign"),
        pytest.param("a@example.com", "\u00aa@example.com", id="ordinal"),
        pytest.param("a.b@example.com", "a\u2024b@example.com", id="leader dot"),
        pytest.param("fix@example.com", "\ufb01x@example.com", id="ligature"),
    ],
)
async def test_a_sign_that_only_nfkc_joins_with_another_is_nobodys(api: Api, taken: str, other: str) -> None:
    assert (await api.register(taken, PASSWORD)).status_code == 201
    problem = assert_problem(await api.register(other, PASSWORD), 422, "invalid_request")
    assert [error["field"] for error in problem["errors"]] == ["username"]
    assert (await api.login(taken, PASSWORD)).status_code == 200
    assert_problem(await api.login(other, PASSWORD), 401, "invalid_credentials")


async def test_the_username_is_told_as_it_was_typed(api: Api) -> None:
    typed = "\uff27race.Hopper@B\u00dcCHER.example"
    answer = await api.register(f" {typed}\n", PASSWORD)
    assert (answer.status_code, answer.json()["username"]) == (201, typed)


@pytest.mark.parametrize(
    "username",
    [
        pytest.param("a" + "\u0344" * 1200 + "\u0327" * 1200, id="marks"),
        pytest.param("a" + "\u0301" * 31 + "@example.com", id="one mark too many"),
        pytest.param("x" * 255, id="one character too many"),
    ],
)
async def test_what_is_too_much_to_normalise_is_counted_and_answered_as_any_unknown_user(
    api: Api, username: str
) -> None:
    unknown = await api.login(f"nobody-{len(username)}@example.com", WRONG)
    for _ in range(15):
        answer = await api.login(username, WRONG)
        assert (answer.status_code, answer.content) == (401, unknown.content)
        assert answer.headers.keys() == unknown.headers.keys()
    assert_problem(await api.login(f"  {username}", WRONG), 429, "login_locked")
    # Each such text is a name of its own: one does not lock the next.
    assert_problem(await api.login(username + "x", WRONG), 401, "invalid_credentials")

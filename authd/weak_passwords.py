"""Refuses the passwords that guessers try first: the commonest breached ones, and those made of the e-mail's name.

The list ships with the package, so that a registration asks nobody outside; see docs/login-defence.md for the choice.
"""

import unicodedata
from importlib.resources import files

LIST = "common_passwords.txt"
#: Shorter names stand in too many good passwords by chance.
NAME_CHARS_MIN = 4


class WeakPasswords:
    """Some 16,000 passwords in memory (1.5 MB), read once."""

    def __init__(self) -> None:
        self._common = frozenset((files("authd") / LIST).read_text("utf-8").splitlines())

    def check(self, password: str, username: str) -> str | None:
        """The broken rule as a sentence, or None. `username`: the e-mail address. Upper and lower case are alike.

        Call it for passwords within the limits of `check_password` only: folding takes long on what is beyond.
        """
        folded = _fold(password)
        if folded in self._common:
            return "The password is one of the commonest in known breaches."
        name = _fold(username.strip().rpartition("@")[0])
        if len(name) >= NAME_CHARS_MIN and name in folded:
            return "The password must not contain the name of your e-mail address."
        return None


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())

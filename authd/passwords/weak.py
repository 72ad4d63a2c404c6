"""Refuses the passwords that guessers try first: the commonest breached ones, and those made of the e-mail's name.

The list ships with the package, so that a registration asks nobody outside; see docs/login-defence.md for the choice.
"""

from importlib.resources import files

from authd.infra.text import fold
from authd.passwords.formats import PASSWORD_INPUT_CHARS_MAX

LIST = "common.txt"
#: Shorter names stand in too many good passwords by chance.
NAME_CHARS_MIN = 4


class WeakPasswords:
    """Some 16,000 passwords in memory (1.5 MB), read once."""

    def __init__(self) -> None:
        self._common = frozenset((files(__package__) / LIST).read_text("utf-8").splitlines())

    def check(self, password: str, username: str) -> str | None:
        """Return the broken rule as a sentence, or None. `username`: the e-mail address. Upper and lower case are
        alike.

        Text that is too long to be a password, or not bounded, is not checked: `check_password` refuses it.
        """
        folded = fold(password, PASSWORD_INPUT_CHARS_MAX)
        if folded is None:
            return None
        if folded in self._common:
            return "The password is one of the commonest in known breaches."
        name = fold(username.strip().rpartition("@")[0], PASSWORD_INPUT_CHARS_MAX)
        if name is not None and len(name) >= NAME_CHARS_MIN and name in folded:
            return "The password must not contain the name of your e-mail address."
        return None

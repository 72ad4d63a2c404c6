"""Loads the SQL statements: files of `-- name: x` headers, each followed by one statement."""

import re
from importlib.resources import files

_HEADER = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries(file_name: str) -> dict[str, str]:
    """The statements of `queries/<file_name>` by name."""
    text = (files(__package__) / "queries" / file_name).read_text("utf-8")
    _, *parts = _HEADER.split(text)
    return {name: statement.strip() for name, statement in zip(parts[::2], parts[1::2], strict=True)}

"""Loads the SQL statements: files of `-- name: x` headers, each followed by one statement."""

import re
from importlib.resources import files

_HEADER = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def load_queries(package: str, name: str = "postgres") -> dict[str, str]:
    """Return the statements of `<name>.sql` in the package, by their names."""
    text = (files(package) / f"{name}.sql").read_text("utf-8")
    _, *parts = _HEADER.split(text)
    return {name: statement.strip() for name, statement in zip(parts[::2], parts[1::2], strict=True)}

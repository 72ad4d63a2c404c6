"""The Lua scripts and the named queries: none unused, none unknown, and each reads what its header says."""

import ast
import re
from collections.abc import Iterator

import pytest
from support.scripts import AUTHD, INCLUDED, SCRIPTS, header, package_of, script_text

from authd.events.redis import FIELDS
from authd.infra.postgres.queries import load_queries

QUERIES = {path for path in AUTHD.rglob("*.sql") if path.parent.name != "migrations" and path.name != "schema.sql"}


def constants(tree: ast.AST) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def query_names(tree: ast.AST) -> Iterator[str]:
    """What stands in the brackets of `_QUERIES[...]`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "_QUERIES":
            choices = [node.slice.body, node.slice.orelse] if isinstance(node.slice, ast.IfExp) else [node.slice]
            yield from (choice.value for choice in choices if isinstance(choice, ast.Constant))


def body(name: str) -> str:
    return re.sub(r"--.*", "", script_text(name))


def test_every_query_is_used_and_every_used_one_is_there() -> None:
    used = {path: set(query_names(ast.parse(path.with_suffix(".py").read_text()))) for path in QUERIES}
    assert used == {path: set(load_queries(package_of(path), path.stem)) for path in QUERIES}


def test_every_script_is_loaded_or_included() -> None:
    named = set().union(*(constants(ast.parse(path.read_text())) for path in AUTHD.rglob("redis*/*.py")))
    named |= set().union(*(constants(ast.parse(path.read_text())) for path in AUTHD.rglob("redis.py")))
    assert named & SCRIPTS.keys() | INCLUDED == SCRIPTS.keys()


def test_scripts_record_events_with_the_fields_that_the_relay_reads() -> None:
    calls = [call for text in SCRIPTS.values() for call in re.findall(r"add_event\(KEYS[^)]*\)", text)]
    named = {name for call in calls for name in re.findall(r"'(\w)'", call)}
    assert named | {FIELDS["kind"]} == set(FIELDS.values())


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - INCLUDED))
def test_a_scripts_header_names_the_keys_and_arguments_that_it_reads(name: str) -> None:
    for kind, count in header(name).items():
        used = {int(number) for number in re.findall(rf"{kind}\[(\d+)\]", body(name))}
        assert used == set(range(1, count + 1)), kind
    text = SCRIPTS[name]
    assert text.startswith("-- ") and "\n-- Returns " in text
    # Keys come from KEYS alone: on a cluster another one would be in another slot.
    for call in re.findall(r"redis\.call\('\w+', ([^,)]+)", body(name)):
        assert re.fullmatch(r"KEYS\[\d\]|key", call), call

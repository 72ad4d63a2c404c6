"""The rules of the house that no linter knows: who may import whom, how long things get, and that the documents tell
of every setting, metric and log event that there is.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest

from authd.config import Secret, Settings, parse_settings, read_values
from authd.http.problems import PROBLEMS
from authd.observe.logs import RequestLine

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "authd"
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70

#: The layers, lowest first. A module imports from lower layers, and from its own room; what stands in no list is a use
#: case. The top alone sees all.
CONTRACT = {"config", "errors", "events", "text"}
PURE = {"base64url", "passwords", "observe", "breaker", "deadline", "fair_queue", "networks"}
#: Each made of those before it.
MADE_OF_PURE = [{"mac_tokens"}, {"refresh_tokens"}, {"tokens"}, {"announcements"}]
ROOMS = {"redis", "postgres", "kafka", "hasher"}
USE_CASES = 3 + len(MADE_OF_PURE)
EDGE = {"http"}
TOP = {"__init__", "__main__", "admin", "cli", "dev", "runtime", "stores", "workers"}
#: Real stores for development and tests: an island that only `dev` visits.
ISLAND = "embedded"

#: The only homes of the libraries that do something: a file, or a room.
HOMES = {
    "aiokafka": {"kafka"},
    "asyncpg": {"postgres"},
    "authlib": {"http"},
    "bcrypt": {"passwords.py"},
    "cryptography": {"mac_tokens.py", "tokens.py"},
    "dotenv": {"config.py"},
    "email_validator": {"accounts.py"},
    "h11": {"http"},
    "hypercorn": {"http"},
    "idna": {"accounts.py"},
    "joserfc": {"tokens.py"},
    "prometheus_client": {"observe", "http"},
    "quart": {"http"},
    "redis": {"redis"},
    "werkzeug": {"http"},
}
#: Settings that nothing reads yet. The list may only get shorter.
UNREAD_SETTINGS: set[str] = set()

LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
METRIC_SUFFIXES = ("_bucket", "_sum", "_count")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def house_files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def room_of(file: Path) -> str:
    """`redis` for authd/redis/client.py, `tokens` for authd/tokens.py."""
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[str]:
    """The dotted names of all modules that are imported anywhere in the file."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            # `from authd import runtime` names a module of ours; `from authd.config import Settings` does not.
            names = [f"authd.{alias.name}" for alias in node.names] if node.module == "authd" else []
            yield from names or [node.module]


def rooms_imported(file: Path) -> set[str]:
    """The other rooms of the house that the file imports from."""
    names = {name.split(".")[1] for name in imports_of(file) if name.startswith("authd.")}
    return {name for name in names if not name.startswith("__version")} - {room_of(file)}


def layer_of(room: str) -> int:
    layers = [CONTRACT, PURE, *MADE_OF_PURE, ROOMS, set(), EDGE, TOP]
    return next((height for height, layer in enumerate(layers) if room in layer), USE_CASES)


# Who may import whom


@pytest.mark.parametrize("file", house_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    room = room_of(file)
    if room == ISLAND:
        assert rooms_imported(file) == set()
        return
    height = layer_of(room)
    allowed_beside = height in (USE_CASES, USE_CASES + 2)  # use cases use each other, and so does the top
    wrong = {
        other
        for other in rooms_imported(file) - {ISLAND}
        if layer_of(other) > height or (layer_of(other) == height and not allowed_beside)
    }
    assert wrong == set()
    assert ISLAND not in rooms_imported(file) or room == "dev"


def test_use_cases_import_each_other_in_no_circle() -> None:
    graph = {room_of(file): rooms_imported(file) for file in house_files() if layer_of(room_of(file)) == USE_CASES}
    while leaves := {room for room, needs in graph.items() if not needs & graph.keys()}:
        graph = {room: needs for room, needs in graph.items() if room not in leaves}
    assert graph == {}


@pytest.mark.parametrize("library", sorted(HOMES))
def test_a_library_stays_at_home(library: str) -> None:
    users = {
        file.relative_to(HOUSE)
        for file in house_files()
        if room_of(file) != ISLAND and any(name.split(".")[0] == library for name in imports_of(file))
    }
    assert {str(file) for file in users if not {str(file), file.parts[0]} & HOMES[library]} == set()
    assert users, f"nothing imports {library}"


# How long things get


@pytest.mark.parametrize("folder", ["authd", "load", "scripts"])
def test_no_file_is_too_long(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".lua", ".sql", ".sh", "")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in files if file.is_file()}
    assert {file: count for file, count in lines.items() if count > FILE_LINES_MAX} == {}


@pytest.mark.parametrize("folder", ["authd", "load", "tests"])
def test_no_function_is_too_long(folder: str) -> None:
    long = {}
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    long[f"{file.relative_to(ROOT)}:{node.name}"] = length
    assert long == {}


def written_files() -> Iterator[Path]:
    """What people of this project wrote: not what tools made."""
    for folder in (".ci", "authd", "compose", "docs", "load", "scripts", "tests"):
        yield from (file for file in (ROOT / folder).rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    for name in (".env.example", "CHANGELOG.md", "README.md", "pyproject.toml", "tox.ini"):
        yield ROOT / name


def test_nothing_is_left_to_do_in_a_comment() -> None:
    marker = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    assert [str(file) for file in written_files() if marker.search(file.read_text("utf-8"))] == []


def test_no_path_of_a_machine_is_written_down() -> None:
    machine = re.compile("/(?:ro" + "ot|ho" + "me|wo" + "rk)/[a-z]")
    assert [str(file) for file in written_files() if machine.search(file.read_text("utf-8"))] == []


# Scripts and statements


def test_every_sql_statement_is_used() -> None:
    queries = HOUSE / "postgres" / "queries"
    named = {name for file in queries.iterdir() for name in re.findall(r"^-- name: (\w+)$", file.read_text(), re.M)}
    used = {name for file in (HOUSE / "postgres").glob("*.py") for name in re.findall(r'"(\w+)"', file.read_text())}
    assert named - used == set()


def test_every_lua_script_is_used_and_says_what_it_takes_and_returns() -> None:
    scripts = {file.stem: file.read_text() for file in (HOUSE / "redis" / "scripts").glob("*.lua")}
    python = "".join(file.read_text() for file in (HOUSE / "redis").glob("*.py"))
    included = {name for text in scripts.values() for name in re.findall(r"^-- include: (\w+)$", text, re.M)}
    for name, text in scripts.items():
        if name in included:
            continue
        assert f'"{name}"' in python, f"{name}.lua is not used"
        header = text[: re.search(r"^(?!--)", text, re.M).start()]  # type: ignore[union-attr]
        assert "-- KEYS" in header and "-- ARGV" in header and "-- Returns" in header, f"the header of {name}.lua"
    assert included <= scripts.keys()


def test_migrations_are_numbered_without_gaps() -> None:
    numbers = sorted(int(file.name[:4]) for file in (HOUSE / "postgres" / "migrations").glob("*.sql"))
    assert numbers == list(range(1, len(numbers) + 1))


# Settings and the documents


def settings() -> dict[str, msgspec.structs.FieldInfo]:
    return {f"AUTHD_{field.name.upper()}": field for field in msgspec.structs.fields(Settings)}


def test_every_setting_is_read() -> None:
    read = {
        node.attr
        for file in house_files()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert {field.name for field in settings().values()} - read == UNREAD_SETTINGS


def table_rows(document: str, first: str, section: str = "") -> dict[str, list[str]]:
    """The cells of each table row whose first cell is a `name` that begins with `first`."""
    rows = {}
    text = (ROOT / "docs" / document).read_text("utf-8")
    if section:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    for line in text.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and re.fullmatch(rf"`{first}\w*`", cells[0]):
            name = cells[0].strip("`")
            assert name not in rows, f"{name} stands twice in {document}"
            rows[name] = cells[1:]
    return rows


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    if field.default in ((), "") or field.default == Secret(""):
        return "empty"
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


def bounds_of(kind: Any) -> str | None:
    """The bounds as the document has them; None for texts, which have a word for their form there."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is not Annotated:
        return None
    limits = get_args(kind)[1]
    if limits.le is None:
        return None
    return f"{limits.ge} to {limits.le}" if limits.ge is not None else f"above {limits.gt:g}, to {limits.le:g}"


def test_the_document_of_settings_has_every_setting_with_its_default_and_bounds() -> None:
    documented = table_rows("settings.md", "AUTHD_")
    assert documented.keys() == settings().keys()
    for name, field in settings().items():
        _, default, bounds, meaning = documented[name]
        assert default == default_of(field), name
        assert bounds_of(field.type) in (bounds, None), name
        assert meaning.endswith("."), name


def test_the_example_file_has_every_setting_once_and_uncommented_it_is_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / ".env.example").read_text("utf-8")
    names = re.findall(r"^#?(AUTHD_[A-Z0-9_]+)=", text, re.M)
    assert sorted(names) == sorted(settings())
    file = tmp_path / ".env"
    file.write_text(re.sub(r"^#(AUTHD_)", r"\1", text, flags=re.M))
    required = {"AUTHD_DATABASE_URL": "postgresql://x", "AUTHD_REDIS_URL": "redis://x", "AUTHD_SECRET": "x" * 32}
    assert parse_settings(read_values({}, env_file=file) | required) == parse_settings(required)


def test_the_example_file_starts_a_service_once_its_secret_is_set(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        (ROOT / ".env.example").read_text("utf-8").replace("AUTHD_SECRET=\n", f"AUTHD_SECRET={'x' * 32}\n", 1)
    )
    assert parse_settings(read_values({}, env_file=file)).secret == Secret("x" * 32)


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md", "docs/operations.md", "docs/settings.md"])
def test_a_document_names_no_setting_that_does_not_exist(document: str) -> None:
    named = set(re.findall(r"AUTHD_[A-Z0-9_]*[A-Z0-9]", (ROOT / document).read_text("utf-8")))
    assert named - settings().keys() == set()


@pytest.mark.parametrize(
    "document", ["README.md", "CHANGELOG.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_a_document_lead_somewhere(document: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / document).read_text("utf-8"))
    assert [target for target in targets if not ((ROOT / document).parent / target).exists()] == []


def test_the_readme_has_every_file_of_the_house() -> None:
    """One line for each file and room, so that a stranger can name its job in a minute."""
    readme = (ROOT / "README.md").read_text("utf-8")
    names = [f"{path.name}/" if path.is_dir() else path.name for path in HOUSE.iterdir()]
    jobless = {"__pycache__/", "__init__.py", "__main__.py", "py.typed"}
    assert [name for name in sorted(set(names) - jobless) if not re.search(rf"(?<![\w/]){name}", readme)] == []


def routes() -> set[str]:
    """The method and path of every endpoint."""
    found = set()
    for file in (HOUSE / "http").glob("*.py"):
        [prefix] = re.findall(r'url_prefix="([^"]*)"', file.read_text("utf-8")) or [""]
        for method, rule in re.findall(r'@routes\.(\w+)\("([^"]*)"\)', file.read_text("utf-8")):
            found.add(f"{method.upper()} {prefix}{re.sub('<[^>]*>', '<id>', rule)}")
    return found


def test_the_readme_has_every_endpoint() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert [route for route in sorted(routes()) if f"`{route}`" not in readme] == []
    assert len(routes()) > 5


def test_the_threat_model_names_tests_that_exist() -> None:
    named = re.findall(
        r"((?:unit|service|e2e|fault)/test_\w+\.py)(?:::(test_\w+))?",
        (ROOT / "docs" / "threat-model.md").read_text("utf-8"),
    )
    assert named
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)


# Metrics and log events


def metrics() -> dict[str, list[str]]:
    """The labels of every metric by name."""
    found = {}
    for node in ast.walk(tree_of(HOUSE / "observe" / "metrics.py")):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("Counter", "Gauge", "Histogram")
        ):
            name, *others = (ast.literal_eval(argument) for argument in node.args)
            found[name] = next((value for value in others if isinstance(value, list)), [])
    return found


def test_every_metric_is_documented_with_its_labels_and_no_other() -> None:
    documented = table_rows("operations.md", "authd_")
    assert documented.keys() == metrics().keys()
    for name, labels in metrics().items():
        assert re.findall(r"`(\w+)`", documented[name][0]) == labels, name
    mentioned = set(re.findall(r"\bauthd_[a-z_]+[a-z]", (ROOT / "docs" / "operations.md").read_text("utf-8")))
    assert {name for name in mentioned if not name.endswith(METRIC_SUFFIXES)} - metrics().keys() == set()


def log_events() -> dict[str, str]:
    """The level of every event that is logged with a constant name, and of the one that has a struct of its own."""
    found = {RequestLine.__struct_defaults__[1]: ""}
    for file in house_files():
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.Call) or room_of(file) == ISLAND:
                continue
            method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if owner == "_log" and method in LOG_METHODS:
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: an event's name is a constant"
                found[node.args[0].value] = "error" if method == "exception" else method
            elif method == "log" and not owner:
                for text in (part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)):
                    if isinstance(text.value, str):
                        found[text.value] = ""
    return found


def test_every_log_event_is_documented_and_no_other() -> None:
    documented = table_rows("operations.md", "", section="Logs")
    events = log_events()
    assert documented.keys() == events.keys()
    for name, level in events.items():
        assert level in documented[name][0], name


def test_the_changelog_has_a_place_for_what_is_not_released() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert headings[0] == "Unreleased"


def test_every_stable_code_is_documented() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    assert [code for code in PROBLEMS if f"`{code}`" not in text] == []

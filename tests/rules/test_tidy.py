"""Project rules that no linter knows: sizes, and documents that must match the code.

Who may import whom is in pyproject.toml, for import-linter.
"""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
import pytest
from support.declared import declared_endpoints
from support.paths import ROOT

from authd.config import Secret, Settings, parse_settings, read_values
from authd.infra.http.problems import PROBLEMS
from authd.infra.observe.logs import RequestLine

HOUSE = ROOT / "authd"
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
NESTING_MAX = 4
PARAMETERS_MAX = 8

#: Settings that nothing reads yet. The list may only get shorter.
UNREAD_SETTINGS: set[str] = set()

BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical"}
METRIC_SUFFIXES = ("_bucket", "_sum", "_count")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def functions_of(folder: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file.relative_to(ROOT)}:{node.name}", node


def house_files() -> list[Path]:
    return sorted(HOUSE.rglob("*.py"))


def room_of(file: Path) -> str:
    """`redis` for authd/redis/client.py, `tokens` for authd/tokens.py."""
    return file.relative_to(HOUSE).parts[0].removesuffix(".py")


# How long things get


@pytest.mark.parametrize("folder", ["authd", "load", "scripts"])
def test_no_file_is_too_long(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".lua", ".sql", ".sh", "")]
    lines = {str(file.relative_to(ROOT)): len(file.read_text("utf-8").splitlines()) for file in files if file.is_file()}
    assert {file: count for file, count in lines.items() if count > FILE_LINES_MAX} == {}


@pytest.mark.parametrize("folder", ["authd", "load", "tests"])
def test_no_function_is_too_long(folder: str) -> None:
    lines = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions_of(folder)}
    assert {name: count for name, count in lines.items() if count > FUNCTION_LINES_MAX} == {}


def nesting_of(node: ast.AST) -> int:
    """Return how many blocks are inside one another. An `elif` is beside its `if`; a function inside counts alone."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting_of(child) + (isinstance(child, BLOCKS) and not is_elif))
    return deepest


def test_no_function_nests_too_deep() -> None:
    depths = {name: nesting_of(node) for name, node in functions_of("authd")}
    assert {name: depth for name, depth in depths.items() if depth > NESTING_MAX} == {}
    assert max(depths.values()) > 1


@pytest.mark.parametrize("folder", ["authd", "load"])
def test_no_function_has_too_many_parameters(folder: str) -> None:
    counts = {}
    for name, node in functions_of(folder):
        # Those that a call has to name do not count: a declaration is a table with a row for each.
        parameters = [*node.args.posonlyargs, *node.args.args]
        counts[name] = len([parameter for parameter in parameters if parameter.arg not in ("self", "cls")])
    assert {name: count for name, count in counts.items() if count > PARAMETERS_MAX} == {}


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


def test_migrations_are_numbered_without_gaps() -> None:
    numbers = sorted(int(file.name[:4]) for file in (HOUSE / "infra" / "postgres" / "migrations").glob("*.sql"))
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
    "document",
    ["README.md", "CHANGELOG.md", "SECURITY.md", *(f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md"))],
)
def test_links_of_a_document_lead_somewhere(document: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", (ROOT / document).read_text("utf-8"))
    for target, heading in links:
        file = (ROOT / document).parent / target if target else ROOT / document
        assert file.exists(), target
        assert not heading or heading in anchors_of(file), f"{target}#{heading}"


def anchors_of(file: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document", ["README.md", "docs/architecture.md", "docs/login-defence.md", "docs/operations.md"]
)
def test_a_document_names_no_file_that_does_not_exist(document: str) -> None:
    named = set(re.findall(r"`((?:\w+/)+\w+\.\w+)`", (ROOT / document).read_text("utf-8")))
    assert [path for path in sorted(named) if not (HOUSE / path).exists() and not (ROOT / path).exists()] == []


def test_the_picture_of_the_architecture_is_the_order_of_imports() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    boxes = [" & ".join(name.strip() for name in layer.split("|")) for layer in layers]
    [picture] = re.findall(
        r"```mermaid\nflowchart TD\n(.*?)```", (ROOT / "docs/architecture.md").read_text("utf-8"), re.S
    )
    arrows = [line.strip() for line in picture.splitlines()]
    assert arrows == [f"{upper} --> {lower}" for upper, lower in pairwise(boxes)]
    assert len(arrows) > 5


def test_the_readme_has_every_file_of_the_house() -> None:
    """One line for each file and room, so that a stranger can name its job in a minute."""
    readme = (ROOT / "README.md").read_text("utf-8")
    names = [f"{path.name}/" if path.is_dir() else path.name for path in HOUSE.iterdir()]
    jobless = {"__pycache__/", "__init__.py", "__main__.py", "py.typed"}
    assert [name for name in sorted(set(names) - jobless) if not re.search(rf"(?<![\w/]){name}", readme)] == []


def test_the_readme_has_every_endpoint_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    named = set(re.findall(r"^\| `((?:GET|POST|DELETE) [^`]*)` \|", readme, re.M))
    assert named == {re.sub("<[^>]*>", "<id>", endpoint.name) for endpoint in declared_endpoints()}


def test_the_threat_model_names_tests_that_exist() -> None:
    named = re.findall(
        r"((?:unit|integration|e2e|fault|rules)/(?:\w+/)?test_\w+\.py)(?:::(test_\w+))?",
        (ROOT / "docs" / "threat-model.md").read_text("utf-8"),
    )
    assert named
    for file, test in named:
        assert f"def {test}" in (ROOT / "tests" / file).read_text("utf-8"), (file, test)


# Metrics and log events


def metrics() -> dict[str, list[str]]:
    """The labels of every metric by name."""
    found = {}
    for node in ast.walk(tree_of(HOUSE / "infra" / "observe" / "metrics.py")):
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
            if not isinstance(node, ast.Call) or room_of(file) == "embedded":
                continue
            method = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if owner == "_log" and method in LOG_METHODS:
                assert isinstance(node.args[0], ast.Constant), f"{file}:{node.lineno}: an event's name is a constant"
                found[node.args[0].value] = "error" if method == "exception" else method
            elif any(
                keyword.arg == "event" and isinstance(node.args[0], ast.Name | ast.Attribute)
                for keyword in node.keywords
            ) and "every" in (method, getattr(node.args[0], "id", "")):
                found |= {keyword.value.value: "warning" for keyword in node.keywords if keyword.arg == "event"}
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

"""Logs as an operator gets them: from a process of its own, whose logging starts, runs and ends once."""

import json
import logging
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from authd.config import ConfigError
from authd.infra.observe.log_file import LogFile
from authd.infra.observe.logs import LOG_FILE, _file_handler

PROGRAM = """
import logging, sys
import structlog
from authd.config import Secret, parse_settings
from authd.infra.observe.logs import start_logs
from authd.sessions.sessions import TokenPair
from authd.tokens.ring import MacKey

settings = parse_settings({
    "AUTHD_DATABASE_URL": "postgresql://authd:store-password@localhost/authd",
    "AUTHD_REDIS_URL": "redis://localhost",
    "AUTHD_SECRET": "the-master-secret-of-these-tests-",
    "AUTHD_LOG_DIR": sys.argv[1],
})
start_logs(settings, worker=int(sys.argv[2]))
log = structlog.get_logger("authd.anything")
log.info("first", number=1, text="ç字\\n", path=None)
log.debug("hidden")
with structlog.contextvars.bound_contextvars(request_id="r-1"):
    log.warning("with_context")
log.info("structs", settings=settings, secret=settings.secret, key=MacKey(1, b"mac-secret", 0.0),
         pair=TokenPair(access_token="access-secret", refresh_token="refresh-secret", expires_in=1))
log.info("odd", number=2**70, raw=b"raw", odd={1, 2}.__class__)
try:
    raise RuntimeError("broken")
except RuntimeError as error:
    log.error("fault", exc_info=error)
logging.getLogger("some.library").warning("of a %s", "library")
logging.getLogger("quart.app").info("noise")
log.info("last")
"""


def run(folder: Path, worker: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(worker)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "media" / "logs"


@pytest.fixture(scope="module")
def output(folder: Path) -> str:
    return run(folder).stderr


@pytest.fixture(scope="module")
def lines(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


def named(lines: list[dict], event: str) -> dict:
    [found] = [line for line in lines if line["event"] == event]
    return found


def test_every_line_is_an_object_and_the_last_one_is_written_at_exit(lines: list[dict]) -> None:
    assert [line["event"] for line in lines] == [
        "first",
        "with_context",
        "structs",
        "odd",
        "fault",
        "of a library",
        "last",
    ]
    for line in lines:
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta(0)
        assert line["level"] in ("info", "warning", "error")


def test_the_file_holds_what_standard_error_showed(folder: Path, output: str) -> None:
    assert (folder / LOG_FILE).read_text("utf-8") == output


def test_fields_are_kept(lines: list[dict]) -> None:
    assert named(lines, "first") | {"timestamp": ""} == {
        "event": "first",
        "level": "info",
        "timestamp": "",
        "number": 1,
        "text": "ç字\n",
        "path": None,
    }
    assert named(lines, "with_context")["request_id"] == "r-1"
    assert "request_id" not in named(lines, "last")


def test_an_error_has_its_traceback_in_its_line(lines: list[dict]) -> None:
    assert "RuntimeError: broken" in named(lines, "fault")["exception"]


def test_a_librarys_line_is_the_same_kind_of_object(lines: list[dict]) -> None:
    assert named(lines, "of a library")["level"] == "warning"


def test_structs_that_hold_secrets_hide_them(output: str) -> None:
    for secret in ("store-password", "the-master-secret", "mac-secret", "access-secret", "refresh-secret"):
        assert secret not in output


def test_each_worker_has_a_file_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, worker=2)
    assert [file.name for file in tmp_path.iterdir()] == ["auth_service.worker-2.log"]


DAY = date(2026, 11, 25)
BYTES_MAX = 8 * 1000


@pytest.fixture
def days() -> list[date]:
    """What the clock says: its last entry."""
    return [DAY]


@pytest.fixture
def make_file(tmp_path: Path, days: list[date]) -> Iterator[Callable[[], LogFile]]:
    with ExitStack() as stack:

        def make() -> LogFile:
            file = LogFile(tmp_path / "logs" / LOG_FILE, days=2, bytes_max=BYTES_MAX, today=lambda: days[-1])
            stack.callback(file.close)
            return file

        yield make


def emit(file: LogFile, *lines: str) -> None:
    file.handle(logging.makeLogRecord({"msg": "\n".join(lines)}))


def contents(folder: Path) -> dict[str, str]:
    """The text of each file by what follows its name."""
    files = sorted((folder / "logs").iterdir())
    return {file.name.removeprefix(LOG_FILE).lstrip("."): file.read_text() for file in files}


def test_the_file_is_rotated_at_midnight_and_old_ones_go(
    make_file: Callable[[], LogFile], days: list[date], tmp_path: Path
) -> None:
    file = make_file()
    for number in range(4):
        days.append(DAY + timedelta(days=number))
        emit(file, f"line of day {number}", "another")
    assert contents(tmp_path) == {
        "": "line of day 3\nanother\n",
        "2026-11-26": "line of day 1\nanother\n",
        "2026-11-27": "line of day 2\nanother\n",
    }


def test_a_clock_that_goes_back_rotates_nothing(
    make_file: Callable[[], LogFile], days: list[date], tmp_path: Path
) -> None:
    file = make_file()
    emit(file, "one")
    days.append(DAY - timedelta(days=1))
    emit(file, "two")
    assert contents(tmp_path) == {"": "one\ntwo\n"}


def test_a_restart_goes_on_with_the_file_and_rotates_that_of_an_earlier_day(
    make_file: Callable[[], LogFile], days: list[date], tmp_path: Path
) -> None:
    emit(make_file(), "before")
    path = tmp_path / "logs" / LOG_FILE
    for day in (DAY, DAY - timedelta(days=1)):
        noon = datetime(day.year, day.month, day.day, 12, tzinfo=UTC).timestamp()
        os.utime(path, (noon, noon))
        emit(make_file(), "after")
        days.append(DAY)
    assert contents(tmp_path) == {"": "after\n", "2026-11-24": "before\nafter\n"}


def test_a_flood_never_takes_more_than_the_bound_and_displaces_the_oldest(
    make_file: Callable[[], LogFile], tmp_path: Path
) -> None:
    file = make_file()
    lines = [f"{number:06}" for number in range(3 * BYTES_MAX // 7)]
    for start in range(0, len(lines), 250):  # more at once than a file may have
        emit(file, *lines[start : start + 250])
        assert sum(map(len, contents(tmp_path).values())) <= BYTES_MAX
    found = contents(tmp_path)
    newest = found.pop("")
    in_order = sorted(found, key=lambda name: int(name.removeprefix("2026-11-25").lstrip(".") or 0))
    kept = ("".join(found[name] for name in in_order) + newest).split()
    assert kept == lines[-len(kept) :]
    assert len(kept) * 7 >= BYTES_MAX * 3 / 4


def test_a_day_of_several_files_keeps_them_beside_other_days(
    make_file: Callable[[], LogFile], days: list[date], tmp_path: Path
) -> None:
    file = make_file()
    for letter in "abc":
        emit(file, letter * 900)
    days.append(DAY + timedelta(days=1))
    emit(file, "d")
    assert {name: text[0] for name, text in contents(tmp_path).items()} == {
        "": "d",
        "2026-11-25": "a",
        "2026-11-25.1": "b",
        "2026-11-25.2": "c",
    }


def test_a_line_that_no_file_has_room_for_is_cut(make_file: Callable[[], LogFile], tmp_path: Path) -> None:
    emit(make_file(), "x" * 2500)
    assert sorted(map(len, contents(tmp_path).values())) == [501, 1000, 1000]


def test_files_of_others_in_the_folder_stay(make_file: Callable[[], LogFile], days: list[date], tmp_path: Path) -> None:
    file = make_file()
    names = [f"{LOG_FILE}.2020-01-01.gz", f"{LOG_FILE}.2020-13-01", f"other-{LOG_FILE}.2020-01-01"]
    for name in names:
        (tmp_path / "logs" / name).touch()
    emit(file, "one")
    days.append(DAY + timedelta(days=1))
    emit(file, "two")
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {*names, LOG_FILE, f"{LOG_FILE}.2026-11-25"}


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_file_is_closed_to_other_users_whatever_the_umask(
    make_file: Callable[[], LogFile], days: list[date], tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        file = make_file()
        emit(file, "one")
        days.append(DAY + timedelta(days=1))
        emit(file, "two")
    finally:
        os.umask(before)
    folder = tmp_path / "logs"
    assert [mode_of(path) for path in (folder, *folder.iterdir())] == [0o750, 0o640, 0o640]


def test_what_an_earlier_authd_left_open_to_all_is_closed_and_what_is_tighter_stays(
    make_file: Callable[[], LogFile], tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir(mode=0o700)
    modes = {LOG_FILE: 0o644, f"{LOG_FILE}.2026-11-24": 0o666, f"{LOG_FILE}.2026-11-23": 0o600}
    for name, mode in modes.items():
        (folder / name).touch()
        (folder / name).chmod(mode)
    make_file()
    assert mode_of(folder) == 0o700
    assert [mode_of(folder / name) for name in modes] == [0o640, 0o640, 0o600]


def test_lines_that_the_disk_does_not_take_are_counted_and_the_next_are_written(
    make_file: Callable[[], LogFile], tmp_path: Path
) -> None:
    file = make_file()
    emit(file, "one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with capture_logs() as said:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4, limits[1]))
            emit(file, "two", "three")
            emit(file, "four")
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            emit(file, "five")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [(line["event"], line.get("lines_lost")) for line in said] == [
        ("log_file_not_written", None),
        ("log_file_written_again", 3),
    ]
    assert contents(tmp_path) == {"": "one\nfive\n"}


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_that_cannot_be_written_is_said_so(make_settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="AUTHD_LOG_DIR cannot be written"):
        _file_handler(make_settings(log_dir=tmp_path / "file"), 0)

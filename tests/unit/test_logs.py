"""Logs as an operator gets them: from a process of its own, whose logging starts, runs and ends once."""

import json
import logging
import subprocess
import sys
from datetime import datetime, timedelta
from logging.handlers import TimedRotatingFileHandler
from pathlib import Path

import pytest

from authd.config import ConfigError
from authd.observe.logs import LOG_FILE, _file_handler

PROGRAM = """
import logging, sys
import structlog
from authd.config import Secret, parse_settings
from authd.observe.logs import start_logs
from authd.sessions import TokenPair
from authd.tokens import MacKey

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


@pytest.fixture
def handler(make_settings, tmp_path: Path):
    handler = _file_handler(make_settings(log_dir=tmp_path / "logs", log_days=2), 0)
    yield handler
    handler.close()


def test_the_file_is_rotated_at_midnight_and_old_ones_go(handler: TimedRotatingFileHandler, tmp_path: Path) -> None:
    assert (handler.when, handler.utc, handler.backupCount) == ("MIDNIGHT", True, 2)
    for day in range(4):
        handler.emit(logging.makeLogRecord({"msg": f"day {day}"}))
        handler.rolloverAt = handler.computeRollover(int(datetime(2026, 1, 1 + day).timestamp()))
        handler.doRollover()
    handler.emit(logging.makeLogRecord({"msg": "today"}))
    files = sorted(file.name for file in (tmp_path / "logs").iterdir())
    assert files[0] == LOG_FILE
    assert len(files) == 3
    assert (tmp_path / "logs" / LOG_FILE).read_text() == "today\n"


def test_a_folder_that_cannot_be_written_is_said_so(make_settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="AUTHD_LOG_DIR cannot be written"):
        _file_handler(make_settings(log_dir=tmp_path / "file"), 0)

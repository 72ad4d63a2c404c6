"""Structured logs: one JSON object a line, to standard error and to a file (see `log_file.py`).

The event loop only appends lines to a bounded buffer; a thread writes what has gathered, a few times a second: a thread
that is woken for each line costs a request more than all else that authd does for it. No secret is ever passed to a
logger; what the libraries say goes the same way.
"""

import atexit
import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import structlog

from authd.config import ConfigError, Settings
from authd.infra.observe.log_file import LogFile

LOG_FILE = "auth_service.log"
#: Lines that wait for a slow disk; beyond, the oldest are dropped rather than kept in memory or waited for.
BUFFER_LINES_MAX = 20_000
WRITE_INTERVAL_S = 0.1
#: Libraries whose information is noise at ours.
_QUIET = ("aiokafka", "asyncio", "hypercorn", "kafka", "quart")


class RequestLine(msgspec.Struct, kw_only=True):
    """The line that every answer leaves. `peer` is the socket's address, `address` the client's, which differs behind a
    trusted proxy; `code` that of the problem, if it was one.
    """

    request_id: str
    method: str
    route: str
    status: int
    ms: float
    peer: str
    address: str
    code: str | msgspec.UnsetType = msgspec.UNSET
    event: str = "request"
    level: str = "info"
    timestamp: str = ""


class LineWriter:
    """Gathers lines and writes them from a thread of its own. `debug` to `critical` are structlog's way in."""

    def __init__(self, handlers: list[logging.Handler]) -> None:
        self._handlers = handlers
        self._lines: deque[str] = deque(maxlen=BUFFER_LINES_MAX)
        self._dropped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        self._dropped += len(self._lines) == BUFFER_LINES_MAX
        self._lines.append(line)

    debug = info = warning = error = critical = write

    def close(self) -> None:
        """Write what waits, and no more."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(WRITE_INTERVAL_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        lines = []
        while self._lines:
            lines.append(self._lines.popleft())
        dropped, self._dropped = self._dropped, 0
        if dropped:
            lines.append(f'{{"event":"log_lines_dropped","level":"error","lines":{dropped}}}')
        if lines:
            # One record for all of them: the handlers rotate, write and flush once.
            record = logging.LogRecord("authd", logging.INFO, "", 0, "\n".join(lines), None, None)
            for handler in self._handlers:
                handler.handle(record)


class _LibraryHandler(logging.Handler):
    """What the libraries log becomes the same kind of line."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(self.format(record))
        except Exception:  # a library's broken log call is no fault of the service
            self._writer.write(f'{{"event":"unreadable_log_record","logger":"{record.name}"}}')


_writer: LineWriter | None = None
_level = logging.INFO


def start_logs(settings: Settings, worker: int | None = 0) -> None:
    """Set up logging for this process; whatever waits is written at exit. Without a number there is no file.

    :raises ConfigError: when the folder of the log file cannot be written.
    """
    global _writer, _level
    level = _level = getattr(logging, settings.log_level.upper())
    files = [] if worker is None else [_file_handler(settings, worker)]
    _writer = LineWriter([logging.StreamHandler(sys.stderr), *files])
    atexit.register(flush_logs)
    renderer = structlog.processors.JSONRenderer(serializer=_encode)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    writer = _writer
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    handler = _LibraryHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def log_request(line: RequestLine, level: int) -> None:
    """Log the line of a request, without structlog, whose chain costs a request several times as much as the line
    itself.
    """
    if _writer is not None and level >= _level:
        line.level = logging.getLevelName(level).lower()
        line.timestamp = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        _writer.write(msgspec.json.encode(line).decode())


def flush_logs() -> None:
    """Write the lines that wait and stop logging: the last thing a process does."""
    global _writer
    if _writer is not None:
        _writer.close()
        _writer = None


def _file_handler(settings: Settings, worker: int) -> logging.Handler:
    folder = Path(settings.log_dir)
    name = LOG_FILE if worker == 0 else LOG_FILE.replace(".", f".worker-{worker}.")
    try:
        # A file for each worker: two processes cannot rotate one.
        return LogFile(folder / name, days=settings.log_days, bytes_max=settings.log_bytes_per_worker)
    except OSError as error:
        raise ConfigError(f"AUTHD_LOG_DIR cannot be written: {error.strerror}.") from None


def _encode(fields: dict[str, Any], **_: Any) -> str:
    return msgspec.json.encode({name: _plain(value) for name, value in fields.items()}).decode()


def _plain(value: Any) -> Any:
    # Anything but plain data shows its repr, which hides secrets: msgspec would write out a struct's fields.
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else repr(value)

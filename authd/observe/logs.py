"""Structured logs: one JSON object a line, to standard error and to a file that is rotated daily.

The event loop only puts lines into a bounded queue; a thread writes them. No secret is ever passed to a logger; what
the libraries say goes the same way.
"""

import atexit
import logging
import queue
import sys
from collections.abc import Callable
from logging.handlers import QueueHandler, QueueListener, TimedRotatingFileHandler
from pathlib import Path
from typing import Any

import msgspec
import structlog

from authd.config import ConfigError, Settings

LOG_FILE = "auth_service.log"
#: Lines that wait for a slow disk; more are dropped rather than kept in memory or waited for.
QUEUE_LINES_MAX = 20_000
#: Libraries whose information is noise at ours.
_QUIET = ("aiokafka", "asyncio", "hypercorn", "kafka", "quart")


class _DroppingQueueHandler(QueueHandler):
    """Never blocks, never prints a traceback about logging."""

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return


def start_logs(settings: Settings, worker: int | None = 0) -> None:
    """Set up logging for this process; whatever waits is written at exit. Without a number there is no file.

    :raises ConfigError: when the folder of the log file cannot be written.
    """
    level = getattr(logging, settings.log_level.upper())
    renderer = structlog.processors.JSONRenderer(serializer=_encode)
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    library_lines = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer], foreign_pre_chain=shared
    )
    lines: queue.Queue[logging.LogRecord] = queue.Queue(QUEUE_LINES_MAX)
    handler = _DroppingQueueHandler(lines)
    handler.setFormatter(_Formatter(library_lines))
    files = [] if worker is None else [_file_handler(settings, worker)]
    listener = QueueListener(lines, logging.StreamHandler(sys.stderr), *files)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    listener.start()
    global _stop
    _stop = listener.stop
    atexit.register(flush_logs)


_stop: Callable[[], None] | None = None


def flush_logs() -> None:
    """Write the lines that wait and stop logging: the last thing a process does."""
    global _stop
    if _stop is not None:
        _stop()
        _stop = None


class _Formatter(logging.Formatter):
    """Our own lines are rendered already; a library's become the same kind of object."""

    def __init__(self, library_lines: logging.Formatter) -> None:
        super().__init__()
        self._library_lines = library_lines

    def format(self, record: logging.LogRecord) -> str:
        if record.name.partition(".")[0] == "authd":
            return record.getMessage()
        return self._library_lines.format(record)


def _file_handler(settings: Settings, worker: int) -> logging.Handler:
    folder = Path(settings.log_dir)
    name = LOG_FILE if worker == 0 else LOG_FILE.replace(".", f".worker-{worker}.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file for each worker: two processes cannot rotate one.
        return TimedRotatingFileHandler(
            folder / name, when="midnight", backupCount=settings.log_days, encoding="utf-8", utc=True
        )
    except OSError as error:
        raise ConfigError(f"AUTHD_LOG_DIR cannot be written: {error.strerror}.") from None


def _encode(fields: dict[str, Any], **_: Any) -> str:
    return msgspec.json.encode({name: _plain(value) for name, value in fields.items()}).decode()


def _plain(value: Any) -> Any:
    # Anything but plain data shows its repr, which hides secrets: msgspec would write out a struct's fields.
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else repr(value)

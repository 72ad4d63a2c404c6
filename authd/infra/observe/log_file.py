"""The log file: rotated at midnight UTC and whenever it is large, bounded in all, and closed to other users.

What a flood writes displaces the oldest lines, never the newest, and never fills the disk. Standard error has every
line: whoever collects it loses nothing.
"""

import logging
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import msgspec
import structlog

#: Whoever reads the log is in the group of the process; it holds addresses and user ids. The umask has no say.
FILE_MODE, FOLDER_MODE = 0o640, 0o750
#: A file is rotated when it holds one of so many parts of the bytes that all may have.
PARTS = 8

_log = structlog.get_logger()


class LogFile(logging.Handler):
    """Writes to `file`. Rotated files are `<file>.<day>`, then `<file>.<day>.1` and so on where a day has several.

    They are kept for `days`, and all files together have at most `bytes_max`: beyond, the oldest are deleted.

    :raises OSError: when the file cannot be opened. Later errors are logged once and tried again at the next lines.
    """

    def __init__(
        self,
        file: Path,
        *,
        days: int,
        bytes_max: int,
        today: Callable[[], date] = lambda: datetime.now(UTC).date(),
    ) -> None:
        super().__init__()
        self._file = file
        self._days = days
        self._bytes_max = bytes_max
        self._part_bytes = bytes_max // PARTS
        self._today = today
        self._rotated_name = re.compile(re.escape(file.name) + r"\.(\d{4}-\d\d-\d\d)(?:\.(\d{1,9}))?")
        self._lines_lost = 0
        self._descriptor: int | None = None
        self._size = 0
        self._day = today()
        _make_folder(file.parent)
        self._open()
        for one in self._rotated():
            with suppress(OSError):  # of an authd before, which had left them to the umask
                one.path.chmod(stat.S_IMODE(one.path.stat().st_mode) & FILE_MODE)

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record) + "\n"
        try:
            for chunk in _chunks(text.encode(errors="backslashreplace"), self._part_bytes):
                self._write(chunk)
        except OSError as error:
            if not self._lines_lost:
                _log.error("log_file_not_written", cause=error.strerror)
            self._lines_lost += text.count("\n")
            return
        if self._lines_lost:
            _log.warning("log_file_written_again", lines_lost=self._lines_lost)
            self._lines_lost = 0

    def close(self) -> None:
        self._close()
        super().close()

    def _write(self, chunk: bytes) -> None:
        descriptor = self._open() if self._descriptor is None else self._descriptor
        # A clock that goes back rotates nothing.
        if self._size and (self._today() > self._day or self._size + len(chunk) > self._part_bytes):
            descriptor = self._rotate()
        while chunk:
            written = os.write(descriptor, chunk)
            self._size += written
            chunk = chunk[written:]

    def _open(self) -> int:
        is_new = not self._file.exists()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._descriptor = descriptor = os.open(self._file, flags, FILE_MODE)
        found = os.fstat(descriptor)
        with suppress(PermissionError):  # somebody else's file
            os.fchmod(descriptor, FILE_MODE if is_new else stat.S_IMODE(found.st_mode) & FILE_MODE)
        self._size = found.st_size
        # What an earlier process left belongs to the day of its last line.
        self._day = datetime.fromtimestamp(found.st_mtime, UTC).date() if found.st_size else self._today()
        return descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _rotate(self) -> int:
        self._close()
        numbers = [one.number for one in self._rotated() if one.day == self._day]
        suffix = f".{max(numbers) + 1}" if numbers else ""
        self._file.rename(self._file.with_name(f"{self._file.name}.{self._day}{suffix}"))
        descriptor = self._open()
        self._prune()
        return descriptor

    def _prune(self) -> None:
        """Delete what is too old, and the oldest until a full file has room beside the others."""
        first_day = self._today() - timedelta(days=self._days)
        rotated = self._rotated()
        total = sum(one.size for one in rotated)
        for one in rotated:
            is_over = total + self._part_bytes > self._bytes_max
            if one.day < first_day or is_over:
                one.path.unlink(missing_ok=True)
                total -= one.size
                if one.day >= first_day:
                    _log.warning("log_file_dropped", file=one.path.name)

    def _rotated(self) -> list["_Rotated"]:
        """Return the rotated files, oldest first."""
        found = []
        for path in self._file.parent.iterdir():
            if (name := self._rotated_name.fullmatch(path.name)) is None:
                continue
            with suppress(FileNotFoundError, ValueError):  # deleted just now, or no day of any month
                found.append(_Rotated(date.fromisoformat(name[1]), int(name[2] or 0), path.stat().st_size, path))
        return sorted(found, key=lambda one: (one.day, one.number))


class _Rotated(msgspec.Struct, frozen=True):
    day: date
    number: int
    size: int
    path: Path


def _make_folder(folder: Path) -> None:
    """Make the folder where it is missing; one that is there keeps the mode that somebody gave it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(FOLDER_MODE)
        folder.chmod(FOLDER_MODE)


def _chunks(text: bytes, size: int) -> Iterator[bytes]:
    """Whole lines, at most `size` bytes of them at once; a longer line is cut into several."""
    while len(text) > size:
        end = text.rfind(b"\n", 0, size) + 1 or size
        yield text[:end]
        text = text[end:]
    yield text

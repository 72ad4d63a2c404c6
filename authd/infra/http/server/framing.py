"""Cuts a connection's bytes into requests, by rules stricter than the parser's, and gives the parser no other byte.

Where a proxy in front of us and we disagree about where a header line or a request ends, an attacker smuggles a request
past the proxy. So every refusal that a look at the raw bytes can decide is here, in one place. No I/O, and no parser.
"""

import re
from collections.abc import Callable

#: Empty lines that are skipped before a request line; old clients send one after a body (RFC 9112, 2.2).
EMPTY_LINES_MAX = 8
#: A chunk's size with its extensions, which are ignored (RFC 9112, 7.1.1).
CHUNK_LINE_BYTES_MAX = 256
#: Of a body. Each costs 15 µs, however small: 1 MiB in chunks of one byte took 15 s, and whoever sends it no more than
#: 6 MB. Clients send some kB in each.
CHUNKS_MAX = 4096
TRAILERS_BYTES_MAX = 4096

_SPACE = 0x20
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([^\r]*)")
#: No space after the size: RFC 9112, 7.1 has none, and what a proxy makes of it is its own.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[^\r\n]*)?\r\n")


class FramingError(Exception):
    """The bytes are refused; the argument is the code of the problem. The connection cannot go on."""


class Framing:
    """One connection's bytes. `take` returns the next bytes of the present request, `next_request` goes on to the one
    behind it.
    """

    def __init__(self, head_bytes_max: int, headers_max: int) -> None:
        """`headers_max`: header fields of a request."""
        self._head_bytes_max = head_bytes_max
        self._headers_max = headers_max
        self._bytes = bytearray()
        self._empty_lines = 0
        #: What comes next; None when the request is complete.
        self._part: Callable[[], bytes] | None = self._take_head
        self._left = 0
        self._trailers_left = 0
        self._chunks_left = 0

    @property
    def is_complete(self) -> bool:
        """Return whether the present request has been taken as a whole."""
        return self._part is None

    @property
    def has_more(self) -> bool:
        """Return whether bytes of a later request, or stray ones, have arrived behind the present request."""
        return self.is_complete and bool(self._bytes)

    def add(self, data: bytes) -> None:
        self._bytes += data

    def take(self) -> bytes:
        """Return bytes that belong to the present request, or none where more have to arrive first. The head is
        returned as a whole.

        :raises FramingError:
        """
        return self._part() if self._part is not None else b""

    def begin_body(self, length: int | None) -> None:
        """Say what follows the head that was taken: `length` bytes, or chunks."""
        self._left = length or 0
        self._chunks_left = CHUNKS_MAX
        self._part = self._take_chunk_line if length is None else self._take_body if length else None

    def next_request(self) -> None:
        self._part = self._take_head
        self._empty_lines = 0

    def _take_head(self) -> bytes:
        while self._bytes.startswith(b"\r\n"):
            self._empty_lines += 1
            if self._empty_lines > EMPTY_LINES_MAX:
                raise FramingError("bad_http")
            del self._bytes[:2]
        bytes_max = self._head_bytes_max
        end = self._bytes.find(b"\r\n\r\n", 0, bytes_max)
        head = bytes(self._bytes[: bytes_max if end < 0 else end + 4])
        # A part is checked too: the end of a head whose lines end with a bare LF would never be found.
        _check_lines(head)
        if head and head[0] <= _SPACE and head != b"\r":  # TLS, for one, which may wait for our answer
            raise FramingError("bad_http")
        if end < 0:
            if len(head) == bytes_max:
                raise FramingError("headers_too_large")
            return b""
        # Counted before they are parsed: 64,000 of four bytes would hold up everybody for 0.2 s. The other two lines
        # are the request line and the empty one at the end.
        if head.count(b"\r\n") - 2 > self._headers_max:
            raise FramingError("headers_too_large")
        _check_head(head)
        del self._bytes[: end + 4]
        self._part = None  # until `begin_body` says otherwise
        return head

    def _take_body(self) -> bytes:
        data = self._cut(min(self._left, len(self._bytes)))
        self._left -= len(data)
        if not self._left:
            self._part = None
        return data

    def _take_chunk_line(self) -> bytes:
        line = self._take_line(CHUNK_LINE_BYTES_MAX)
        if line:
            found = _CHUNK_LINE.fullmatch(line)
            if found is None:
                raise FramingError("bad_http")
            size = int(found[1], 16)
            if size:
                self._chunks_left -= 1
                if self._chunks_left < 0:
                    raise FramingError("body_too_large")
            # The chunk ends with an empty line of its own.
            self._left = size + 2
            self._trailers_left = TRAILERS_BYTES_MAX
            self._part = self._take_chunk if size else self._take_trailer
        return line

    def _take_chunk(self) -> bytes:
        data = self._take_body()
        if self._part is None:
            self._part = self._take_chunk_line
        return data

    def _take_trailer(self) -> bytes:
        line = self._take_line(self._trailers_left)
        self._trailers_left -= len(line)
        if line.startswith((b" ", b"\t")):
            raise FramingError("bad_http")
        if line == b"\r\n":
            self._part = None
        return line

    def _take_line(self, bytes_max: int) -> bytes:
        end = self._bytes.find(b"\n", 0, bytes_max)
        line = bytes(self._bytes[:bytes_max] if end < 0 else self._bytes[: end + 1])
        _check_lines(line)
        if end < 0:
            if len(line) == bytes_max:
                raise FramingError("bad_http")
            return b""
        return self._cut(end + 1)

    def _cut(self, count: int) -> bytes:
        data = bytes(self._bytes[:count])
        del self._bytes[:count]
        return data


def _check_lines(text: bytes) -> None:
    """Refuse CR and LF that do not stand together; the last byte of a part may be a CR."""
    ends = text.count(b"\r\n")
    if text.count(b"\n") != ends or text.count(b"\r") - text.endswith(b"\r") != ends:
        raise FramingError("bad_http")


def _check_head(head: bytes) -> None:
    # A line that continues the one before it (obs-fold): some proxies take it for a header of its own.
    if b"\n " in head or b"\n\t" in head:
        raise FramingError("bad_http")
    # Methods are case-sensitive, and a filter before us that knows GET does not know `get`.
    method = head[: head.find(b" ")]
    if method != method.upper():
        raise FramingError("bad_http")
    # More than one, `21, 21` included: what they say may differ for whoever reads only the first.
    lengths = _CONTENT_LENGTH.findall(head.lower())  # in lower case, since to ignore case is far slower
    if len(lengths) > 1 or any(not length.rstrip(b" \t").isdigit() for length in lengths):
        raise FramingError("bad_http")

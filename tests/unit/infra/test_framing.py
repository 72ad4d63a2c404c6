"""Whatever bytes come, how they are cut into reads changes nothing, and nothing is made up or left out."""

import re

from hypothesis import given
from hypothesis import strategies as st

from authd.infra.http.server.framing import CHUNKS_MAX, Framing, FramingError

HEAD_BYTES_MAX = 200
HEADERS_MAX = 5
PIECES = [
    *(b"GET / HTTP/1.1\r\n", b"get / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"\r\n", b"\n", b"\r", b" ", b"\t", b"\0"),
    *(
        b"Host: a\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 3, 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"X: y\n",
    ),
    *(b"3\r\n", b"abc", b"0\r\n", b"3;x=y\r\n", b"3 \r\n", b"ffffffffffffffffff\r\n", b"x" * 250),
]


def read(parts: list[bytes]) -> tuple[list[bytes], bytes, str]:
    """The complete requests, what there is of the next one, and the code of the refusal."""
    framing = Framing(HEAD_BYTES_MAX, HEADERS_MAX)
    requests: list[bytes] = []
    present = b""
    try:
        for part in parts:
            framing.add(part)
            while True:
                is_head = not present
                data = framing.take()
                if is_head and data:
                    framing.begin_body(_length(data))
                present += data
                if present and framing.is_complete:
                    requests.append(present)
                    present = b""
                    framing.next_request()
                elif not data:
                    break
    except FramingError as error:
        return requests, present, str(error.args[0])
    return requests, present, ""


def _length(head: bytes) -> int | None:
    if b"chunked" in head:
        return None
    return int(found[1]) if (found := re.search(rb"Content-Length: (\d+)", head)) else 0


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[bytes]]:
    whole = b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=30)))
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=8)))
    return whole, [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


@given(streams())
def test_cuts_change_nothing(stream: tuple[bytes, list[bytes]]) -> None:
    whole, parts = stream
    bytewise = [whole[index : index + 1] for index in range(len(whole))]
    requests, rest, code = read([whole])
    for cut in (parts, bytewise):
        found, found_rest, found_code = read(cut)
        assert (found, found_code) == (requests, code)
        # Of a body that is refused further on more may have been given away, if it came in more reads.
        assert code or found_rest == rest


@given(streams())
def test_requests_are_what_was_sent_but_for_empty_lines_between_them(stream: tuple[bytes, list[bytes]]) -> None:
    whole, parts = stream
    requests, rest, _ = read(parts)
    place = 0
    for request in (*requests, rest):
        while whole.startswith(b"\r\n", place) and not whole.startswith(request, place):
            place += 2
        assert whole.startswith(request, place)
        place += len(request)


def test_a_body_has_a_bounded_number_of_chunks() -> None:
    head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    at_bound = head + b"1\r\nx\r\n" * CHUNKS_MAX + b"0\r\n\r\n"
    assert read([at_bound * 2]) == ([at_bound] * 2, b"", "")
    assert read([head + b"1\r\nx\r\n" * CHUNKS_MAX + b"1\r\n"])[2] == "body_too_large"

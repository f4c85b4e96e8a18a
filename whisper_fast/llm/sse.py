"""Server-sent events, read from network pieces of any size."""

from __future__ import annotations

from whisper_fast.errors import LLMProtocolError

__all__ = ["EventReader"]

BOM = b"\xef\xbb\xbf"
BLANK = b"\n\n"
DATA = b"data: "
NEXT = BLANK + DATA


class EventReader:
    """The data of each event in a stream of bytes, as the HTML standard's event-stream format defines it.

    Works on bytes, so a character may be split between pieces. Lines end in LF, CRLF or CR; comments,
    `event`, `id` and `retry` are skipped. The stream may have at most `max_bytes`. Nearly all servers end lines in
    LF and write one data line an event: a piece of such is cut with one split, anything else is read line by line.
    Both ways take time linear in the bytes, whatever their split.
    """

    __slots__ = ("_after_cr", "_begun", "_data", "_left", "_max_bytes", "_tail")

    def __init__(self, max_bytes: int = 16 << 20) -> None:
        self._max_bytes = self._left = max_bytes
        self._tail: list[bytes] = []  # what came after the last line or event that was complete
        self._data: list[bytes] = []  # data lines of an event whose end has not come yet
        self._after_cr = False
        self._begun = False

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of each event that `piece` completes; raises LLMProtocolError past `max_bytes`."""
        self._left -= len(piece)
        if self._left < 0:
            raise LLMProtocolError(f"the stream has more than {self._max_bytes} bytes")
        if self._begun and not self._data and not self._after_cr and b"\r" not in piece:
            end = piece.rfind(BLANK)
            if piece.find(b"\n") == end and piece[:6] == DATA and not self._tail and end + 2 == len(piece):
                return [piece[6:end]]  # one event, whole: what comes of a model that is slower than the network
            if end >= 0:
                return self._cut(piece[:end], piece[end + 2 :])
        return self._feed_lines(piece)

    def end(self) -> list[bytes]:
        """Return what the end of the stream completes: some servers leave out the last empty line."""
        lines, self._tail = b"".join(self._tail).splitlines(), []
        return self._events([*lines, b""])

    def _cut(self, whole: bytes, rest: bytes) -> list[bytes]:
        """Return the events of `whole`, which has no CR and ends before an empty line; `rest` came after that."""
        if self._tail:
            whole = b"".join((*self._tail, whole))
        self._tail = [rest] if rest else []
        if whole[:6] == DATA:
            events = whole[6:].split(NEXT)
            if whole.count(b"\n") == 2 * len(events) - 2:
                return events
        return self._events([*whole.splitlines(), b""])

    def _feed_lines(self, piece: bytes) -> list[bytes]:
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        if b"\n" not in piece and b"\r" not in piece:
            self._tail.append(piece)
            return []
        lines = b"".join((*self._tail, piece)).splitlines()
        self._tail = [] if piece.endswith((b"\n", b"\r")) else [lines.pop()]
        return self._events(lines)

    def _events(self, lines: list[bytes]) -> list[bytes]:
        if not self._begun and lines:
            self._begun = True
            lines[0] = lines[0].removeprefix(BOM)
        events: list[bytes] = []
        data = self._data
        for line in lines:
            if not line:
                if data:
                    events.append(data[0] if len(data) == 1 else b"\n".join(data))
                    data.clear()
            elif line.startswith(b"data:"):
                data.append(line[6:] if line.startswith(b"data: ") else line[5:])
        return events

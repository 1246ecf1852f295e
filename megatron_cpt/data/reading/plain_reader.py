"""Plain bytes of a file, compressed or not, up to the very byte where it is damaged."""

import bz2
import codecs
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

_READ_BYTES = 1 << 20
_COMPRESSED_READ_BYTES = {"zst": 1 << 12}
"""Little, because 128 KiB may come out of every four bytes of zstandard, and its library gives all that comes out at once."""
_COMPRESSED_READ_BYTES_OTHERWISE = 1 << 16
_PLAIN_BYTES = 8 << 20
"""Most that the other libraries give at once; they keep the rest."""


class PlainReader:
    """Reads a plain or compressed file, all its members one after the other.

    All data before damage is returned first. After it, or if a member ends early, `read` raises OSError; the libraries'
    own readers can ignore an early end, or lose the data before it. Of a file in another `encoding` the bytes are those
    of its text in UTF-8; what the encoding does not have becomes U+FFFD.
    """

    def __init__(self, path: Path, compression: str | None, encoding: str | None = None):
        self._decoder = codecs.getincrementaldecoder(encoding)("replace") if encoding else None
        self._new_member = _MEMBERS[compression]
        self._padding = b"\x00" if compression in ("gz", "xz") else b""
        self._read_bytes = _COMPRESSED_READ_BYTES.get(compression or "", _COMPRESSED_READ_BYTES_OTHERWISE)
        self._limit = () if compression == "zst" else (_PLAIN_BYTES,)
        self._file = path.open("rb", buffering=0)
        self._member: Any = None
        self._pending = b""
        self._has_more = False

    def __enter__(self) -> "PlainReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int) -> bytes:
        """Return some bytes, about `size` at most, or b"" at the end."""
        if self._decoder is None:
            return self._read(size)
        while data := self._read(size):
            if text := self._decoder.decode(data):
                return text.encode()
        return self._decoder.decode(b"", final=True).encode()

    def _read(self, size: int) -> bytes:
        if self._new_member is None:
            return self._file.read(size) or b""
        while True:
            data = b"" if self._has_more else self._pending or self._file.read(self._read_bytes) or b""
            self._pending = b""
            if self._member is None:
                data = data.lstrip(self._padding) if self._padding else data
                if not data and self._file.tell() == os.fstat(self._file.fileno()).st_size:
                    return b""
                self._member = self._new_member() if data else None
                if not data:
                    continue
            elif not data and not self._has_more:
                raise EOFError("the file ends within a compressed member")
            plain = self._decompress(data)
            if plain:
                return plain

    def read_block(self, size: int) -> tuple[bytes, str | None]:
        """Return up to about `size` bytes and, when the file is damaged after them, how."""
        parts, length = [], 0
        try:
            while length < size and (data := self.read(min(_READ_BYTES, size - length))):
                parts.append(data)
                length += len(data)
        except (EOFError, OSError) as problem:
            return b"".join(parts), str(problem)
        return b"".join(parts), None

    def _decompress(self, data: bytes) -> bytes:
        try:
            plain = self._member.decompress(data, *self._limit)
        except Exception as problem:  # each library has its own error, zstandard's is known only once imported
            raise OSError(str(problem)) from None
        self._has_more = False
        if self._member.eof:
            self._pending, self._member = self._member.unused_data, None
        elif self._limit:  # zlib hands back what it did not take, the others keep it
            self._pending = getattr(self._member, "unconsumed_tail", b"")
            self._has_more = not getattr(self._member, "needs_input", True)
        return plain


def _new_zstd_member() -> Any:
    import zstandard  # compiled; only where a .zst file is read

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_MEMBERS: dict[str | None, Callable[[], Any] | None] = {
    None: None,
    "gz": lambda: zlib.decompressobj(wbits=31),
    "xz": lzma.LZMADecompressor,
    "bz2": bz2.BZ2Decompressor,
    "zst": _new_zstd_member,
}

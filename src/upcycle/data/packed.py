"""Packed files, which end in an error where they were cut off."""

import io
from importlib import import_module
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

AT_ONCE = 1 << 17
WIDEST = 1 << 31
"""Bytes that `zstd --long` may look back for."""
PACKERS = {".gz": "gzip", ".xz": "lzma", ".bz2": "bz2", ".zst": "zstandard"}
"""By suffix, the modules that unpack them."""


def open_bytes(path: Path) -> io.BufferedIOBase:
    """A file's content, unpacked if its name says that it is packed.

    Raises:
        UpcycleError: a Python that was built without what unpacks it.
    """
    name = PACKERS.get(path.suffix.lower())
    if name is None:
        return path.open("rb")
    try:
        module: Any = import_module(name)
    except ImportError:
        raise UpcycleError(f"{path} is compressed with {name}, which this Python cannot read") from None
    if name != "zstandard":
        opened: io.BufferedIOBase = module.open(path, "rb")
        return opened
    return io.BufferedReader(ZstdFrames(path), AT_ONCE)


class ZstdFrames(io.RawIOBase):
    """One zstd frame or several, to the end of the last; zstandard's own reader takes what was cut off for whole."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.packed = b""
        self.unpacked = memoryview(b"")
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """
        Raises:
            EOFError: the file ends within a frame.
        """
        from zstandard import ZstdDecompressor

        while not self.unpacked:
            packed = self.packed or self.file.read(AT_ONCE)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the file ends before its zstd frame does")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = ZstdDecompressor(max_window_size=WIDEST).decompressobj()
            self.unpacked = memoryview(self.frame.decompress(packed))
            self.packed = self.frame.unused_data
        into = memoryview(buffer)
        count = min(len(into), len(self.unpacked))
        into[:count], self.unpacked = self.unpacked[:count], self.unpacked[count:]
        return count

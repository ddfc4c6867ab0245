"""A file that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Writes a file that is there whole or not at all, even after a crash, and on the disk when this returns.

    Args:
        path: The file; its folder must be there.
        data: What it shall hold.
        temporary: What it is called until it is whole, on the same file system; None: a hidden name beside it.

    Raises:
        OSError: It can't be written; nothing is left behind.
    """
    if path.exists() and not path.is_file():  # a folder, or a device such as /dev/null: it would be replaced
        raise OSError(errno.EINVAL, "this is not a regular file", str(path))
    # Hidden, so that no listing takes it for an image; not named after the file, whose name may be as long as can be.
    temporary = temporary or path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to hear of
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # the rename itself; not every file system can
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def publish(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """`write_atomically`, into a folder that is made where it is missing; the same bytes are left alone."""
    with suppress(OSError):
        if path.read_bytes() == data:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, temporary)


def printable(name: str) -> str:
    """A name from the file system as text that can be written anywhere: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

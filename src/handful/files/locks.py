"""Locks between processes, by `filelock`: the operating system's, or a marker file where a file system has none."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

_NONE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def take(path: Path, seconds: float = 0) -> BaseFileLock | None:
    """Takes a lock; None where another holds it after so many seconds. Whoever dies lets go of it.

    Raises:
        OSError: The file can't be written.
    """
    # The marker has a name of its own: the attempt to lock leaves an empty file, which would pass for another's marker.
    for kind, name in ((FileLock, path), (SoftFileLock, path.with_name(f"{path.name}.held"))):
        lock = kind(name, timeout=seconds, thread_local=False)
        try:
            lock.acquire(poll_interval=0.05)
            return lock
        except Timeout:
            return None
        except NotImplementedError:
            continue
        except OSError as error:
            if error.errno not in _NONE or name is not path:
                raise
    raise OSError(errno.ENOLCK, "this file system supports no kind of file lock", str(path))


@contextmanager
def held(path: Path, seconds: float = -1) -> Iterator[bool]:
    """Holds a lock inside the block; says whether it was got (always, without a limit of seconds)."""
    lock = take(path, seconds)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            lock.release()

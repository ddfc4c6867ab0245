"""Where handful keeps what can be computed or fetched again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def default_cache() -> Path:
    """Where handful keeps what can be computed again: $HANDFUL_CACHE, $XDG_CACHE_HOME/handful, ~/.cache/handful, or where
    there is no home a folder of temporary files."""
    if own := os.environ.get("HANDFUL_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification: a relative path is to be ignored
        return Path(shared) / "handful"
    try:
        return Path.home() / ".cache" / "handful"
    except RuntimeError:  # no HOME, and a user that the system does not know, as in many containers
        return Path(tempfile.gettempdir()) / f"handful-{getattr(os, 'getuid', lambda: 'user')()}"

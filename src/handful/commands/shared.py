"""What commands share."""

from __future__ import annotations


def listed(text: str | None) -> list[str] | None:
    """ "a, b" -> ["a", "b"]; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",")]

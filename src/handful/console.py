"""Around every command: from what it raises to one line on stderr and an exit code.

0 done, 1 failed, 2 wrong request, 130 interrupted by Ctrl-C, 143 by SIGTERM. With --json the error is on stdout too, as
`{"error": {"kind": ..., "message": ..., "field": ...}}`; kinds: request, usage, run, interrupted, unexpected.
HANDFUL_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Any, NoReturn, cast

import typer

from handful.errors import Note, RequestError, RunError

_RESUME = "interrupted: resume with the same command"
# click's UsageError, wherever this version of typer keeps click
_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])


class _Terminated(BaseException):
    """SIGTERM, raised like Ctrl-C, so that locks are released and temporary files removed."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main(app: typer.Typer) -> NoReturn:
    """Runs the command that sys.argv names, and exits with its code."""
    # Before torch is loaded: its threads otherwise wait by spinning, and where anything else wants the same processors a
    # small model samples a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # What these libraries say of themselves at every import (that torchvision is missing, which handful does without).
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # what the console's encoding lacks is escaped: no result is lost at its print
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = lambda message, category, *_, **__: print(
        f"{'note' if issubclass(category, Note) else 'warning'}: {message}", file=sys.stderr
    )
    arguments = sys.argv[1:]
    if sys.stderr.isatty() and len(arguments) > 1 and not {"-h", "--help", "-q", "--quiet"} & set(arguments):
        print("loading libraries ...", file=sys.stderr)  # they take seconds, and nobody likes a silent terminal
    sys.exit(answer(app, arguments))


def answer(app: typer.Typer, arguments: list[str]) -> int:
    """Runs a command; its exit code."""
    json_wanted = "--json" in arguments
    try:
        code = app(arguments, prog_name="handful", standalone_mode=False)
        if code == 130:  # how typer answers Ctrl-C
            _say_error("interrupted", _RESUME, json_wanted)
        return code if isinstance(code, int) else 0
    except _Terminated:
        _say_error("interrupted", _RESUME, json_wanted)
        return 143
    except (KeyboardInterrupt, typer.Abort):
        _say_error("interrupted", _RESUME, json_wanted)
        return 130
    except RequestError as error:
        _trace()
        _say_error("request", str(error), json_wanted, error.field)
        return 2
    except (RunError, OSError) as error:
        _trace()
        _say_error("run", str(error), json_wanted)
        return 1
    except _UsageError as error:
        _say_error("usage", f"{error.format_message()} (handful --help)", json_wanted)  # type: ignore[attr-defined]
        return 2
    except Exception as error:
        _trace()
        text = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
        _say_error("unexpected", f"{text} (a bug? HANDFUL_DEBUG=1 shows where)", json_wanted)
        return 1


def _trace() -> None:
    if os.environ.get("HANDFUL_DEBUG"):
        traceback.print_exc()


def error_object(kind: str, message: str, field: str | None = None) -> dict[str, Any]:
    """What --json says of an error."""
    return {"kind": kind, "message": message, **({"field": field} if field else {})}


def _say_error(kind: str, message: str, json_wanted: bool, field: str | None = None) -> None:
    print(message if kind == "interrupted" else f"error: {message}", file=sys.stderr)
    if json_wanted:
        print(json.dumps({"error": error_object(kind, message, field)}))

"""What errors say, and that they survive the ways an error travels."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from handful.errors import HandfulError, RequestError, RunError


def test_request_error_reads_field_value_problem_remedy():
    error = RequestError("exemplars", Path("/x/y"), "the folder is empty", "Put 2 to 32 images into a folder per class.")
    said = "exemplars: '/x/y': the folder is empty. Put 2 to 32 images into a folder per class."
    assert str(error) == said
    assert (error.field, error.value, error.problem) == ("exemplars", Path("/x/y"), "the folder is empty")


def test_request_error_shows_numbers_plainly_and_long_values_short():
    assert str(RequestError("k", 3, "too few", "Raise k.")) == "k: 3: too few. Raise k."
    assert str(RequestError("image", b"\x00" * 5000, "no image", "Go.")) == "image: <5000 bytes>: no image. Go."
    assert len(str(RequestError("prompts", list(range(100_000)), "too many", "Fewer."))) < 250


def test_a_long_path_is_shown_whole():
    path = "/" + "folder/" * 60 + "image.png"
    assert path in str(RequestError("image", Path(path), "missing", "Check."))


def test_both_kinds_are_handful_errors_and_what_python_calls_them():
    assert issubclass(RequestError, HandfulError)
    assert issubclass(RequestError, ValueError)
    assert issubclass(RunError, HandfulError)
    assert issubclass(RunError, RuntimeError)
    assert not issubclass(RunError, RequestError)
    with pytest.raises(HandfulError, match="diverged"):
        raise RunError("it diverged")


def test_request_error_survives_pickling():
    error = RequestError("exemplars", Path("/x"), "empty", "Fill it.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RequestError
    assert str(again) == str(error)


def test_importing_the_errors_loads_no_torch():
    code = "import sys, handful.errors; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

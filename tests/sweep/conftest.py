"""Real digits as a user has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.sweeps import write_digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("digits"))

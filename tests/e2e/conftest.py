"""Real programs: what they need must be there where CI runs; for a person its absence is a skip with its reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """``need("torch", …)``: skip, in CI fail, unless these modules are installed."""

    def check(*modules: str) -> None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(missing)}")

    return check

"""Who waits for an engine wakes for the right one."""

from __future__ import annotations

import multiprocessing.process
import sys
from types import ModuleType

import pytest

from melodi_otel import standby
from melodi_otel.config import Config


class Awaken:
    """Counts."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.mark.parametrize(
    ("vllm", "child", "woken"), [(False, False, 1), (True, False, 1), (False, True, 1), (True, True, 0)]
)
def test_vllms_children_load_transformers(monkeypatch: pytest.MonkeyPatch, vllm: bool, child: bool, woken: int) -> None:
    """A worker of vLLM loads transformers and generates nothing with it: it starts no meter. Others that load it do."""
    if vllm:
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    else:
        monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(multiprocessing.process, "parent_process", lambda: object() if child else None)
    waiting: list[object] = []
    monkeypatch.setitem(standby.ENGINES, "transformers", waiting.append)
    awaken = Awaken()
    made = standby.Standby(Config(foreign_spans="off"), awaken)  # type: ignore[arg-type]
    made.await_libraries(["transformers"])
    (there,) = waiting
    there()  # type: ignore[operator]
    assert awaken.times == woken

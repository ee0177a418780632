"""What doctor says of vLLM: it loads our plug-in, or why not and what to do about it."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from melodi_otel.cli import doctor_vllm
from melodi_otel.cli.doctor_vllm import as_data, installed, lines


def found(version="0.32.0", plugged=True, **environ):
    return as_data(version, environ, lambda: plugged)


def test_no_vllm():
    """Without vLLM there is nothing to say."""
    assert found(version=None) is None


def test_it_is_metered():
    """With the plug-in installed and nothing in its way a server is metered."""
    assert found() == {"version": "0.32.0", "metered": True, "reason": None, "fix": None}
    assert list(lines(found())) == ["vLLM 0.32.0: a server or script started here is metered, with no flag and no code"]


@pytest.mark.parametrize(
    ("listed", "fix"), [("lora_resolver", "VLLM_PLUGINS=lora_resolver,melodi_otel"), ("", "VLLM_PLUGINS=melodi_otel")]
)
def test_a_list_that_leaves_us_out(listed, fix):
    """VLLM_PLUGINS without us is said, with the list that has us; an empty list allows nothing."""
    report = found(VLLM_PLUGINS=listed)
    assert report["metered"] is False
    assert report["fix"] == fix
    assert list(lines(report))[1] == f"  to repair: {fix}"


def test_a_list_that_names_us():
    """VLLM_PLUGINS with us in it is fine."""
    assert found(VLLM_PLUGINS="lora_resolver,melodi_otel")["metered"] is True


def test_not_installed():
    """On the path without its entry point it would never be loaded."""
    assert found(plugged=False)["fix"] == 'pip install "melodi-otel[vllm]"'


def test_turned_off():
    """MELODI_DISABLED is a reason, too."""
    assert found(MELODI_DISABLED="1")["reason"] == "MELODI_DISABLED=1"


def test_the_entry_point_is_looked_for(monkeypatch):
    """It is looked for by group and name."""
    points = EntryPoints([EntryPoint("other", "a:b", "vllm.general_plugins")])
    monkeypatch.setattr(doctor_vllm, "entry_points", lambda group: points.select(group=group))
    assert not installed()
    monkeypatch.undo()
    assert installed()

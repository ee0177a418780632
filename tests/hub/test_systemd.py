"""The files for systemd, by systemd's own judgement where it is installed, and by what our code says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

import melodi_otel
from melodi_otel.cli import agent
from melodi_otel.cli.app import app
from melodi_otel.config import Config
from melodi_otel.hub import privileges
from melodi_otel.hub.daemon import CLOSE_S
from melodi_otel.hub.presence import AGENT_SOCKET
from melodi_otel.hub.settings import read_variables

FILES = Path(melodi_otel.__file__).parent.parent / "deploy" / "systemd"
UNIT = FILES / "melodi-otel-agent.service"
EXPOSURE = 2.5
"""systemd's own scale, from 0 (safe) to 10; the unit has 2.3."""


def settings(name):
    """All values of a setting of the unit."""
    return re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)


def program(name):
    """A system program; missing it is a skip for a user and a failure where CI is set."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed; on Debian: apt-get install systemd"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def unit(tmp_path):
    """The unit, with a program in it that is there."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/melodi-otel/bin/melodi-otel", "/bin/true"))
    return path


@pytest.mark.e2e
def test_systemd_finds_nothing_to_say(unit):
    """`systemd-analyze verify` is silent: no unknown setting, no value that is ignored."""
    done = subprocess.run(
        [program("systemd-analyze"), "verify", unit], capture_output=True, text=True, timeout=60, check=False
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if UNIT.name in line]
    assert (done.returncode, ours) == (0, [])


@pytest.mark.e2e
def test_it_stays_hardened(unit):
    """Its exposure on systemd's scale does not rise."""
    command = [
        program("systemd-analyze"),
        "security",
        "--offline=true",
        "--no-pager",
        f"--threshold={EXPOSURE * 10:g}",
        unit,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    assert float(re.search(r"exposure level for \S+ (\S+)", done.stdout)[1]) <= EXPOSURE


@pytest.mark.e2e
def test_sysusers_makes_user_and_group(tmp_path):
    """Both, of the same name, without a shell."""
    (tmp_path / "etc").mkdir()
    command = [program("systemd-sysusers"), f"--root={tmp_path}", FILES / "melodi-otel.sysusers.conf"]
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert re.match(r"melodi:x:(\d+):\1:.*:/usr/sbin/nologin$", (tmp_path / "etc" / "passwd").read_text())
    assert (tmp_path / "etc" / "group").read_text().startswith("melodi:x:")


def test_the_unit_and_the_code_agree():
    """Capabilities, user, directory, times: what the unit grants is what the agent keeps and needs."""
    names = set(privileges.NAMES.values())
    assert [set(value.split()) for value in settings("AmbientCapabilities") + settings("CapabilityBoundingSet")] == [
        names
    ] * 2
    assert settings("User") == settings("Group") == [agent.GROUP]
    assert Path("/run", settings("RuntimeDirectory")[0]) == AGENT_SOCKET.parent
    assert int(settings("TimeoutStopSec")[0]) > CLOSE_S
    assert settings("RestartPreventExitStatus") == ["2"]


def test_its_command_line_is_ours():
    """Options of ExecStart exist."""
    words = settings("ExecStart")[0].split()
    assert words[1] == "agent"
    parser = typer.main.get_command(app).commands["agent"]
    assert parser.make_context("agent", words[2:]).params["env_file"] == Path("/etc/melodi-otel/agent.env")


def test_the_example_of_settings(tmp_path, caplog):
    """Every line of it, taken in, is a setting that exists and has a good value."""
    path = tmp_path / "agent.env"
    path.write_text(re.sub(r"^#(?=[A-Z])", "", (FILES / "agent.env.example").read_text(), flags=re.MULTILINE))
    variables = read_variables(path)
    assert len(variables) == 11
    Config.from_env(variables)
    assert caplog.text == ""

"""The host's agent, real: unprivileged users, namespaces, programs that find it late, restarts, and several hubs on one host."""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux, to be somebody else"),
]

PACKAGE = "intel-rapl:0"
SOMEBODY = 54321


def usable(rows: list[dict[str, Any]]) -> float:
    return sum(row["total"] or 0.0 for row in rows)


@pytest.fixture
def package(hub_place: Any) -> Any:
    """A package of 50 W whose counter root alone may read."""
    made = hub_place.tree.package(0, watts=50.0)
    made.energy_path.chmod(0o400)
    return made


@pytest.fixture
def socket(hub_place: Any) -> Path:
    return hub_place.path / "agent" / "hub.sock"


@pytest.fixture
def group() -> grp.struct_group:
    """A group with a name, which nobody is in."""
    return next(found for found in grp.getgrall() if found.gr_gid and not found.gr_mem)


@pytest.fixture
def unshare() -> str:
    """The program, where this system lets namespaces be made."""
    found = shutil.which("unshare")
    words = [found or "", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if found is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no mount and pid namespaces can be made here")
    return found


@pytest.fixture
def somebody(hub_place: Any, unshare: str) -> Callable[..., list[str]]:
    """``somebody(gid, …)``: the words before a program that runs as a user without any right, in these groups.

    Directories that only root may pass on the way to the interpreter and this package are replaced, in a mount namespace of
    the program's own, by open ones with the same content.
    """
    lines = ["set -e"]
    closed: dict[Path, list[Path]] = {}
    for needed in {Path(sys.base_prefix), Path(sys.prefix), Path(__file__).parents[2]}:
        for parent in reversed(needed.resolve().parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(needed.resolve())
                break
    for number, (directory, below) in enumerate(closed.items()):
        kept = hub_place.path / f"kept{number}"
        kept.mkdir()
        lines += [f"mount --rbind {directory} {kept}", f"mount -t tmpfs -o mode=755 none {directory}"]
        for path in below:
            lines += [f"mkdir -p {path}", f"mount --rbind {kept / path.relative_to(directory)} {path}"]
    lines.append('exec "$@"')

    def words(*groups: int) -> list[str]:
        chosen = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
        who = ["setpriv", "--reuid", str(SOMEBODY), "--regid", str(SOMEBODY), *chosen, "--"]
        return [unshare, "--mount", "sh", "-c", "\n".join(lines), "sh", *who]

    subprocess.run(
        [*words(), sys.executable, "-c", "import melodi_otel.runtime"],
        env=hub_place.environ(), check=True, capture_output=True, cwd="/",
    )  # fmt: skip
    return words


def doctor(env: dict[str, str], before: list[str]) -> dict[str, Any]:
    words = [*before, sys.executable, "-m", "melodi_otel.cli.app", "doctor", "--json"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False, cwd="/")
    return json.loads(done.stdout)


def test_unprivileged_users(
    hub_place: Any, package: Any, socket: Path, group: grp.struct_group, somebody: Callable[..., list[str]]
) -> None:
    """A member of the agent's group gets measured package joules; without the agent, or outside, the reason and the fix."""
    hub_place.agent(
        hub_place.environ(), socket, "--socket-group", group.gr_name, "--user", "nobody", "--metrics-addr", "off"
    )
    assert "privileges: uid 65534" in hub_place.said("agent")
    assert Path(f"/proc/{hub_place.pid(socket)}").stat().st_uid in (0, 65534)
    status = Path(f"/proc/{hub_place.pid(socket)}/status").read_text()
    assert f"CapEff:\t{1 << 2 | 1 << 38:016x}" in status or f"CapEff:\t{1 << 2:016x}" in status
    env = hub_place.environ(MELODI_HUB=str(socket))
    runs = {
        "open/member": (env, somebody(group.gr_gid)),
        "open/outside": (env, somebody()),
        "open/alone": (hub_place.environ(MELODI_HUB="local"), somebody()),
    }
    with hub_place.tree.live():
        started = {name: hub_place.program(e, name, before=who, requests=4) for name, (e, who) in runs.items()}
        told = {name: hub_place.finish(process, name) for name, process in started.items()}
    rows = told["open/member"]["rows"]
    assert len(rows) == 4
    assert {(row["quality"], row["method"]) for row in rows} <= {("measured", "process"), ("interpolated", "process")}
    assert all(row["joules"][PACKAGE] > 0 for row in rows)
    assert usable(rows) == pytest.approx(hub_place.settled(socket)[PACKAGE]["settled"], rel=1e-9)
    for name in ("open/outside", "open/alone"):
        assert told[name]["local"]
        assert {(row["quality"], row["reason"]) for row in told[name]["rows"]} == {("unavailable", "permission_denied")}
    assert f"only root and members of the group {group.gr_name} may connect" in hub_place.said("open/outside")
    refused = doctor(env, somebody())["hub"]["hubs"][0]
    assert refused["state"] == "permission_denied"
    assert f"usermod -aG {group.gr_name}" in refused["fix"]
    alone = doctor(hub_place.environ(MELODI_HUB="local"), somebody())
    rapl = [found for found in json.loads(json.dumps(alone))["refusals"] if found["source"].startswith("rapl")]
    assert rapl
    assert {found["state"] for found in rapl} == {"permission_denied"}
    assert any(found["fix"] for found in rapl)


def test_two_namespaces(hub_place: Any, package: Any, socket: Path, unshare: str) -> None:
    """Programs of two mount and pid namespaces are in one ledger, each by the CPU time of its process on the host."""
    hub_place.agent(hub_place.environ(), socket, "--metrics-addr", "off")
    env = hub_place.environ(MELODI_HUB=str(socket))
    inside = [unshare, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    go = str(hub_place.path / "go")
    how = {"requests": 5, "parallel": 1, "seconds": 0.6, "go": go}
    much = hub_place.program(env, "much", before=inside, busy=0.9, **how)
    little = hub_place.program(env, "little", before=inside, busy=0.05, **how)
    hub_place.ready("much", "little")
    assert hub_place.told("much")["pid"] < 10 > hub_place.told("little")["pid"]
    with hub_place.tree.live():
        (hub_place.path / "go").touch()
        rows = {name: hub_place.finish(p, name)["rows"] for name, p in (("much", much), ("little", little))}
        book = hub_place.settled(socket)[PACKAGE]
    assert {row["method"] for name in rows for row in rows[name]} == {"process"}
    assert usable(rows["much"]) + usable(rows["little"]) == pytest.approx(book["settled"], rel=1e-9)
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    assert usable(rows["much"]) > 2 * usable(rows["little"]) > 0


def test_an_agent_that_cannot_see_the_process(hub_place: Any, package: Any, socket: Path, unshare: str) -> None:
    """An agent in a container without the host's pids gives joules all the same, and the books balance."""
    inside = [unshare, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    hub_place.agent(hub_place.environ(), socket, "--metrics-addr", "off", before=inside)
    with hub_place.tree.live():
        program = hub_place.program(hub_place.environ(MELODI_HUB=str(socket)), requests=4)
        rows = hub_place.finish(program)["rows"]
        book = hub_place.settled(socket)[PACKAGE]
    assert usable(rows) == pytest.approx(book["settled"], rel=1e-9)
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    assert usable(rows) > 0
    assert "process" not in {row["method"] for row in rows}


def test_an_agent_appears(hub_place: Any, package: Any, receiver: OtlpReceiver, unshare: str) -> None:
    """A program with a meter of its own moves up with its open requests: nothing twice, nothing lost, one publisher."""
    package.energy_path.chmod(0o444)
    system = hub_place.path / "system"  # stands for /run, which is the host's
    system.mkdir(mode=0o755)
    inside = [unshare, "--mount", "sh", "-c", 'mount --bind "$0" /run && exec "$@"', str(system)]
    at = system / "melodi-otel" / "hub.sock"
    env = hub_place.environ(receiver, MELODI_HUB="auto")
    until = hub_place.path / "until"
    with hub_place.tree.live():
        program = hub_place.program(env, before=inside, requests=2, held=3, seconds=0.3, until=str(until))
        hub_place.ready("out")
        assert hub_place.told()["local"]
        hub_place.until("it publishes", lambda: receiver.services("hw.energy") == {"chat"})
        named = "/run/melodi-otel/hub.sock"
        hub_place.agent(env | {"OTEL_SERVICE_NAME": "agent"}, at, before=inside, named=named)
        hub_place.until("the open requests are the agent's", lambda: hub_place.opened(at) >= 3)
        hub_place.until("the agent publishes", lambda: "agent" in receiver.services("hw.energy"))
        since_ns = time.time_ns()
        hub_place.until("it goes on", lambda: "agent" in receiver.services("hw.energy", since_ns + 1_000_000_000))
        until.touch()
        told = hub_place.finish(program)
        book = hub_place.settled(at)[PACKAGE]
    assert not told["local"]
    assert receiver.services("hw.energy", since_ns) == {"agent"}
    rows, own = told["rows"], told["books"][PACKAGE]
    assert usable(rows) == pytest.approx(own["attributed"] + book["settled"], rel=1e-9)
    assert own["attributed"] > 0 < book["settled"]
    assert abs(own["imbalance"]) <= 1e-9
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    assert {row["quality"] for row in rows} <= {"measured", "interpolated"}


def test_a_restarted_agent(hub_place: Any, package: Any, socket: Path) -> None:
    """SIGTERM, and a new one, as a service manager does: programs come back with their open requests, the books go on."""
    env = hub_place.environ(MELODI_HUB=str(socket))
    first = hub_place.agent(hub_place.environ(), socket, "--metrics-addr", "off")
    until = hub_place.path / "until"
    with hub_place.tree.live():
        program = hub_place.program(env, requests=2, held=3, seconds=0.3, until=str(until))
        hub_place.until("its requests are the agent's", lambda: hub_place.opened(socket) >= 3)
        measured = hub_place.journal(socket)["devices"][PACKAGE]["measured"]
        first.terminate()
        assert first.wait(30) == 0, hub_place.said("agent")
        old = hub_place.journal(socket)["hub"]
        hub_place.agent(hub_place.environ(), socket, "--metrics-addr", "off")
        hub_place.until("the books are the new one's", lambda: hub_place.journal(socket)["hub"] != old)
        hub_place.until("so are the requests", lambda: hub_place.opened(socket) >= 3)
        until.touch()
        told = hub_place.finish(program)
        book = hub_place.settled(socket)[PACKAGE]
    assert not told["local"]
    assert usable(told["rows"]) == pytest.approx(book["settled"], rel=1e-9)
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    assert book["measured"] > measured
    assert book["in"]["unsampled"] > 0


def test_hubs_of_two_users(
    hub_place: Any, package: Any, somebody: Callable[..., list[str]], free_port: Callable[[], int]
) -> None:
    """Each user has a hub; the machine's energy is on one of their two pages."""
    package.energy_path.chmod(0o444)
    other = hub_place.path / "run2"
    other.mkdir(mode=0o700)
    os.chown(other, SOMEBODY, SOMEBODY)
    at = other / "melodi-otel" / "hub.sock"
    hub_place.sockets.append(at)
    mine = hub_place.environ(MELODI_METRICS_ADDR=f"127.0.0.1:{free_port()}")
    theirs = hub_place.environ(MELODI_METRICS_ADDR=f"127.0.0.1:{free_port()}", XDG_RUNTIME_DIR=str(other))
    with hub_place.tree.live():
        runs = [hub_place.program(mine, "open/a", requests=3)]
        runs.append(hub_place.program(theirs, "open/b", before=somebody(), requests=3))
        told = [hub_place.finish(process, name) for process, name in zip(runs, ("open/a", "open/b"), strict=True)]
        pages = [hub_place.fetch(), hub_place.fetch(at=at)]
    assert not any(program["local"] for program in told)
    assert all(usable(program["rows"]) > 0 for program in told)
    assert ["hw_energy_joules_total{" in page for page in pages].count(True) == 1
    assert all("melodi_requests_total{" in page for page in pages)

"""Which meter a program uses: agent before shared before its own, and when it starts a shared hub."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from melodi_otel.config import GROUP_VARIABLE
from melodi_otel.hub import choice as module
from melodi_otel.hub import launch
from melodi_otel.hub.choice import Choice
from melodi_otel.hub.client import HubLost
from melodi_otel.hub.refusals import Refusal
from melodi_otel.hub.sockets import ConnectRefused, Listener, listen

Socket = socket.socket


class Town:
    """Places for an agent and a shared hub, a clock, and what was started."""

    def __init__(self, place: Path) -> None:
        self.agent = place / "agent.sock"
        (place / "run").mkdir(mode=0o700)
        self.environ = {"XDG_RUNTIME_DIR": str(place / "run")}
        self.started: list[Path] = []
        self.listeners: list[Listener] = []
        self.opened: list[Socket] = []
        self.seconds = 0.0

    def choice(self, setting: str = "auto", **more: Any) -> Choice:
        """How a program with this setting finds its meter."""
        given = {"start": self.start, "agent": self.agent, "arguments": ["serve.py"], "now": lambda: self.seconds}
        return Choice(setting, {**self.environ, **more.pop("environ", {})}, **{**given, **more})

    @property
    def shared(self) -> Path:
        """The shared hub's socket."""
        found = self.choice().shared()
        assert found is not None
        return found.path

    def start(self, path: Path) -> None:
        """A hub that listens at once."""
        self.started.append(path)
        self.listen(path)

    def listen(self, path: Path) -> None:
        """Somebody listens there."""
        self.listeners.append(listen(path, mode=0o600))

    def reached(self, connect: Any) -> str | None:
        """Where a choice leads to."""
        if connect is None:
            return None
        self.opened.append(connect())
        return Path(self.opened[-1].getpeername()).name

    def close(self) -> None:
        """Nothing stays."""
        for each in (*self.listeners, *self.opened):
            each.close()


@pytest.fixture
def town(place: Path) -> Iterator[Town]:
    """Nobody listens anywhere."""
    made = Town(place)
    yield made
    made.close()


def client(tier: str | None, alone: bool = False) -> Any:
    """A client of a hub of this tier; None: one that was never welcomed."""
    return SimpleNamespace(hub=None if tier is None else SimpleNamespace(tier=tier), alone=alone)


def test_agent_before_shared_before_local(town: Town) -> None:
    """`auto`: whoever is there, the highest first; a single process without any hub meters itself and starts nothing."""
    assert town.choice().first() is None
    town.listen(town.shared)
    assert town.reached(town.choice().first()) == "hub.sock"
    town.listen(town.agent)
    assert town.reached(town.choice().first()) == "agent.sock"
    assert town.started == []


def test_settings(town: Town) -> None:
    """`local` never asks, `shared` starts one and passes the agent by, a path means that socket and nothing else."""
    town.listen(town.agent)
    assert town.choice("local").first() is None
    assert town.reached(town.choice("shared").first()) == "hub.sock"
    assert town.started == [town.shared]
    assert town.reached(town.choice(str(town.agent)).first()) == "agent.sock"


def test_nothing_is_started_while_choosing(town: Town) -> None:
    """The choice itself is quick; the hub is started by whoever connects, off the request's thread."""
    connect = town.choice("shared").first()
    assert town.started == []
    assert town.reached(connect) == "hub.sock"


@pytest.mark.parametrize("kind", ["stale socket", "no socket", "a directory"])
def test_what_is_no_hub_counts_as_absent(town: Town, kind: str) -> None:
    """A socket that nobody listens on, a file, a directory: the program goes on as if nothing were there."""
    if kind == "stale socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(town.agent))
    elif kind == "no socket":
        town.agent.write_text("")
    else:
        town.agent.mkdir()
    assert town.choice().first() is None


@pytest.mark.parametrize("state", ["permission_denied", "foreign_owner", "no_answer"])
def test_a_socket_that_refuses(
    town: Town, state: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as absent, and is said once, however often it is looked for."""

    def refuse(path: Path, timeout: float) -> Socket:
        raise ConnectRefused(Refusal(state, f"{path} refuses"))

    monkeypatch.setattr(module, "connect", refuse)
    caplog.set_level("INFO")
    chosen = town.choice()
    assert chosen.first() is None
    assert chosen.above(None) is None
    assert sorted(record.message for record in caplog.records) == [
        f"the agent hub is not used: {town.agent} refuses",
        f"the shared hub is not used: {town.shared} refuses",
    ]


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({GROUP_VARIABLE: "abc-1"}, []),
        ({"WEB_CONCURRENCY": "4"}, []),
        ({"UVICORN_WORKERS": "2"}, []),
        ({"GUNICORN_CMD_ARGS": "--bind=:80 --workers=3"}, []),
        ({"GUNICORN_CMD_ARGS": "-w 3"}, []),
        ({}, ["/venv/bin/gunicorn", "-w", "4", "app:app"]),
        ({}, ["/venv/bin/gunicorn", "-w4", "app:app"]),
        ({}, ["/venv/bin/uvicorn", "app:app", "--workers", "4"]),
        ({}, ["/site-packages/uvicorn/__main__.py", "--workers=4", "app:app"]),
    ],
)
def test_several_processes_start_a_shared_hub(town: Town, environ: dict[str, str], arguments: list[str]) -> None:
    """A token from a parent, or several workers in the environment or on the command line."""
    assert town.reached(town.choice(environ=environ, arguments=arguments).first()) == "hub.sock"
    assert town.started == [town.shared]


@pytest.mark.parametrize(
    ("environ", "arguments"),
    [
        ({GROUP_VARIABLE: f"abc-{os.getpid()}"}, []),
        ({"WEB_CONCURRENCY": "1"}, []),
        ({"WEB_CONCURRENCY": "many", "GUNICORN_CMD_ARGS": "--workers 'four"}, []),
        ({"GUNICORN_CMD_ARGS": "--worker-class x -w"}, []),
        ({}, ["/venv/bin/uvicorn", "app:app", "--workers", "1"]),
        ({}, ["train.py", "--workers", "8"]),
        ({}, []),
    ],
)
def test_one_process_starts_none(town: Town, environ: dict[str, str], arguments: list[str]) -> None:
    """Its own token, one worker, somebody else's `--workers`, nonsense: a meter of its own."""
    assert town.choice(environ=environ, arguments=arguments).first() is None
    assert town.started == []


def test_forked_children_and_vllm_start_one(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does a process that was forked while it was metered, a child of multiprocessing, and one that has loaded vLLM."""
    assert town.choice().in_child().first() is not None
    multi = ModuleType("multiprocessing.process")
    multi.parent_process = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "multiprocessing.process", multi)
    assert town.choice().first() is None
    multi.parent_process = object  # type: ignore[attr-defined]
    assert town.choice().first() is not None
    multi.parent_process = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    assert town.choice().first() is not None


def test_a_child_chooses_as_its_parent_did(town: Town) -> None:
    """Setting, places and command line are the same in a forked child."""
    town.listen(town.agent)
    assert town.choice("local").in_child().first() is None
    assert town.reached(town.choice().in_child().first()) == "agent.sock"


def test_never_downward(town: Town) -> None:
    """From its own meter to any hub, from a shared one to the agent, from the agent nowhere."""
    town.listen(town.shared)
    assert town.reached(town.choice().above(None)) == "hub.sock"
    assert town.choice().above(client("shared")) is None
    town.listen(town.agent)
    assert town.reached(town.choice().above(None)) == "agent.sock"
    assert town.reached(town.choice().above(client("shared"))) == "agent.sock"
    assert town.choice().above(client("agent")) is None
    assert town.choice("local").above(None) is None
    assert town.choice("shared").above(client("shared")) is None


def test_a_named_socket_that_comes_later(town: Town) -> None:
    """A program that named a socket where nobody listened goes there when somebody does."""
    named = town.choice(str(town.agent))
    assert named.above(None) is None
    town.listen(town.agent)
    assert town.reached(named.above(None)) == "agent.sock"


def test_three_restarts_a_minute(town: Town) -> None:
    """Then the meter in the process, and no hub is looked for; a minute later it is tried again."""
    chosen = town.choice("shared")
    for _ in range(3):
        assert town.reached(chosen.after(client("shared"), "it hung up")) == "hub.sock"
    assert chosen.after(client("shared"), "it hung up") is None
    assert chosen.above(None) is None
    town.seconds = 61.0
    assert town.reached(chosen.above(None)) == "hub.sock"
    assert chosen.after(client("shared"), "it hung up") is not None


def test_a_hub_that_hangs_at_the_greeting_is_not_tried_for_ever(town: Town) -> None:
    """A frozen hub accepts every connection and answers none: each try counts."""
    town.listen(town.shared)
    chosen = town.choice("shared")
    tries = [town.reached(chosen.after(client(None), "timed out")) for _ in range(4)]
    assert tries == ["hub.sock", "hub.sock", "hub.sock", None]
    assert town.started == []


def test_after_the_agent(town: Town) -> None:
    """It may come back, as in a restart; if it does not, a single process has its own meter, one of several a shared hub."""
    town.listen(town.agent)
    assert town.reached(town.choice().after(client("agent"), "it hung up")) == "agent.sock"
    town.listeners.pop().close()

    def passing() -> float:
        town.seconds += 5.0
        return town.seconds

    alone = town.choice(now=passing).after(client("agent"), "it hung up")
    assert alone is not None
    with pytest.raises(HubLost, match="there is no socket"):
        alone()
    together = town.choice(now=passing, environ={"WEB_CONCURRENCY": "2"}).after(client("agent"), "it hung up")
    assert town.reached(together) == "hub.sock"


def test_a_hub_that_was_never_there(town: Town) -> None:
    """A single process goes on with its own meter; with a named socket as well, with one line."""
    assert town.choice().after(client(None), "it hung up at the greeting") is None
    assert town.choice(str(town.agent)).after(client(None), "there is no socket") is None


def test_the_end_waits_for_nobody(town: Town) -> None:
    """A program that ends starts no hub and stops waiting for one."""
    chosen = town.choice(str(town.agent))
    waits = chosen.after(client("agent"), "it hung up")
    assert waits is not None
    chosen.end()
    with pytest.raises(HubLost, match="the program ends"):
        waits()
    assert chosen.after(client("shared"), "it hung up") is None


def test_no_place_for_a_socket(town: Town, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where no directory is fit, `shared` is a meter of its own, with a line that says so."""

    def none(_: object) -> Path:
        raise module.places.NoPlace("nowhere")

    monkeypatch.setattr(module.places, "runtime_directory", none)
    assert town.choice("shared").first() is None
    assert "there is no directory for its socket" in caplog.text


def test_nobody_who_may_be_reached(town: Town) -> None:
    """A hub that cannot be started ends the wait with the reason."""

    def broken(_: Path) -> None:
        raise HubLost("no Python")

    connect = town.choice("shared", start=broken).first()
    assert connect is not None
    with pytest.raises(HubLost, match="no Python"):
        connect()
    assert launch.START_S > 1.0


@pytest.mark.parametrize("tier", ["shared", "agent"])
def test_who_was_alone_before_vllm_goes_there_again(town: Town, monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """A program that has joined a hub on its own joins it anew once it imports vLLM, whose processes share its engines; once."""
    town.listen(town.agent if tier == "agent" else town.shared)
    assert town.choice().above(client(tier, alone=True)) is None
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    assert town.reached(town.choice().above(client(tier, alone=True))) == (
        "agent.sock" if tier == "agent" else "hub.sock"
    )
    assert town.choice().above(client(tier, alone=False)) is None

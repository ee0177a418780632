"""The house plan, kept by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import melodi_otel

PACKAGE = Path(melodi_otel.__file__).parent
FILES = sorted(path for path in PACKAGE.rglob("*.py") if "startup" not in path.relative_to(PACKAGE).parts)

FLOOR = {
    "units",
    "clock",
    "errors",
    "config",
    "devices",
    "semconv",
    "semconv_metrics",
    "wall_time",
    "forks",
    "mountinfo",
    "worker",
    "phase_lock",
    "__init__",
}
"""The ground floor: everybody may stand on it, and it stands on nothing else."""

ANY = {"*"}
MAY_KNOW: dict[str, set[str]] = {
    "timeline": set(),
    "sources": set(),
    "identity": set(),
    "processes": {"sources.procstat"},
    "power_shape": {"sources"},
    "pace": {"sources", "power_shape"},
    "host_pids": set(),
    "neighbours": {"sources", "host_pids"},
    "sampler": {"sources", "timeline", "pace", "power_shape"},
    "attribution": {"timeline"},
    "instrumentation": {"attribution.meter"},
    "telemetry": {"attribution", "timeline", "identity", "instrumentation.seam"},
    "status": {"attribution", "sources", "sampler", "telemetry.metrics"},
    "results": {"attribution", "timeline"},
    "trace": {"attribution", "timeline"},
    "hub": {"attribution", "timeline"},
    "deploy": set(),
    "dataset": {"attribution", "timeline", "trace"},
    "cli": ANY,
    "runtime": ANY,
    "program": {"standby", "runtime", "results"},
    "standby": {
        "telemetry.deferral",
        "telemetry.genai",
        "telemetry.tracers",
        "instrumentation.loaded",
        "instrumentation.vllm",
    },
    "zero_code": {"program"},
    "vllm_plugin": {"program"},
    "publishing": set(),
    "carbon": set(),
    "libraries": {"instrumentation", "telemetry"},
    "promising": {"attribution", "hub", "telemetry"},
    "group_clocks": {"attribution", "processes", "host_pids"},
    "station": ANY,
    "tending": set(),
    "hub_process": ANY,
    "readings": {"attribution", "timeline", "sources", "sampler", "telemetry"},
    "testing": ANY,
    "__main__": ANY,
}
"""Room -> rooms (or single modules) that it may import beside itself and the floor. ``instrumentation.seam`` is the records
by which a call is described to whoever plugs in, so it is telemetry's door as well."""

ROOMS_OF: dict[str, set[str]] = {
    "opentelemetry": {"telemetry", "instrumentation", "standby", "zero_code"},
    "prometheus_client": {"telemetry"},
    "google": {"telemetry"},
    "grpc": {"telemetry"},
    "wrapt": {"instrumentation"},
    "torch": {"instrumentation", "cli/demo_model.py"},
    "transformers": {"instrumentation", "cli/demo_model.py"},
    "vllm": {"instrumentation"},
    "pynvml": {"sources"},
    "amdsmi": {"sources/amd_library.py"},
    "zeus_apple_silicon": {"sources/apple.py"},
    "psutil": {"sources", "processes"},
    "numpy": {"timeline", "attribution"},
    "msgspec": {"trace", "hub"},
    "zstandard": {"trace"},
    "werkzeug": {"telemetry"},
    "rich": {"results/terminal.py", "cli/top.py", "cli/top_view.py"},
    "typer": {"cli"},
    "yaml": {"deploy"},
    "grafana_foundation_sdk": {"deploy"},
    "pandas": {"results"},
}
"""Third-party library -> the room (or file) that owns it. The demo is an application of transformers, hence its file;
numpy is the arithmetic of the two pure rooms. ``testing`` stands in for every room and may import what it fakes."""


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def module(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, only for type checkers) of everything a file imports, wherever in it; literal import_module() too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in typing_only
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in typing_only
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    """A room imports itself, the ground floor and the rooms below it, nothing else of the house."""
    own = room(path)
    if path == PACKAGE / "__init__.py":
        return
    allowed = set() if own in FLOOR else MAY_KNOW[own]
    if "*" in allowed:
        return
    for name, typing_only in imports(path):
        if typing_only or name.split(".")[0] != "melodi_otel" or name == "melodi_otel.__version__":
            continue
        parts = name.split(".")[1:]
        if parts[0] in FLOOR or parts[0] == own:
            continue
        assert parts[0] in allowed or ".".join(parts[:2]) in allowed, f"{module(path)} may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_each_library_has_one_room(path):
    """A third-party library is imported in the room that owns it."""
    relative = path.relative_to(PACKAGE).as_posix()
    if room(path) == "testing":
        return
    for name, typing_only in imports(path):
        library = name.split(".")[0]
        if typing_only or library == "melodi_otel" or library in sys.stdlib_module_names or library == "__future__":
            continue
        owners = ROOMS_OF.get(library)
        assert owners is not None, f"{relative} imports {library}, which has no room"
        assert room(path) in owners or relative in owners, (
            f"{relative} imports {library}, which belongs to {sorted(owners)}"
        )


def test_floor_imports_the_standard_library_only():
    """The ground floor has no third-party import."""
    for path in FILES:
        if room(path) in FLOOR:
            outside = (
                {n.split(".")[0] for n, _ in imports(path)}
                - set(sys.stdlib_module_names)
                - {"melodi_otel", "__future__"}
            )
            assert not outside, (path, outside)


def test_every_room_is_in_the_plan():
    """A new room is written into the plan before it is built."""
    assert {room(path) for path in FILES} <= FLOOR | set(MAY_KNOW)


@pytest.mark.parametrize("word", ["util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"])
def test_names_say_what_a_file_holds(word):
    """No file is called by a word that fits every file."""
    assert not [path for path in PACKAGE.rglob("*") if word in path.stem.lower().split("_")]


def test_files_stay_readable():
    """Past 400 lines a file is a question, past 500 it is two files."""
    assert [(path.name, n) for path in FILES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 500] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstring_and_annotations(path):
    """Every file says what it knows and defers its annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path} has no docstring"
    if len(tree.body) > 1:
        assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body), path


HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "opentelemetry",
    "prometheus_client",
    "rich",
    "typer",
    "pandas",
    "psutil",
    "grpc",
)

PROBE = f"""
import sys, threading, time
start = time.perf_counter()
import melodi_otel
melodi_otel.__all__, dir(melodi_otel)
spent = time.perf_counter() - start
import os, signal
assert threading.enumerate() == [threading.main_thread()], threading.enumerate()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print([name for name in {HEAVY!r} if name in sys.modules], round(spent * 1000, 1))
"""


def test_importing_starts_nothing():
    """`import melodi_otel` starts no thread, takes no signal and loads nothing heavy."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded, _, milliseconds = done.stdout.strip().rpartition(" ")
    print(f"import melodi_otel: {milliseconds} ms")
    assert loaded == "[]"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_starts_at_import(path):
    """No module starts a thread, opens a file or asks the environment while it is loaded."""
    started = {"start", "Thread", "Popen", "run", "open", "register", "getenv", "system"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if isinstance(node, ast.If) and "__main__" in ast.dump(node.test):
            continue
        for call in ast.walk(node):
            if isinstance(call, ast.Lambda):
                break
            if isinstance(call, ast.Call):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                owner = getattr(getattr(call.func, "value", None), "id", "")
                assert name not in started, f"{path}: {owner}.{name}() at import"

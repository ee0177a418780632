from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import melodi_otel

ROOT = Path(melodi_otel.__file__).parent.parent
PYPROJECT = ROOT / "pyproject.toml"


@pytest.mark.parametrize("name", melodi_otel.__all__)
def test_every_public_name_can_be_had(name):
    """What __all__ promises is there, and dir() shows it."""
    assert getattr(melodi_otel, name) is not None
    assert name in dir(melodi_otel)


def test_public_names_are_these():
    """A new public name is a promise: it is added here on purpose."""
    assert sorted(melodi_otel.__all__) == [
        "Config",
        "Measurement",
        "Results",
        "__version__",
        "instrument",
        "last",
        "measure",
        "recent",
        "uninstrument",
    ]


def test_an_unknown_name_is_an_attribute_error():
    """A misspelt name fails as it does in every module."""
    with pytest.raises(AttributeError, match="has no attribute 'mesure'"):
        _ = melodi_otel.mesure


def test_version_is_a_version():
    """Three numbers, and the changelog knows them."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", melodi_otel.__version__)
    assert f"## [{melodi_otel.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project():
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]


def test_no_extra_requires_an_engine(project):
    """No extra lays an inference engine or torch over the one that is there."""
    needs = [need.lower() for needs in project["optional-dependencies"].values() for need in needs]
    names = {re.split(r"[\[<>=;! ]", need)[0] for need in needs}
    assert not names & {"torch", "vllm", "transformers", "tensorflow", "llama-cpp-python", "sglang", "jax"}
    extras = {"nvidia", "transformers", "vllm", "amd", "apple", "dataset", "web", "deploy", "all", "instruments"}
    assert extras == set(project["optional-dependencies"])
    assert project["optional-dependencies"]["instruments"] == []


def test_core_dependencies_are_the_agreed_ones(project):
    """A new core dependency is a decision, not an accident."""
    assert sorted(re.split(r"[\[<>=;! ]", need)[0] for need in project["dependencies"]) == [
        "msgspec",
        "numpy",
        "opentelemetry-api",
        "opentelemetry-exporter-otlp",
        "opentelemetry-instrumentation",
        "opentelemetry-sdk",
        "prometheus-client",
        "psutil",
        "rich",
        "typer",
        "wrapt",
    ]


def test_the_command_exists(project):
    """The script of the project is a function that can be called."""
    module, _, name = project["scripts"]["melodi-otel"].partition(":")
    assert importlib.util.find_spec(module) is not None
    assert callable(getattr(importlib.import_module(module), name))

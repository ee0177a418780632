from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from melodi_otel.config import VARIABLES, Config, unknown_fields
from melodi_otel.errors import ConfigError


def test_table_and_record_agree():
    """Every field has its variable and the reverse; the names are the same in upper case."""
    assert unknown_fields() == set()
    assert all(name == f"MELODI_{variable.field.upper()}" for name, variable in VARIABLES.items())


def test_an_empty_environment_gives_the_defaults():
    """No variable, or an empty one, is the default."""
    assert Config.from_env({}) == Config()
    assert Config.from_env({"MELODI_PUE": " ", "PATH": "/bin"}) == Config()


GOOD = {
    "MELODI_DISABLED": ("1", True),
    "MELODI_SOURCES": ("rapl, nvml", ("rapl", "nvml")),
    "MELODI_HUB": ("/run/melodi.sock", "/run/melodi.sock"),
    "MELODI_METRICS_ADDR": ("[::1]:9464", "[::1]:9464"),
    "MELODI_METRICS_TLS_CERT": ("/tls/tls.crt", "/tls/tls.crt"),
    "MELODI_METRICS_TLS_KEY": ("/tls/tls.key", "/tls/tls.key"),
    "MELODI_METRICS_TLS_CLIENT_CA": ("/tls/ca.crt", "/tls/ca.crt"),
    "MELODI_METRICS_USERS": ("/etc/melodi/users", "/etc/melodi/users"),
    "MELODI_SYSFS_ROOT": ("/host/sys", "/host/sys"),
    "MELODI_PROCFS_ROOT": ("/host/proc", "/host/proc"),
    "MELODI_NVML_LIBRARY": ("/x/libnvidia-ml.so.1", "/x/libnvidia-ml.so.1"),
    "MELODI_ESTIMATE_WATTS": ("20:65", (20.0, 65.0)),
    "MELODI_CALIBRATION": ("GPU-1=1.05", (("GPU-1", 1.05),)),
    "MELODI_IDLE_WATTS": ("GPU-1=60,intel-rapl:0=12.5", (("GPU-1", 60.0), ("intel-rapl:0", 12.5))),
    "MELODI_HOST_ID": ("h1", "h1"),
    "MELODI_ENGINE_DEVICES": ("GPU-1,GPU-2", ("GPU-1", "GPU-2")),
    "MELODI_STATIC_POLICY": ("dynamic", "dynamic"),
    "MELODI_SPAN_WAIT": ("2.5", 2.5),
    "MELODI_SPAN_LIMIT": ("5", 5),
    "MELODI_FOREIGN_SPANS": ("rollup", "rollup"),
    "MELODI_LOCAL_PROVIDERS": ("ollama, openai", ("ollama", "openai")),
    "MELODI_SAMPLE_HZ": ("10", 10.0),
    "MELODI_LABELS": ("tenant=baggage:tenant.id", "tenant=baggage:tenant.id"),
    "MELODI_METRIC_LABELS": ("tenant", ("tenant",)),
    "MELODI_LABEL_LIMIT": ("7", 7),
    "MELODI_LABEL_VALUES": ("tenant=a| b,team=x", (("tenant", ("a", "b")), ("team", ("x",)))),
    "MELODI_LABEL_HASH": ("yes", True),
    "MELODI_LABEL_HASH_KEY": ("s3cret", "s3cret"),
    "MELODI_ANSWER_ENERGY": ("1", True),
    "MELODI_CONSOLE": ("true", True),
    "MELODI_RECORD": ("t.jsonl", "t.jsonl"),
    "MELODI_RECORD_ROTATE": ("64M", 64 << 20),
    "MELODI_RECORD_KEEP": ("3", 3),
    "MELODI_CARBON_INTENSITY": ("350", 350.0),
    "MELODI_CARBON_REGIONS": (str(Path(__file__).with_name("regions.json")), (("north", 30.0), ("south", 410.5))),
    "MELODI_CARBON_REGION": ("north", "north"),
    "MELODI_CARBON_PROVIDER": ("grid", "grid"),
    "MELODI_PUE": ("1.2", 1.2),
    "MELODI_ENERGY_PRICE": ("0.3", 0.3),
    "MELODI_ENERGY_BUDGET": ("meta/llama=300,*=400", (("meta/llama", 300.0), ("*", 400.0))),
}


def test_every_variable_has_a_good_value_here():
    """The list below leaves no variable out."""
    assert set(GOOD) == set(VARIABLES)


@pytest.mark.parametrize(("name", "raw", "value"), [(name, *pair) for name, pair in GOOD.items()])
def test_good_values(name, raw, value):
    """A good value reaches the field of the same name, and no other field."""
    config = Config.from_env({name: f" {raw} "})
    changed = {
        f.name: getattr(config, f.name) for f in fields(Config) if getattr(config, f.name) != getattr(Config(), f.name)
    }
    assert getattr(config, VARIABLES[name].field) == value
    assert set(changed) <= {VARIABLES[name].field}


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("MELODI_DISABLED", "maybe"),
        ("MELODI_SOURCES", ","),
        ("MELODI_HUB", "there"),
        ("MELODI_METRICS_ADDR", "9464"),
        ("MELODI_METRICS_ADDR", "localhost:http"),
        ("MELODI_METRICS_ADDR", "localhost:70000"),
        ("MELODI_ESTIMATE_WATTS", "65"),
        ("MELODI_ESTIMATE_WATTS", "65:20"),
        ("MELODI_ESTIMATE_WATTS", "nan:inf"),
        ("MELODI_IDLE_WATTS", "GPU-1"),
        ("MELODI_CALIBRATION", "GPU-1=0"),
        ("MELODI_CALIBRATION", "GPU-1=3"),
        ("MELODI_IDLE_WATTS", "GPU-1=-3"),
        ("MELODI_STATIC_POLICY", "fair"),
        ("MELODI_SPAN_WAIT", "61"),
        ("MELODI_SPAN_LIMIT", "0"),
        ("MELODI_FOREIGN_SPANS", "yes"),
        ("MELODI_SAMPLE_HZ", "1000"),
        ("MELODI_SAMPLE_HZ", "fast"),
        ("MELODI_LABEL_LIMIT", "1.5"),
        ("MELODI_PUE", "0.5"),
        ("MELODI_PUE", "nan"),
        ("MELODI_CARBON_INTENSITY", "-1"),
        ("MELODI_CARBON_REGIONS", "/nowhere/regions.json"),
    ],
)
def test_bad_values_name_variable_value_and_what_is_allowed(name, raw):
    """A value that cannot be used is an error with all three."""
    with pytest.raises(ConfigError) as caught:
        Config.from_env({name: raw})
    assert str(caught.value).startswith(f"{name}={raw!r} cannot be used")
    assert f"allowed is {VARIABLES[name].allowed}" in str(caught.value)


def test_unknown_variables_are_warned_about(caplog):
    """An unknown name is a warning with the nearest known one; names of our own processes are not."""
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        Config.from_env({"MELODI_SORCES": "rapl", "MELODI_QQQQQQQQQQ": "1", "MELODI_GROUP_TOKEN": "x"})
    assert [r.getMessage() for r in caplog.records] == [
        "unknown variable MELODI_SORCES is ignored; did you mean MELODI_SOURCES?",
        "unknown variable MELODI_QQQQQQQQQQ is ignored",
    ]


def test_frozen():
    """Configuration does not change while it is in force."""
    with pytest.raises(FrozenInstanceError):
        Config().disabled = True


@pytest.mark.parametrize("raw", ["tenant", "=a", "tenant=a||b", "tenant=", "tenant=a,tenant=b"])
def test_listed_values_have_a_form(raw):
    """A list of label values that cannot be read is an error, whichever part of it is wrong."""
    with pytest.raises(ConfigError, match="MELODI_LABEL_VALUES="):
        Config.from_env({"MELODI_LABEL_VALUES": raw})


def test_a_secret_is_in_no_text():
    """The key of the hash is in no representation of the configuration."""
    config = Config.from_env({"MELODI_LABEL_HASH_KEY": "s3cret"})
    assert config.label_hash_key == "s3cret"
    assert "s3cret" not in repr(config) + str(config)
    assert VARIABLES["MELODI_LABEL_HASH_KEY"].shown("s3cret") == "(set, not shown)"


def test_a_budget_without_a_model_is_that_of_all() -> None:
    assert Config.from_env({"MELODI_ENERGY_BUDGET": "400"}).energy_budget == (("*", 400.0),)


@pytest.mark.parametrize("raw", ["-1", "a=", "=3", "a=-1", "a=x", "nan"])
def test_a_budget_that_is_none(raw: str) -> None:
    with pytest.raises(ConfigError, match=r"MELODI_ENERGY_BUDGET.*J per 1,000 output tokens"):
        Config.from_env({"MELODI_ENERGY_BUDGET": raw})

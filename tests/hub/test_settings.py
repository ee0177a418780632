from __future__ import annotations

import pytest

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.hub.settings import RELOADABLE, compare, read_variables


def test_a_file_of_variables(tmp_path):
    """Names and values, with or without quotes and `export`; comments and empty lines say nothing."""
    path = tmp_path / "agent.env"
    path.write_text("# idle\n; too\n\nMELODI_PUE=1.2\n export A = 'b # c' \nB=\"\"\nC==x=\n")
    assert read_variables(path) == {"MELODI_PUE": "1.2", "A": "b # c", "B": "", "C": "=x="}


@pytest.mark.parametrize("line", ["MELODI_PUE", "=1", "1A=2", "a b=3", "unset A"])
def test_a_line_that_cannot_be_used(tmp_path, line):
    """File and line are named, with what is allowed."""
    path = tmp_path / "agent.env"
    path.write_text(f"A=1\n{line}\n")
    with pytest.raises(ConfigError) as caught:
        read_variables(path)
    assert str(caught.value) == f"{path}, line 2 cannot be used: allowed is NAME=value, a # comment or nothing"


def test_a_file_that_cannot_be_read(tmp_path):
    """It is named, with the system's reason."""
    with pytest.raises(ConfigError, match=f"--env-file {tmp_path}/none cannot be read: No such file or directory"):
        read_variables(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"A=\xff")
    with pytest.raises(ConfigError, match="bytes cannot be read: it is not UTF-8"):
        read_variables(tmp_path / "bytes")


def test_what_may_change():
    """Figures that are only published, idle watts and the limit of labels come into force; all else waits for a restart."""
    old = Config(pue=1.1, sample_hz=10.0)
    new = Config(
        pue=1.2,
        carbon_intensity=300.0,
        energy_price=0.3,
        energy_budget=(("*", 5.0),),
        idle_watts=(("GPU-1", 60.0),),
        label_limit=5,
        sample_hz=5.0,
        label_hash_key="s3cret",
    )
    change = compare(old, new, {}, {})
    assert change.now == (
        "MELODI_CARBON_INTENSITY",
        "MELODI_ENERGY_BUDGET",
        "MELODI_ENERGY_PRICE",
        "MELODI_IDLE_WATTS",
        "MELODI_LABEL_LIMIT",
        "MELODI_PUE",
    )
    assert change.restart == ("MELODI_LABEL_HASH_KEY", "MELODI_SAMPLE_HZ")
    assert {name: getattr(change.config, name) for name in RELOADABLE} == {
        name: getattr(new, name) for name in RELOADABLE
    }
    assert (change.config.sample_hz, change.config.label_hash_key) == (10.0, None)


def test_exporters_read_their_variables_once():
    """An OTEL_* variable that comes, goes or changes waits for a restart; others of the environment do not matter."""
    before = {"OTEL_A": "1", "OTEL_B": "1", "OTEL_D": "1", "PATH": "/bin"}
    after = {"OTEL_A": "2", "OTEL_C": "1", "OTEL_D": "1", "PATH": "/sbin"}
    change = compare(Config(), Config(), before, after)
    assert (change.now, change.restart) == ((), ("OTEL_A", "OTEL_B", "OTEL_C"))

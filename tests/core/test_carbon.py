"""Grams that a live intensity makes of joules, and how they are asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from melodi_otel.carbon import STALE_S, LiveCarbon, installed
from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.testing.clock import ManualClock

KWH = 3.6e6


@dataclass
class Grid:
    """A provider that tells what it is given, and raises where that is an exception."""

    tells: list[float | Exception]
    asked: list[str | None] = field(default_factory=list)

    def __call__(self, region: str | None) -> float:
        self.asked.append(region)
        told = self.tells.pop(0)
        if isinstance(told, Exception):
            raise told
        return told


@dataclass
class Meter:
    joules: float = 0.0

    def __call__(self) -> float:
        return self.joules


def carbon(*tells: float | Exception) -> tuple[LiveCarbon, Meter, ManualClock]:
    meter, clock = Meter(5.0 * KWH), ManualClock()
    return LiveCarbon(Grid(list(tells)), "north", meter, clock), meter, clock


def test_joules_count_at_the_intensity_of_their_time() -> None:
    """1 kWh at 100 and 2 kWh at 400; what was measured before the first answer is not in it."""
    live, meter, _ = carbon(100.0, 400.0)
    assert (live.intensity, live.grams) == (None, None)
    live.ask()
    assert (live.intensity, live.grams) == (100.0, 0.0)
    meter.joules += KWH
    assert live.grams == pytest.approx(100.0)
    live.ask()
    meter.joules += 2.0 * KWH
    assert live.grams == pytest.approx(900.0)


@pytest.mark.parametrize("wrong", [OSError("no network"), float("nan"), -1.0])
def test_who_fails_changes_nothing(wrong: float | Exception, caplog: pytest.LogCaptureFixture) -> None:
    """The last figure counts on, and the log says it once."""
    live, meter, _ = carbon(100.0, wrong, wrong)
    for _ in range(3):
        live.ask()
    meter.joules += KWH
    assert (live.intensity, live.grams) == (100.0, pytest.approx(100.0))
    assert caplog.text.count("carbon intensity is not told") == 1


def test_an_old_figure_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Joules of a time of which no intensity is known are not emissions; with the next answer it goes on."""
    live, meter, clock = carbon(100.0, 200.0)
    live.ask()
    clock.advance(STALE_S + 1.0)
    assert (live.intensity, live.grams) == (None, 0.0)
    meter.joules += KWH
    assert live.grams == 0.0
    live.ask()
    meter.joules += KWH
    assert live.grams == pytest.approx(200.0)
    assert "older than an hour" in caplog.text


def test_a_provider_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"MELODI_CARBON_PROVIDER=nobody: .*melodi_otel_carbon"):
        installed("nobody", [])


def test_the_region_picks_out_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "regions.json"
    path.write_text(json.dumps({"north": 30, "south": 410.5}))
    environ = {"MELODI_CARBON_REGIONS": str(path), "MELODI_CARBON_REGION": "south"}
    assert Config.from_env(environ).intensity == 410.5
    assert Config.from_env(environ | {"MELODI_CARBON_INTENSITY": "7"}).intensity == 7.0
    with pytest.raises(ConfigError, match=r"east.*north, south"):
        Config.from_env(environ | {"MELODI_CARBON_REGION": "east"})


@pytest.mark.parametrize("text", ["[1]", "{", '{"north": "much"}', '{"north": -1}', None])
def test_a_file_that_cannot_be_used_is_named(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "regions.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"MELODI_CARBON_REGIONS=.*regions.json"):
        Config.from_env({"MELODI_CARBON_REGIONS": str(path), "MELODI_CARBON_REGION": "north"})

"""What a recording has said that still holds: the lines that its next file begins with, so that it can be read alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeVar

import msgspec
from msgspec.structs import replace

from melodi_otel.trace import lines as form

_Line = TypeVar("_Line", bound=msgspec.Struct)
_FACTS: Final = (
    "parameters",
    "active_parameters",
    "kv_bytes_per_token",
    "layers",
    "hidden",
    "experts",
    "experts_per_token",
)
_SERIES_S: Final = 60.0
"""CPU seconds that were not told for so long, while others were, are those of processes that are gone."""


class Standing:
    """Devices, engines, open requests and the last readings of a recording."""

    def __init__(self) -> None:
        self._devices: dict[str, form.DeviceLine] = {}
        self._engines: dict[str, form.EngineLine] = {}
        self._opens: dict[str, form.OpenLine] = {}
        self._binds: dict[str, list[form.BindLine]] = {}
        self._tokens: dict[str, form.TokensLine] = {}
        self._joules: dict[str, form.SampleLine] = {}
        self._watts: dict[str, form.SampleLine] = {}
        self._cpu: dict[tuple[str, str | None], form.CpuLine] = {}
        self._foreign: dict[str, form.ForeignLine] = {}
        self._busy: dict[str, form.BusyLine] = {}
        self._heard: dict[str, form.HeardLine] = {}
        self._unseen: form.UnseenLine | None = None

    def take(self, line: msgspec.Struct) -> None:
        """A line was written; steps need not be told."""
        match line:
            case form.SampleLine():
                (self._joules if line.joules is not None else self._watts)[line.device] = line
            case form.TokensLine():
                self._progress(line)
            case form.OpenLine():
                self._opens[line.id] = line
            case form.CloseLine():
                for kept in (self._opens, self._binds, self._tokens):
                    kept.pop(line.id, None)
            case form.BindLine():
                if line.id in self._opens:
                    self._binds.setdefault(line.id, []).append(line)
            case form.CpuLine():
                self._cpu[line.device, line.engine] = line
            case form.ForeignLine():
                self._foreign[line.device] = line
            case form.BusyLine():
                self._busy[line.device] = line
            case form.HeardLine():
                self._heard[line.engine] = line
            case form.UnseenLine():
                before = 0 if self._unseen is None else self._unseen.change
                self._unseen = replace(line, change=before + line.change)
            case form.DeviceLine():
                self._devices[line.id] = line
            case form.EngineLine():
                self._engine(line)
            case _:
                pass

    def lines(self) -> Iterator[bytes]:
        """The lines to repeat; what they are about comes before what is said of it."""
        self._forget()
        binds = [line for lines in self._binds.values() for line in lines]
        for group in (self._devices, self._engines, self._opens):
            yield from map(form.encode_again, group.values())
        yield from map(form.encode_again, (*binds, *self._tokens.values()))
        if self._unseen is not None and self._unseen.change:
            yield form.encode_again(self._unseen)
        for said in (self._foreign, self._busy, self._heard, self._cpu, self._joules, self._watts):
            yield from map(form.encode_again, said.values())

    def _progress(self, line: form.TokensLine) -> None:
        if line.id not in self._opens:
            return
        before = self._tokens.get(line.id)
        if before is not None:
            line = _filled(line, before, ("output_tokens", "first_token_t", "prompt_tokens", "cached_tokens"))
        self._tokens[line.id] = line

    def _engine(self, line: form.EngineLine) -> None:
        if line.state == "gone":
            self._engines.pop(line.id, None)
            self._heard.pop(line.id, None)
            return
        before = self._engines.get(line.id)
        if before is not None:
            # The ledger keeps what is not told anew; facts are told together.
            told = any(getattr(line, name) is not None for name in _FACTS)
            line = _filled(line, before, ("devices", "world", "model", "service", *(() if told else _FACTS)))
        self._engines[line.id] = line

    def _forget(self) -> None:
        newest: dict[str, float] = {}
        for (device, _), line in self._cpu.items():
            newest[device] = max(line.t, newest.get(device, line.t))
        self._cpu = {key: line for key, line in self._cpu.items() if line.t >= newest[key[0]] - _SERIES_S}


def _filled(line: _Line, before: _Line, names: tuple[str, ...]) -> _Line:
    missing = {name: getattr(before, name) for name in names if getattr(line, name) is None}
    return replace(line, **missing) if missing else line

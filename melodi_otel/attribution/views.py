"""What others see of the ledger: the books, what open requests have accrued, and the state for the next ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from melodi_otel.attribution.account import Account
from melodi_otel.attribution.books import Bucket, Phase, Snapshot, Who
from melodi_otel.attribution.finishing import made, so_far
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.roster import Roster
from melodi_otel.attribution.state import Known, SoFar, State


def accrued(roster: Roster, accounts: Mapping[str, Account]) -> dict[Key, list[Share]]:
    """What named requests have accrued that are open or wait for their joules; those without any device are left out."""
    known: dict[str, Known] = {name: account.known() for name, account in accounts.items()}
    found: dict[Key, list[Share]] = {}
    for one in _so_far(roster, accounts):
        found.setdefault(one.key, []).append(made(one, known[one.device]))
    return found


def _so_far(roster: Roster, accounts: Mapping[str, Account]) -> Iterator[SoFar]:
    for activity in roster.activities.values():
        if not activity.anonymous:
            engine = None if activity.engine is None else roster.engines.get(activity.engine)
            yield from so_far(activity, accounts, engine)


def snapshot(now_ns: int, roster: Roster, accounts: Mapping[str, Account]) -> Snapshot:
    """An immutable copy of the books."""
    in_flight = _in_flight(roster)
    active: dict[Who, int] = {}
    for activity in roster.activities.values():
        if activity.close_ns is None and not activity.anonymous:
            active[activity.who] = active.get(activity.who, 0) + 1
    attributed: dict[tuple[str, Who, Phase, str], float] = {}
    unattributed: dict[tuple[str, Bucket, tuple[str, str] | None], float] = {}
    for name, account in accounts.items():
        for (who, phase, quality), joules in account.attributed.items():
            attributed[(name, who, phase, quality)] = joules
        for (bucket, holder), joules in account.buckets.items():
            unattributed[(name, bucket, holder)] = joules
    books = {name: account.books(in_flight.get(name, 0.0)) for name, account in accounts.items()}
    return Snapshot(now_ns, books, attributed, unattributed, active)


def state(now_ns: int, roster: Roster, accounts: Mapping[str, Account]) -> State:
    """What the next ledger needs to continue the books."""
    in_flight = _in_flight(roster)
    return State(
        now_ns,
        tuple(account.state(in_flight.get(name, 0.0)) for name, account in accounts.items()),
        tuple(_so_far(roster, accounts)),
    )


def _in_flight(roster: Roster) -> dict[str, float]:
    held: dict[str, float] = {}
    for activity in roster.activities.values():
        for device, accrual in activity.accruals.items():
            held[device] = held.get(device, 0.0) + (accrual.prefill + accrual.decode + accrual.unsplit + accrual.static)
    return held

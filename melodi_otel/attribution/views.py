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
    in_flight = _in_flight(roster, accounts)
    active = {who: number for who, number in roster.active.items() if number}
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
    in_flight = _in_flight(roster, accounts)
    return State(
        now_ns,
        tuple(account.state(in_flight.get(name, 0.0)) for name, account in accounts.items()),
        tuple(_so_far(roster, accounts)),
    )


def _in_flight(roster: Roster, accounts: Mapping[str, Account]) -> dict[str, float]:
    # What requests have and what has settled of it: nobody who is still there has to be looked at.
    held: dict[str, float] = {}
    for name, account in accounts.items():
        joules = account.attributed_joules() - account.settled
        # Sums in another order differ in the last digits; with nobody there those are no joules.
        if roster.activities or abs(joules) > 1e-12 * abs(account.measured):
            held[name] = joules
    return held

"""A fuzzer of the wire and of what a hub does with what it reads.

    python tests/hub/fuzz_wire.py --minutes 10 [--seed N] [--engine own|atheris]

A case is a small world: three programs of two users and one ledger with four devices. Programs say what programs say, with
ids, counts and times that collide and overflow; some frames are then broken on purpose. In between the meters move and the
ledger settles. What must hold, whatever comes:

- nothing but ``WireError`` comes out of ``Frames``, and nothing at all out of ``Session.take`` and the ledger;
- the books balance to 1e-9, and what was told to requests is what they say was attributed;
- at the end everything is settled and nobody is waited for;
- no frame takes longer than seconds, and memory does not grow.

``--engine atheris`` (a package of that name, Apache-2.0, is needed) lets coverage guide the choices; ``own`` draws them by a
seed, so that a case can be repeated: ``--seed N --cases 1``.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.state import State
from melodi_otel.devices import Device
from melodi_otel.hub import wire
from melodi_otel.hub.limits import Refusals
from melodi_otel.hub.session import Session

S = 1_000_000_000
START_NS = 1_000 * S
SLOW_S = 5.0
NAMES = ("a", "b", "c", "d", "anonymous", "", "\0", "é" * 1024, "e", "f", "g", "h", "i")
DEVICES = ("GPU-0", "GPU-1", "cpu", "dram", "no such device")
COUNTS = (0, 1, 2, 17, 1000, 1 << 48, (1 << 64) - 1, -1)
NUMBERS: tuple[Any, ...] = (None, 0.0, 8.03e9, 1e18, 1e300, math.nan, math.inf, -1.0)
WRONG: tuple[Any, ...] = (None, True, -1, 1 << 63, 1.5, math.nan, "x", b"\xff\xfe", [], [[[[]]]], {"a": {}}, "y" * 5000)
BITS = tuple(1 << n for n in range(8))


class Chance:
    """Draws by a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def upto(self, most: int) -> int:
        """0..most."""
        return self._random.randint(0, most)

    def raw(self, most: int) -> bytes:
        """So many bytes at most."""
        return self._random.randbytes(self.upto(most))


@dataclass
class Tally:
    """What was done."""

    cases: int = 0
    frames: int = 0
    refused: int = 0
    messages: int = 0
    settlings: int = 0
    slowest_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.started
        return (
            f"{self.cases} cases, {self.frames} frames ({self.frames / seconds:.0f}/s), {self.refused} of them refused, "
            f"{self.messages} messages, {self.settlings} settlings, slowest frame {1e3 * self.slowest_s:.1f} ms, "
            f"{seconds:.0f} s, {rss_mib():.0f} MiB"
        )


class World:
    """Three connections and a ledger."""

    def __init__(self, chance: Any, tally: Tally) -> None:
        self.chance = chance
        self.tally = tally
        self.now_ns = START_NS
        self.told: dict[str, list[float]] = {}
        self.ledger = Ledger(host_devices=("cpu", "dram"), finished=self._finished)
        self.joules = dict.fromkeys(DEVICES[:4], 0.0)
        self.ledger.device(Device("GPU-0", "gpu", idle_watts=30.0))
        self.ledger.device(Device("GPU-1", "gpu", fraction=0.5))
        self.ledger.device(Device("cpu", "cpu"))
        self.ledger.device(Device("dram", "memory", idle_watts=2.0))
        self.busy = 0.0
        self.host = 0.0
        self.refuse = Refusals()
        self.ends: list[tuple[Session, wire.Frames, list[int]]] = [self.connect(number) for number in range(3)]
        self.read(0)
        self.settle()

    def connect(self, number: int) -> tuple[Session, wire.Frames, list[int]]:
        uid, group, alone = ((1, "g", True), (2, "g", False), (2, "g", False))[number]
        session = Session(self.ledger, uid, 100 + number, lambda *_: None, lambda *_: None, self.refuse)
        why = session.greet(wire.Hello(wire.VERSION, "0", str(number), group, alone, None, None, False, []))
        assert why is None, why
        return session, wire.Frames(wire.ToHub), [0]

    # --- what happens ---

    def turn(self) -> None:
        what = self.chance.upto(19)
        if what < 12:
            self.say(self.chance.upto(2))
        elif what < 17:
            self.read(self.one((1, 10, 100, 100, 100, 300, 2000)))
            if self.chance.upto(1):
                self.ledger.stir(self.now_ns)
            self.settle()
        elif what == 17:
            self.look()
        else:
            self.hang_up(self.chance.upto(2))

    def say(self, number: int) -> None:
        session, frames, count = self.ends[number]
        messages = [self.message() for _ in range(1 + self.chance.upto(3))]
        frame = framed(count[0], messages)
        count[0] += 1
        if self.chance.upto(14) == 0:
            frame = self.broken(frame)
        cut = self.chance.upto(len(frame))
        start = time.perf_counter()
        self.tally.frames += 1
        try:
            for part in (frame[:cut], frame[cut:]):
                for message in frames.feed(part):
                    self.tally.messages += 1
                    session.take(message, self.now_ns)
        except wire.WireError:
            self.tally.refused += 1
            self.hang_up(number)
        spent = time.perf_counter() - start
        self.tally.slowest_s = max(self.tally.slowest_s, spent)
        assert spent < SLOW_S, f"a frame of {len(frame)} bytes took {spent:.1f} s"

    def hang_up(self, number: int) -> None:
        session = self.ends[number][0]
        session.leave(self.now_ns)
        session.depart(self.now_ns)
        assert not session.open
        assert not session.unseen
        self.ends[number] = self.connect(number)

    def read(self, milliseconds: int) -> None:
        self.now_ns += milliseconds * 1_000_000
        for device in self.joules:
            if self.chance.upto(9):
                self.joules[device] += milliseconds * self.one((0.0, 0.002, 0.05, 0.3, 0.7))
                if self.chance.upto(60) == 0:
                    self.joules[device] = 0.0  # a reset
                self.ledger.counter(device, self.now_ns, self.joules[device])
        self.host += milliseconds * self.one((0.0, 0.0005, 0.002))
        for group in ("1:g:0", "2:g"):
            if self.chance.upto(3) == 0:
                self.busy += milliseconds * self.one((0.0, 0.0002, 0.001))
                self.ledger.cpu("cpu", EngineId(group, -1), self.now_ns, self.busy, self.host)
        if self.chance.upto(30) == 0:
            self.ledger.cpu_gone(EngineId("2:g", -1))

    def settle(self) -> None:
        self.tally.settlings += 1
        start = time.perf_counter()
        self.ledger.settle(self.now_ns)
        spent = time.perf_counter() - start
        assert spent < SLOW_S, f"settling took {spent:.1f} s"
        self.check()

    def check(self) -> None:
        assert self.ledger.refused == 0, "a message made the ledger fail"
        for device, books in self.ledger.snapshot().books.items():
            assert abs(books.imbalance()) <= 1e-9, f"{device} is out of balance by {books.imbalance():g}: {books}"
            told = math.fsum(self.told.get(device, ()))
            assert math.isclose(told, books.attributed, rel_tol=1e-9, abs_tol=1e-9), f"{device}: {told} J told, {books}"

    def look(self) -> None:
        state = self.ledger.state(self.now_ns)
        back = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=State)
        shares = [share for found in accrued_in(back).values() for share in found]
        assert shares == [share for found in self.ledger.accrued().values() for share in found]
        for known in state.devices:
            held = math.fsum(share.joules or 0.0 for share in shares if share.device == known.device.id)
            assert held <= known.in_flight + 1e-9 * max(1.0, known.measured)
        self.ledger.present()
        self.ledger.between("GPU-0", START_NS, self.now_ns)

    def end(self) -> None:
        for session, _, _ in self.ends:
            session.leave(self.now_ns)
        for _ in range(4):
            self.read(20_000)
            self.settle()
        assert self.ledger.waiting() == 0, "requests are waited for for ever"
        self.ledger.flush(self.now_ns)
        self.check()
        for session, _, _ in self.ends:
            assert not session.awaited
        for books in self.ledger.snapshot().books.values():
            assert abs(books.in_flight) < 1e-9

    def _finished(self, _: Any, shares: list[Any]) -> None:
        for share in shares:
            if share.joules is not None:
                self.told.setdefault(share.device, []).append(share.joules)

    # --- what is said ---

    def one(self, things: Any) -> Any:
        return things[self.chance.upto(len(things) - 1)]

    def name(self) -> str:
        return self.one(NAMES[:4]) if self.chance.upto(3) else self.one(NAMES)

    def count(self) -> int:
        return self.chance.upto(500) if self.chance.upto(29) else self.one(COUNTS)

    def maybe(self, value: Any) -> Any:
        return value if self.chance.upto(1) else None

    def time(self) -> int:
        what = self.chance.upto(39)
        if what:
            return self.now_ns - self.chance.upto(400) * 1_000_000 + (1_000_000 if what < 4 else 0)
        return self.one((0, 1, START_NS, self.now_ns + 3600 * S, (1 << 62) - 1, 1 << 62, -1))

    def devices(self) -> Any:
        return None if self.chance.upto(1) else [self.one(DEVICES) for _ in range(self.chance.upto(3))]

    def rows(self) -> list[Any]:
        return [[self.name(), self.count(), self.count()] for _ in range(self.chance.upto(2))]

    def message(self) -> list[Any]:
        made = self.proper()
        if self.chance.upto(39) == 0 and len(made) > 1:
            made[1 + self.chance.upto(len(made) - 2)] = self.one(WRONG)
        if self.chance.upto(11) == 0:
            made.append(self.one(WRONG))  # a newer program says more
        return made

    def proper(self) -> list[Any]:
        what = self.chance.upto(24)
        labels = {"service.name": self.name()} if self.chance.upto(3) == 0 else {}
        if what < 5:
            late = [[self.time() for _ in range(self.chance.upto(3))], bool(self.chance.upto(1))]
            probed, threaded = bool(self.chance.upto(1)), self.chance.upto(5) == 0
            return [3, self.name(), self.time(), self.maybe(self.chance.upto(2)), self.devices(), self.maybe("m"),
                    self.maybe(self.count()), self.maybe(self.count()), labels, self.maybe(self.name()), threaded, probed,
                    late if self.chance.upto(7) == 0 else None]  # fmt: skip
        if what < 8:
            return [5, self.name(), self.time(), self.count(), self.maybe(self.time()), self.maybe(self.count()),
                    self.maybe(self.count())]  # fmt: skip
        if what < 12:
            joined = [[self.name(), self.count()] for _ in range(self.chance.upto(3))]
            left = [self.name() for _ in range(self.chance.upto(1))]
            return [6, self.chance.upto(2), self.chance.upto(1), self.chance.upto(20), self.time(), self.time(),
                    self.devices(), [self.count(), self.count()], self.rows(), self.rows(), joined, left]  # fmt: skip
        if what < 16:
            return [7, self.name(), self.time(), self.maybe(self.count()), self.one(("stop", "length", "abort", "error")),
                    self.maybe(self.time()), self.maybe(self.count()), self.maybe(self.count())]  # fmt: skip
        if what == 16:
            return [4, self.name(), self.name()]
        if what == 17:
            facts = [*(self.one(NUMBERS) for _ in range(3)), *(self.maybe(self.count()) for _ in range(4))]
            facts = facts if self.chance.upto(3) == 0 else [None] * 7
            state = self.one(("ready", "loading", "gone"))
            return [2, self.chance.upto(2), self.time(), state, "m", self.devices(), self.maybe(2), [], facts]
        if what == 18:
            return self.one(([8, self.name()], [9, self.time(), self.one((1, -1, 5, -70_000))]))
        if what == 19:
            return [10, self.name(), *([None] * 3), 1, 2, *([None] * 3), "stop", None, True, self.one(NUMBERS), None,
                    "measured", b"", b"", labels]  # fmt: skip
        if what < 24:
            return self.one(([11, 1], [12, 1], [13, 1, "GPU-0", 0, 5], [14, 1], [4, self.name(), self.name()]))
        return self.one(([1, 1], [33, 1], [99], [], ["x"], [1, wire.VERSION, "", "", "", True, None, None, True, []]))

    def broken(self, frame: bytes) -> bytes:
        found = bytearray(frame)
        what = self.chance.upto(7)
        if what == 0:  # bits
            for _ in range(1 + self.chance.upto(3)):
                found[self.chance.upto(len(found) - 1)] ^= self.one(BITS)
        elif what == 1:  # the length lies
            found[self.chance.upto(3)] = self.chance.upto(255)
        elif what == 2:  # cut off
            del found[self.chance.upto(len(found) - 1) :]
        elif what == 3:  # noise in the middle
            at = self.chance.upto(len(found) - 1)
            found[at:at] = self.chance.raw(40)
        elif what == 4:  # twice
            found += frame
        elif what == 5:  # a huge count of things, none of which follow
            head = self.one(
                (b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
            )
            at = 4 + self.chance.upto(len(found) - 4)
            found[at:] = head
            found[:4] = (len(found) - 4).to_bytes(4, "big")
        elif what == 6:  # deep
            deep = self.one((b"\x91", b"\x81\xa1a", b"\xdc\x00\x01")) * (1 + self.chance.upto(3000))
            found = bytearray((len(deep) + 1).to_bytes(4, "big") + deep + b"\xc0")
        else:  # nothing but noise
            found = bytearray(self.chance.raw(200))
        return bytes(found) or b"\0"


def framed(number: int, messages: list[Any]) -> bytes:
    """A frame of whatever these are."""
    raw = msgspec.msgpack.encode((number, messages))
    return len(raw).to_bytes(4, "big") + raw


def case(chance: Any, tally: Tally) -> None:
    """One world from beginning to end.

    Raises:
        AssertionError: something does not hold.
    """
    tally.cases += 1
    world = World(chance, tally)
    for _ in range(20 + chance.upto(180)):
        world.turn()
    world.end()


def run(seed: int, cases: int | None = None, minutes: float | None = None) -> Tally:
    """Cases ``seed``, ``seed + 1``, … until ``cases`` have run or ``minutes`` are over.

    Raises:
        AssertionError: something does not hold; it names the case.
    """
    tally = Tally()
    grown_from = None
    number = seed
    while (cases is None or tally.cases < cases) and (
        minutes is None or time.perf_counter() - tally.started < 60 * minutes
    ):
        try:
            case(Chance(number), tally)
        except BaseException as error:
            error.add_note(f"case {number}: python tests/hub/fuzz_wire.py --seed {number} --cases 1")
            raise
        number += 1
        if tally.cases == 200:
            grown_from = rss_mib()
        if grown_from is not None:
            assert rss_mib() < grown_from + 200, f"memory has grown from {grown_from:.0f} to {rss_mib():.0f} MiB"
    return tally


def rss_mib() -> float:
    """Resident memory of this process in MiB; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20
    except OSError:
        return 0.0


def guided(minutes: float, seed: int) -> None:
    """Let atheris choose; ends the process."""
    import atheris

    class Guided:
        def __init__(self, data: bytes) -> None:
            self._data = atheris.FuzzedDataProvider(data)

        def upto(self, most: int) -> int:
            return self._data.ConsumeIntInRange(0, most)

        def raw(self, most: int) -> bytes:
            return self._data.ConsumeBytes(self.upto(most))

    tally = Tally()

    def one(data: bytes) -> None:
        chance = Guided(data)
        tally.cases += 1
        world = World(chance, tally)
        for _ in range(min(200, len(data) // 8)):
            world.turn()
        world.end()
        if tally.cases % 1000 == 0:
            print(tally, flush=True)

    for module in (wire, sys.modules["melodi_otel.hub.session"], sys.modules["melodi_otel.attribution.core"]):
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module.__name__:
                for name, method in vars(value).items():
                    if type(method) is type(one):
                        setattr(value, name, atheris.instrument_func(method))
    flags = [f"-max_total_time={round(60 * minutes)}", f"-seed={seed}", "-max_len=8192", "-len_control=0"]
    atheris.Setup([sys.argv[0], *flags], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help="default: 10, or as long as --cases take")
    parser.add_argument("--cases", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if options.engine == "atheris":
        guided(options.minutes or 10.0, options.seed)
    minutes = options.minutes if options.minutes or options.cases else 10.0
    print(run(options.seed, options.cases, minutes))


if __name__ == "__main__":
    main()

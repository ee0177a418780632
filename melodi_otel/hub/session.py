"""One connection as the hub sees it: who it is, what it may say, and what is owed to it.

Who it is comes from the kernel (``SO_PEERCRED``), never from the message. Ids of one program mean nothing in another: inside
the books every request and engine stands under a group of its own, ``UID:TOKEN:NAME`` (``UID:TOKEN`` where the processes of a
group share engines), so nobody can open, close or claim what is not his. What breaks a rule is refused, counted and logged
once; it ends the connection only where the stream itself cannot be trusted any more.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

import msgspec

from melodi_otel import semconv
from melodi_otel.attribution.meter import EngineId, Key, Late, Meter, Share
from melodi_otel.attribution.roster import LATE
from melodi_otel.hub import wire
from melodi_otel.hub.limits import (
    BESIDE_LIMIT,
    BIND_LIMIT,
    ENGINE_LIMIT,
    LANE_LIMIT,
    MEMBER_LIMIT,
    NAME_LIMIT,
    OPEN_LIMIT,
    OTHER,
    Names,
    Refusals,
)
from melodi_otel.hub.wire import Told

_IDENTITY: Final = (semconv.GEN_AI_PROVIDER, semconv.SERVICE_NAME, semconv.SERVICE_NAMESPACE)
_SHARE: Final = 600
"""Bytes of a share on the wire at most, without its key and the name of its device."""


class Books(Meter, Protocol):
    """What a session needs of the ledger beside the meter interface."""

    def unseen(self, t_ns: int, change: int) -> None: ...
    def forgo(self, key: Key) -> None: ...
    def delivered(self, key: Key) -> None: ...
    def heard(self, engine: EngineId, t_ns: int) -> None: ...


class Session:
    """The rules of one connection. Called on the hub's loop only.

    Args:
        books: where accepted messages go.
        uid: the user at the other end; None where the system does not tell.
        pid: its process, 0 where it cannot be seen from here.
        finished: called with (this, request id, shares) when joules are final, while the ledger settles.
        observed: called with what metrics shall show, and with what answers promise.
        refuse: counts.
        names: of this user; None: this connection's own.
    """

    def __init__(
        self,
        books: Books,
        uid: int | None,
        pid: int,
        finished: Callable[[Session, str, list[Share]], None],
        observed: Callable[[Session, wire.Observed | wire.Promised], None],
        refuse: Refusals,
        names: Names | None = None,
    ) -> None:
        self.uid = uid
        self.pid = pid
        self.hello: wire.Hello | None = None
        self.group = ""
        self.open: dict[str, bool] = {}  # request -> whether it answers Ask
        self.awaited: set[str] = set()
        self.probed = 0
        self.asked: int | None = None
        self.asks: deque[tuple[int, int]] = deque(maxlen=64)  # questions without an answer, and when they were put
        self.caught_up = False  # an answer came after its round
        self.undelivered: deque[tuple[int, list[Told]]] = deque()
        self.resumed: dict[Key, tuple[bool, list[Share]]] = {}  # told at the greeting, and maybe not read yet
        self.closed_ns: int | None = None  # the earliest close since somebody looked
        self.messages = 0
        self.unseen = 0
        self._engines: set[int] = set()
        self._declared: set[int] = set()
        self._lanes: OrderedDict[tuple[int, int], set[str]] = OrderedDict()
        self._binds: dict[str, int] = {}
        self._bound = 0
        self._books = books
        self._finished = finished
        self._observed = observed
        self._refuse = refuse
        self._names = names or Names()
        self._number = 0
        self._now_ns = 0
        self._takes: dict[type[Any], Callable[[Any], None]] = {
            wire.Opened: self._open,
            wire.Progressed: self._progress,
            wire.Stepped: self._step,
            wire.Closed: self._close,
            wire.Bound: self._bind,
            wire.EngineTold: self._engine,
            wire.Forgone: self._forgo,
            wire.Unseen: self._unseen,
            wire.Observed: self._observe,
            wire.Promised: self._promise,
            wire.Got: self._got,
            wire.Answered: self._answered,
        }

    def greet(self, hello: wire.Hello) -> str | None:
        """Take the first message; why it is refused, or None."""
        if hello.version != wire.VERSION:
            return self.refuse_version(hello.version, hello.release)
        self.hello = hello
        who = "?" if self.uid is None else str(self.uid)
        self.group = f"{who}:{hello.group}:{hello.name}" if hello.alone else f"{who}:{hello.group}"
        return None

    def refuse_version(self, version: int, release: str | None) -> str:
        """Count a greeting in another version of the wire; what to tell the program."""
        self._refuse("version", self.uid, f"it speaks version {version} of the wire, this hub {wire.VERSION}")
        program = "the program" if release is None else f"the program (melodi_otel {release})"
        return (
            f"this hub speaks version {wire.VERSION} of the wire and {program} version {version}: "
            "bring both to the same release"
        )

    def take(self, message: wire.Message, now_ns: int) -> None:
        """Any message but the first; one that breaks a rule is left out.

        What it says of the time after ``now_ns`` is said of ``now_ns``: nobody knows the future, and the books would wait
        for it.
        """
        self.messages += 1
        self._now_ns = now_ns
        take = self._takes.get(type(message))
        if take is not None:
            take(message)
        elif type(message) is wire.Hello:
            self._refuse("replayed", self.uid, "it greeted twice")
        else:
            self._refuse("malformed", self.uid, f"{type(message).__name__} is for others than a hub")

    def owe(self, told: list[Told]) -> tuple[int, list[Told]]:
        """Final joules on their way to the program, kept until it has acknowledged them."""
        self._number += 1
        self.undelivered.append((self._number, told))
        return self.undelivered[-1]

    def leave(self, now_ns: int) -> None:
        """The connection is gone: what was open used what it used until now."""
        for request in list(self.open):
            self._books.close(self._key(request), now_ns, None, "abort")
        self.open.clear()
        self.awaited.clear()
        for _, told in self.undelivered:
            self._arrived(told)
        self.undelivered.clear()
        for number in self._declared:
            self._books.engine(EngineId(self.group, number), now_ns, "gone")
        self._declared.clear()
        self._binds.clear()
        self._lanes.clear()
        self.probed = self._bound = 0
        if self.unseen:
            self._books.unseen(now_ns, -self.unseen)
            self.unseen = 0

    def depart(self, now_ns: int) -> None:
        """The last of its group is gone: so are its engines."""
        for number in self._engines:
            self._books.engine(EngineId(self.group, number), now_ns, "gone")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _key(self, request: str) -> Key:
        return Key(self.group, request)

    def _past(self, t_ns: int | None) -> int | None:
        return None if t_ns is None else min(t_ns, self._now_ns)

    def _mine(self, request: str, what: str) -> bool:
        if request in self.open:
            return True
        self._refuse("foreign", self.uid, f"{what} for a request that this connection has not opened")
        return False

    def _known(self, engine: int) -> bool:
        if engine in self._engines:
            return True
        if len(self._engines) >= ENGINE_LIMIT:
            self._refuse("too_many", self.uid, f"more than {ENGINE_LIMIT} engines on one connection")
            return False
        self._engines.add(engine)
        return True

    def _room(self, *names: str | None) -> bool:
        if self._names(*names):
            return True
        self._refuse("too_many", self.uid, f"more than {NAME_LIMIT} names of models and services: they are `{OTHER}`")
        return False

    def _open(self, message: wire.Opened) -> None:
        request = message.request
        if request in self.open or request in self.awaited:
            self._refuse("replayed", self.uid, "a request was opened twice")
            return
        if request == LATE:
            self._refuse("foreign", self.uid, f"the id {LATE!r} is the hub's own")
            return
        if len(self.open) >= OPEN_LIMIT:
            self._refuse("too_many", self.uid, f"more than {OPEN_LIMIT} open requests on one connection")
            return
        if message.engine is not None and not self._known(message.engine):
            return
        self.open[request] = message.probed
        self.probed += message.probed
        model, labels, late = message.model, message.labels, message.late
        if not self._room("open", model, *(labels.get(name) for name in _IDENTITY)):
            model, labels = OTHER, {name: value for name, value in labels.items() if name not in _IDENTITY}
        if late is not None and len(late.beside) > BESIDE_LIMIT:
            late = Late(late.beside[-BESIDE_LIMIT:], late.elsewhere)
        self._books.open(
            self._key(request),
            min(message.t_ns, self._now_ns),
            engine=None if message.engine is None else EngineId(self.group, message.engine),
            devices=_once(message.devices),
            model=model,
            prompt_tokens=message.prompt_tokens,
            cached_tokens=message.cached_tokens,
            labels=labels,
            parent=None if message.parent is None or message.parent == request else self._key(message.parent),
            # Native thread ids of other processes mean nothing here; that there is one does.
            thread=0 if message.threaded else None,
            late=late,
            reason=message.reason,
        )

    def _progress(self, message: wire.Progressed) -> None:
        if message.request in self.open:
            now_ns, first_ns = self._now_ns, message.first_token_ns
            self._books.progress(
                Key(self.group, message.request),
                min(message.t_ns, now_ns),
                message.output_tokens,
                first_token_ns=first_ns if first_ns is None or first_ns < now_ns else now_ns,
                prompt_tokens=message.prompt_tokens,
                cached_tokens=message.cached_tokens,
            )
        else:
            self._mine(message.request, "progress")

    def _bind(self, message: wire.Bound) -> None:
        request = message.request
        if not self._mine(request, "a bind"):
            return
        if self._bound >= BIND_LIMIT:
            self._refuse("too_many", self.uid, f"more than {BIND_LIMIT} ids are bound on one connection")
            return
        self._bound += 1
        self._binds[request] = self._binds.get(request, 0) + 1
        self._books.bind(self._key(request), message.child)

    def _forgo(self, message: wire.Forgone) -> None:
        request = message.request
        # Its joules may be under way: the program gave up before it could read them.
        under_way = any(one.request == request for _, told in self.undelivered for one in told)
        if request in self.awaited or request in self.open or under_way:
            self._books.forgo(self._key(request))

    def _unseen(self, message: wire.Unseen) -> None:
        # The ledger has one number for everybody: nobody takes from it what others have put there.
        before, self.unseen = self.unseen, max(0, min(OPEN_LIMIT, self.unseen + message.change))
        if self.unseen != before:
            self._books.unseen(min(message.t_ns, self._now_ns), self.unseen - before)

    def _observe(self, message: wire.Observed) -> None:
        hello = self.hello
        service = None if hello is None else hello.service
        namespace = None if hello is None else hello.namespace
        names = (message.model, message.provider, message.operation, message.error_type, message.scope)
        if not self._room("observed", service, namespace, *names):
            message = msgspec.structs.replace(
                message, model=OTHER, provider=None, operation=None, error_type=message.error_type and OTHER, scope=None
            )
        self._observed(self, message)

    def _promise(self, message: wire.Promised) -> None:
        self._observed(self, message)

    def _got(self, message: wire.Got) -> None:
        while self.undelivered and self.undelivered[0][0] <= message.settled:
            self._arrived(self.undelivered.popleft()[1])

    def _arrived(self, told: list[Told]) -> None:
        for one in told:
            self._books.delivered(self._key(one.request))

    @property
    def stepping(self) -> bool:
        """Whether an engine runs there, whose steps may be on their way."""
        return bool(self._declared)

    def ask(self, number: int, now_ns: int) -> wire.Ask:
        """A question how far it is; who has not answered the last one, and has only steps to tell, is not waited for."""
        if self.probed or not self.asks:
            self.asked = number
        self.asks.append((number, now_ns))
        return wire.Ask(number)

    def _answered(self, message: wire.Answered) -> None:
        if message.ask == self.asked:
            self.asked = None
        elif self.asks and self._declared:
            self.caught_up = True
        t_ns = 0
        while self.asks and self.asks[0][0] <= message.ask:
            t_ns = self.asks.popleft()[1]
        if t_ns:
            # What had happened when it was asked stood before the answer.
            for number in self._declared:
                self._books.heard(EngineId(self.group, number), t_ns)

    def _close(self, message: wire.Closed) -> None:
        request = message.request
        if request not in self.open:
            self._refuse("foreign", self.uid, "a close for a request that this connection has not opened")
            if request not in self.awaited:
                self._finished(self, request, [])  # nobody shall wait for what will never come
            return
        self.probed -= self.open.pop(request)
        self._bound -= self._binds.pop(request, 0)
        self.awaited.add(request)
        t_ns = min(message.t_ns, self._now_ns)
        self.closed_ns = t_ns if self.closed_ns is None else min(t_ns, self.closed_ns)
        future = self._books.close(
            Key(self.group, request),
            t_ns,
            message.output_tokens,
            message.outcome,
            first_token_ns=self._past(message.first_token_ns),
            prompt_tokens=message.prompt_tokens,
            cached_tokens=message.cached_tokens,
        )
        future.add_done_callback(lambda done: self._settled(request, done))

    def _settled(self, request: str, done: Future[list[Share]]) -> None:
        self.awaited.discard(request)
        self._finished(self, request, done.result())

    def _step(self, message: wire.Stepped) -> None:
        if not self._known(message.engine) or not self._fits(message):
            return
        now_ns = self._now_ns
        self._books.step(
            EngineId(self.group, message.engine),
            message.lane,
            message.seq,
            min(message.t0_ns, now_ns),
            min(message.t1_ns, now_ns),
            _once(message.devices),
            decode=message.decode,
            prefill=message.prefill,
            computed=message.computed,
            joined=message.joined,
            left=message.left,
        )

    def _fits(self, message: wire.Stepped) -> bool:
        """Follow the decode set of a lane; whether it is of a sane size."""
        at = (message.engine, message.lane)
        members = self._lanes.get(at)
        if members is None:
            members = self._lanes[at] = set()
            if len(self._lanes) > LANE_LIMIT:
                self._lanes.popitem(last=False)
        else:
            self._lanes.move_to_end(at)
        members.difference_update(message.left)
        members.update([member.id for member in message.joined])
        members.difference_update([row.id for row in message.computed])
        if len(members) <= MEMBER_LIMIT:
            return True
        members.clear()  # the ledger's is void, too, with the next step: one number is missing
        self._refuse("too_many", self.uid, f"more than {MEMBER_LIMIT} sequences in one step")
        return False

    def _engine(self, message: wire.EngineTold) -> None:
        if not self._known(message.number):
            return
        (self._declared.discard if message.state == "gone" else self._declared.add)(message.number)
        parameters, active, kv, layers, hidden, experts, per_token = message.facts
        told: dict[str, Any] = {
            "model": message.model if self._room("engine", message.model) else OTHER,
            "devices": _once(message.devices),
            "world": message.world,
            "pids": message.pids,
            "parameters": parameters,
            "active_parameters": active,
            "kv_bytes_per_token": kv,
            "layers": layers,
            "hidden": hidden,
            "experts": experts,
            "experts_per_token": per_token,
        }
        t_ns = min(message.t_ns, self._now_ns)
        engine = EngineId(self.group, message.number)
        self._books.engine(engine, t_ns, message.state, **told)
        if message.state != "gone":
            self._books.heard(engine, t_ns)


def chunks(told: Sequence[Told], limit: int = wire.FRAME_LIMIT // 2) -> list[list[Told]]:
    """Pieces small enough for a frame. A request that alone is not loses its joules: nobody waits for what never comes."""
    found: list[list[Told]] = []
    size = limit
    for one in told:
        shares = one.shares
        length = 20 + 4 * len(one.request)
        if shares:
            key = shares[0].key
            length += len(shares) * (_SHARE + 4 * (len(key.group) + len(key.request)))
        if size + length > limit:
            found.append([])
            size = 0
        found[-1].append(one if length <= limit else Told(one.request, one.final, []))
        size += length
    return found


def _once(devices: list[str] | None) -> list[str] | None:
    """A device that is named twice would be charged for twice."""
    return devices if devices is None or len(devices) < 2 else list(dict.fromkeys(devices))

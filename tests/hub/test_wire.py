from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from melodi_otel.attribution.meter import Decode, Joined, Key, Late, Prefill, Share
from melodi_otel.devices import Device
from melodi_otel.hub import wire
from melodi_otel.hub.session import chunks

SHARE = Share(
    Key("g", "r"), "GPU-0", 1, 2, 3.0, 2.0, 1.0, 0.5, 1.5, 0.1, "step", "measured", 1.0, 2.0, 9, None, True, 3.0
)
UNKNOWN = Share(Key("g", "r"), "cpu", 1, 2, *([None] * 6), "equal", "unavailable", 0.0, 1.0, 9, "no_samples")

TO_HUB = [
    wire.Hello(1, "0.3", "n", "g", True, "s", None, False, ["a", "b"]),
    wire.EngineTold(1, 5, "ready", "m", ["GPU-0"], 2, [17], (8e9, None, 1.5, 32, 4096, None, None)),
    wire.Opened("r", 5, 1, ["GPU-0"], "m", 12, 0, {"tenant": "a"}, "p", True, False, Late((1, 2), True)),
    wire.Bound("r", "r-0"),
    wire.Progressed("r", 5, 7, 4, 12, 0),
    wire.Stepped(
        1, 0, 9, 5, 6, None, Decode(2, 30), [Prefill("a", 3, 0)], [Prefill("b", 2, 9)], [Joined("c", 4)], ["d"]
    ),
    wire.Closed("r", 6, 8, "length", 4, 12, 0),
    wire.Forgone("r"),
    wire.Unseen(5, -1),
    wire.Observed(
        "r",
        "chat",
        "vllm",
        "m",
        1,
        2,
        None,
        3,
        4,
        "stop",
        None,
        True,
        5.0,
        "gpu",
        "measured",
        b"\1" * 16,
        b"\2" * 8,
        {},
        True,
        "a1",
        0.5,
    ),
    wire.Answered(3),
    wire.Got(2),
    wire.Between(1, "GPU-0", 5, 6),
    wire.StatusAsked(4),
    wire.Promised("a1"),
]
TO_PROGRAM = [
    wire.Welcome(1, "0.3", "h", "agent", [Device("GPU-0", "gpu")], False, 5.0, None, [wire.Told("r", False, [SHARE])], True),
    wire.Refused("version", "bring both to the same release"),
    wire.Ask(3),
    wire.Settled(1, [wire.Told("r", True, [SHARE, UNKNOWN])]),
    wire.Accrued(5, []),
    wire.BetweenAnswered(1, None),
    wire.StatusAnswered(4, "{}"),
    wire.Resumed([wire.Told("r", True, [])], True),
]  # fmt: skip


def frame(number, messages):
    """A frame of anything."""
    raw = msgspec.msgpack.encode((number, messages))
    return len(raw).to_bytes(4, "big") + raw


def raw(message):
    """A message as a list, to be changed."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message))


@pytest.mark.parametrize("message", TO_HUB, ids=lambda m: type(m).__name__)
def test_to_the_hub_and_back(message):
    """Every message of a program is read as it was written."""
    assert wire.Frames(wire.ToHub).feed(wire.encode(0, [message])) == [message]


@pytest.mark.parametrize("message", TO_PROGRAM, ids=lambda m: type(m).__name__)
def test_to_the_program_and_back(message):
    """Every message of a hub is read as it was written."""
    assert wire.Frames(wire.ToProgram).feed(wire.encode(0, [message])) == [message]


def test_every_message_is_tried():
    """The two lists above hold each kind once, and no tag stands for two."""
    assert {type(message) for message in TO_HUB} == set(wire.ToHub.__args__)
    assert {type(message) for message in TO_PROGRAM} == set(wire.ToProgram.__args__)
    tags = [kind.__struct_config__.tag for kind in (*wire.ToHub.__args__, *wire.ToProgram.__args__)]
    assert len(set(tags)) == len(tags)


text = st.text(max_size=20)
count = st.integers(0, 1 << 48)
moment = st.integers(0, (1 << 62) - 1)
size = st.none() | st.floats(0.0, 1e18)
some = st.none() | count
labels = st.dictionaries(text, text, max_size=3)
devices = st.none() | st.lists(text, max_size=3)
outcome = st.sampled_from(["stop", "length", "abort", "error"])
rows = st.lists(st.builds(Prefill, text, count, count), max_size=3)
late = st.builds(Late, st.lists(moment, max_size=3).map(tuple), st.booleans())
facts = st.tuples(size, size, size, some, some, some, some)
share = st.builds(
    lambda joules, t0, t1, coverage: Share(
        Key("g", "r"), "d", t0, t1, joules, *([None] * 4), 0.1, "equal", "partial", coverage, 1.0, t1, "late"
    ),
    st.floats(-1e9, 1e9),
    moment,
    moment,
    st.floats(0, 1),
)
told = st.builds(wire.Told, text, st.booleans(), st.lists(share, max_size=2))
ANY_TO_HUB = st.one_of(
    st.builds(
        wire.Hello,
        st.integers(0, 99), text, text, text, st.booleans(), st.none() | text, st.none() | text, st.booleans(),
        st.lists(text, max_size=3),
    ),
    st.builds(
        wire.EngineTold,
        count, moment, st.sampled_from(["loading", "ready", "gone"]), st.none() | text, devices, some,
        st.lists(count, max_size=3), facts,
    ),
    st.builds(
        wire.Opened,
        text, moment, some, devices, st.none() | text, some, some, labels, st.none() | text, st.booleans(), st.booleans(),
        st.none() | late, st.sampled_from([None, "phase_elsewhere"]),
    ),
    st.builds(wire.Bound, text, text),
    st.builds(wire.Progressed, text, moment, count, st.none() | moment, some, some),
    st.builds(
        wire.Stepped,
        count, count, count, moment, moment, devices, st.builds(Decode, count, count), rows, rows,
        st.lists(st.builds(Joined, text, count), max_size=3), st.lists(text, max_size=3),
    ),
    st.builds(wire.Closed, text, moment, some, outcome, st.none() | moment, some, some),
    st.builds(wire.Forgone, text),
    st.builds(wire.Unseen, moment, st.integers(-1000, 1000)),
    st.builds(
        wire.Observed,
        text, *([st.none() | text] * 3), moment, moment, st.none() | moment, some, some, outcome, st.none() | text,
        st.booleans(), st.none() | st.floats(-1e15, 1e15), st.none() | text, st.just("measured"), st.binary(max_size=16),
        st.binary(max_size=16), labels, st.booleans(), st.none() | text, st.none() | st.floats(0, 1e15),
    ),
    st.builds(wire.Answered, st.integers(0, 1 << 62)),
    st.builds(wire.Got, st.integers(0, 1 << 62)),
    st.builds(wire.Between, count, text, moment, moment),
    st.builds(wire.StatusAsked, count),
    st.builds(wire.Promised, text),
)  # fmt: skip
ANY_TO_PROGRAM = st.one_of(
    st.builds(wire.Ask, st.integers(0, 1 << 62)),
    st.builds(wire.Settled, st.integers(0, 1 << 62), st.lists(told, max_size=3)),
    st.builds(wire.Accrued, moment, st.lists(told, max_size=3)),
    st.builds(wire.Resumed, st.lists(told, max_size=3), st.booleans()),
    st.builds(wire.Refused, text, text),
    st.builds(wire.BetweenAnswered, count, st.none() | st.floats(0, 1e9)),
    st.builds(wire.StatusAnswered, count, text),
)


@given(st.lists(st.lists(ANY_TO_HUB, max_size=4), max_size=4), st.data())
def test_any_messages_in_any_pieces(batches, data):
    """Whatever a program says arrives whole and in order, however the bytes are cut on their way."""
    sent = b"".join(wire.encode(number, batch) for number, batch in enumerate(batches))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=5)))
    frames = wire.Frames(wire.ToHub)
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        found += frames.feed(sent[start:stop])
    assert found == [message for batch in batches for message in batch]


@given(st.lists(ANY_TO_PROGRAM, max_size=5))
def test_any_answers(messages):
    """Whatever a hub says arrives as it was said, joules to the last digit."""
    assert wire.Frames(wire.ToProgram).feed(wire.encode(0, messages)) == messages


@given(st.binary(max_size=200))
def test_noise(data):
    """Bytes that are no frame end in `WireError` or wait for more, and in nothing else."""
    frames = wire.Frames(wire.ToHub)
    try:
        assert frames.feed(data) == [] or data[3] > 0
    except wire.WireError as error:
        assert str(error)


# --- frames ---


def test_a_frame_of_the_largest_size():
    """1 MiB is a frame, and one byte more is none, neither to be written nor to be read."""
    about = len(wire.encode(0, [wire.StatusAnswered(1, "x" * 70_000)])) - 4 - 70_000
    length = wire.FRAME_LIMIT - about
    (answer,) = wire.Frames(wire.ToProgram).feed(wire.encode(0, [wire.StatusAnswered(1, "x" * length)]))
    assert len(answer.text) == length
    with pytest.raises(
        wire.WireError, match=f"a frame of {wire.FRAME_LIMIT + 1} bytes is larger than {wire.FRAME_LIMIT}"
    ):
        wire.encode(0, [wire.StatusAnswered(1, "x" * (length + 1))])
    with pytest.raises(wire.WireError, match=f"a frame of {wire.FRAME_LIMIT + 1} bytes is announced"):
        wire.Frames(wire.ToProgram).feed((wire.FRAME_LIMIT + 1).to_bytes(4, "big"))


def test_what_does_not_fit_is_split_and_numbered():
    """2.5 MB of messages are frames 7, 8, … without a gap and in order, none of them too large."""
    messages = [wire.StatusAnswered(number, "x" * 100_000) for number in range(25)]
    made = list(wire.encode_all(7, messages))
    assert len(made) > 2
    assert max(map(len, made)) <= wire.FRAME_LIMIT + 4
    found = []
    for number, one in enumerate(made, 7):
        frames = wire.Frames(wire.ToProgram)
        frames._next = number
        found += frames.feed(one)
    assert found == messages


def test_one_that_fits_no_frame_takes_nothing_with_it():
    """A message larger than a frame is left out, its neighbours arrive, and the numbers have no gap."""
    messages = [wire.Ask(1), wire.StatusAnswered(1, "x" * (wire.FRAME_LIMIT + 1)), wire.Ask(2)]
    frames = wire.Frames(wire.ToProgram)
    assert [found for one in wire.encode_all(0, messages) for found in frames.feed(one)] == [wire.Ask(1), wire.Ask(2)]
    assert list(wire.encode_all(0, [])) == []


@pytest.mark.parametrize("number", [1, -1, 1 << 40])
def test_frames_are_numbered(number):
    """The first frame is number 0: another one says that something is missing or repeated."""
    with pytest.raises(wire.WireError, match=f"frame {number} came where 0 was due"):
        wire.Frames(wire.ToHub).feed(frame(number, []))


def test_a_repeated_frame():
    """A frame that comes twice is refused the second time."""
    frames = wire.Frames(wire.ToHub)
    assert frames.feed(frame(0, [])) == []
    with pytest.raises(wire.WireError, match="frame 0 came where 1 was due"):
        frames.feed(frame(0, []))


def test_half_a_frame_waits():
    """A frame that has not ended yet gives nothing, and all of it with its last byte."""
    whole = wire.encode(0, [wire.Got(5)])
    frames = wire.Frames(wire.ToHub)
    for at in range(len(whole) - 1):
        assert frames.feed(whole[at : at + 1]) == []
    assert frames.feed(whole[-1:]) == [wire.Got(5)]


# --- messages ---


def test_items_of_a_newer_release_are_ignored():
    """A message with more at its end, whatever it is, is read as far as it is known."""
    message = [*raw(wire.Got(5)), {"new": [1, None]}, math.nan]
    assert wire.Frames(wire.ToHub).feed(frame(0, [message])) == [wire.Got(5)]


def test_items_at_the_end_may_be_missing_where_they_have_defaults():
    """Progress without the prompt's counts is progress."""
    assert wire.Frames(wire.ToHub).feed(frame(0, [[5, "r", 1, 2]])) == [wire.Progressed("r", 1, 2)]


def changed(message, **items):
    """A message with some of its items replaced, the wrong ones included."""
    names = ["tag", *type(message).__struct_fields__]
    made = raw(message)
    for name, value in items.items():
        made[names.index(name)] = value
    return made


OPENED, STEPPED, ENGINE = TO_HUB[2], TO_HUB[5], TO_HUB[1]


@pytest.mark.parametrize(
    "message",
    [
        [99, 1],
        [],
        "x",
        None,
        {"tag": 1},
        [33, 1],
        changed(OPENED, t_ns=-1),
        changed(OPENED, t_ns=1 << 62),
        changed(OPENED, t_ns=1.5),
        changed(OPENED, t_ns="1"),
        changed(OPENED, request="x" * 1025),
        changed(OPENED, request=None),
        changed(OPENED, prompt_tokens=-1),
        changed(OPENED, prompt_tokens=(1 << 48) + 1),
        changed(OPENED, prompt_tokens=True),
        changed(OPENED, devices=["d"] * 257),
        changed(OPENED, labels={"a": 1}),
        changed(OPENED, labels={str(n): "" for n in range(257)}),
        changed(OPENED, late=[[-1], True]),
        changed(OPENED, late=[[0] * 10_001, True]),
        changed(STEPPED, decode=[-1, 0]),
        changed(STEPPED, decode=[1, 1 << 63]),
        changed(STEPPED, prefill=[["a", -3, 0]]),
        changed(STEPPED, computed=[["a", 3, -1]]),
        changed(STEPPED, joined=[["x" * 1025, 0]]),
        changed(STEPPED, joined=[["x", 0]] * 10_001),
        changed(STEPPED, left=[1]),
        changed(STEPPED, lane=-1),
        changed(ENGINE, facts=[math.nan, *[None] * 6]),
        changed(ENGINE, facts=[math.inf, *[None] * 6]),
        changed(ENGINE, facts=[-1.0, *[None] * 6]),
        changed(ENGINE, facts=[None] * 6),
        changed(ENGINE, state="asleep"),
        changed(TO_HUB[6], outcome="lost"),
        changed(TO_HUB[8], change=1 << 20),
        changed(TO_HUB[9], total=math.nan),
        changed(TO_HUB[9], total=-math.inf),
        changed(TO_HUB[9], trace=b"x" * 17),
    ],
    ids=lambda message: str(message)[:40],
)
def test_what_is_no_message(message):
    """An unknown tag, a wrong type, a number that no counter shows or that would spoil sums: the frame is refused."""
    with pytest.raises(wire.WireError, match="a frame cannot be read"):
        wire.Frames(wire.ToHub).feed(frame(0, [message]))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 100_000,
        b"\x92\x00\x91" + b"\x91" * 50_000,
        b"\x92\x00\x91\x94\x0c\x01" + b"\x91" * 50_000 + b"\xc0",
        b"\x81\xa1a" * 50_000,
        b"\x92\x00\xdd\xff\xff\xff\xff",
        b"\x92\x00\x91\xdd\xff\xff\xff\xff\x0c",
        b"\x92\x00\x91\x92\x08\xdb\xff\xff\xff\xff",
        b"\x92\x00\x91\x92\x08\xa2\xff\xfe",
        b"\xc1",
        b"",
        b"\x92\x00\x90\x00",
    ],
    ids=[
        "arrays",
        "in it",
        "behind it",
        "maps",
        "many",
        "long",
        "text",
        "no text",
        "never used",
        "nothing",
        "too much",
    ],
)
def test_what_is_no_frame(payload):
    """Deep nesting, lengths that lie, text that is none, nothing at all, too much: `WireError`, and at once."""
    with pytest.raises(wire.WireError, match="a frame cannot be read"):
        wire.Frames(wire.ToHub).feed(len(payload).to_bytes(4, "big") + payload)


@pytest.mark.parametrize("version", [0, 2, 7])
def test_a_greeting_in_another_version_is_known_as_one(version):
    """Whatever stands behind its version: the error says which version that is."""
    with pytest.raises(wire.WireError) as caught:
        wire.Frames(wire.ToHub).feed(frame(0, [[1, version, {"all": "new"}]]))
    assert caught.value.version == version


@pytest.mark.parametrize("message", [[1, wire.VERSION, 5], [1, "2"], [1], [2, 5], [5]])
def test_what_is_no_greeting_in_another_version(message):
    """Our own version, no number or another message: then it is just wrong."""
    with pytest.raises(wire.WireError) as caught:
        wire.Frames(wire.ToHub).feed(frame(0, [message]))
    assert caught.value.version is None


# --- batches of joules ---


def test_batches_of_joules_fit_their_frames():
    """2,000 requests with eight shares each, under long names, are batches of which every one is a frame."""
    shares = [msgspec.msgpack.decode(msgspec.msgpack.encode(SHARE), type=Share)] * 8
    told = [wire.Told(f"{number}-{'é' * 300}", True, shares) for number in range(2000)]
    batches = chunks(told)
    assert [one for batch in batches for one in batch] == told
    assert len(batches) > 1
    assert all(len(wire.encode(0, [wire.Settled(1, batch)])) <= wire.FRAME_LIMIT for batch in batches)


def test_a_request_that_fits_no_frame_is_told_without_joules():
    """More shares than a frame holds: its neighbours have theirs, and nobody waits for ever."""
    few = wire.Told("s", True, [SHARE])
    found = [one for batch in chunks([few, wire.Told("r", True, [SHARE] * 5000), few]) for one in batch]
    assert found == [few, wire.Told("r", True, []), few]

from __future__ import annotations

import os
import socket
import stat

import pytest

from melodi_otel.errors import HubBusy, HubError
from melodi_otel.hub import sockets
from melodi_otel.hub.refusals import Peer
from melodi_otel.hub.sockets import LONGEST, ConnectRefused, attempt, connect, listen, peer

NOBODY = 65534
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to be somebody else")
pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")

HUB = """
import fcntl, grp, os, pwd, sys  # all of it now: afterwards the interpreter's own files may be closed
from melodi_otel.hub.sockets import listen
if len(sys.argv) > 2:
    os.setresuid(*[int(sys.argv[2])] * 3)
listener = listen(sys.argv[1], mode=0o666)
print("there", flush=True)
sys.stdin.readline()
listener.close()
"""

CLIENT = """
import grp, os, pwd, sys
from melodi_otel.hub.sockets import attempt
os.setgroups([]); os.setresgid(*[int(sys.argv[3])] * 3); os.setresuid(*[int(sys.argv[2])] * 3)
answer = attempt(sys.argv[1])
print(answer.state, "|", answer.reason, "|", answer.fix)
"""

SECOND = """
import sys
from melodi_otel.hub.sockets import listen
try:
    listen(sys.argv[1])
except Exception as error:
    print(error.pid)
"""


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def hub(program, *words):
    process = program(HUB, *words, wait=False)
    assert process.stdout.readline() == "there\n"
    return process


@pytest.mark.parametrize("umask", [0, 0o077])
@pytest.mark.parametrize(("wanted", "directory"), [(0o600, 0o700), (0o660, 0o755), (0o666, 0o755)])
def test_modes_are_exact(place, umask, wanted, directory):
    """Socket, lock and new directory have their modes, whatever the umask; the umask is as before."""
    before = os.umask(umask)
    try:
        with listen(place / "new" / "s", mode=wanted):
            assert (mode(place / "new" / "s"), mode(place / "new" / "s.lock")) == (wanted, 0o600)
            assert mode(place / "new") == directory
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_a_program_talks_to_the_hub(place):
    """What is connected is the listener, and each end knows who the other is."""
    with listen(place / "s") as listener, connect(place / "s", 5) as client:
        served, _ = listener.accept()
        with served:
            served.sendall(b"joules")
            assert client.recv(6) == b"joules"
            assert peer(served) == peer(client) == Peer(os.getpid(), os.getuid(), os.getgid())


@as_root
def test_nobody_may_connect_before_it_is_theirs(place, monkeypatch):
    """When the socket begins to listen it has its mode and group; until then it refuses everybody."""
    seen = []

    def listening(self, backlog):
        found = (place / "s").lstat()
        seen.append((stat.S_IMODE(found.st_mode), found.st_gid, attempt(place / "s").state))
        socket.socket.listen(self, backlog)

    monkeypatch.setattr(sockets.Listener, "listen", listening)
    with listen(place / "s", mode=0o620, group=NOBODY):
        assert attempt(place / "s").state == "ok"
    assert seen == [(0o620, NOBODY, "stale")]
    assert os.getegid() == 0


@as_root
def test_the_group_is_there_from_birth(place, monkeypatch):
    """Root needs no chown by path, where something else could lie by then."""
    monkeypatch.setattr(os, "chown", lambda *_, **__: pytest.fail("chown by path"))
    with listen(place / "s", group=NOBODY):
        assert (place / "s").lstat().st_gid == NOBODY


def test_an_unknown_group(place):
    """The group is named, with the command that makes it; nothing is left."""
    with pytest.raises(HubError, match=r"no group 'no-such-group'.*groupadd --system no-such-group"):
        listen(place / "s", group="no-such-group")
    assert list(place.iterdir()) == []


def test_two_hubs_never_fight(place, program):
    """The second hub is told the first one's pid, and the first one's socket stays."""
    first = hub(program, place / "s")
    with pytest.raises(
        HubBusy, match=f"process {first.pid} is the hub there; to repair: stop it first: kill {first.pid}"
    ) as caught:
        listen(place / "s")
    assert caught.value.pid == first.pid
    assert attempt(place / "s").state == "ok"


def test_two_hubs_in_one_process(place):
    """The lock belongs to the process, so a second hub in it is refused too, and does not undo the first one's lock."""
    with listen(place / "s"):
        with pytest.raises(HubBusy) as caught:
            listen(place / "s")
        assert caught.value.pid == os.getpid()
        assert attempt(place / "s").state == "ok"


def test_a_refused_second_hub_leaves_the_lock(place, program):
    """After a try in its own process the first hub still keeps others away."""
    with listen(place / "s"):
        with pytest.raises(HubBusy):
            listen(place / "s")
        assert program(SECOND, place / "s") == f"{os.getpid()}\n"


def test_a_killed_hub_leaves_no_obstacle(place, program):
    """After kill -9 the socket is stale, and the next hub takes its place."""
    first = hub(program, place / "s")
    first.kill()
    first.wait()
    answer = attempt(place / "s")
    assert (answer.state, answer.fix) == ("stale", "start it again; it takes the old one away")
    with listen(place / "s"):
        assert attempt(place / "s").state == "ok"


def test_a_clean_end_leaves_no_socket(place):
    """close() takes the socket away, may be called twice, and lets the next hub in."""
    listener = listen(place / "s")
    listener.close()
    listener.close()
    assert not (place / "s").exists()
    listen(place / "s").close()


def test_only_its_own_socket_is_taken_away(place):
    """What came into its place meanwhile stays."""
    listener = listen(place / "s")
    (place / "s").unlink()
    (place / "s").write_text("another's")
    listener.close()
    assert (place / "s").read_text() == "another's"


def test_a_fork_takes_nothing_away(place, program):
    """A child that closes its copy leaves socket and lock to its parent."""
    code = """
import os, sys
from melodi_otel.hub.sockets import attempt, listen
listener = listen(sys.argv[1])
if os.fork() == 0:
    listener.close()
    os._exit(0)
os.wait()
print(attempt(sys.argv[1]).state)
"""
    assert program(code, place / "s") == "ok\n"


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_socket_stays(place, kind):
    """A file, a directory and a link are refused by name and left alone."""
    path = place / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(place / "elsewhere")
    before = path.lstat()
    with pytest.raises(HubError, match=f"{path} is there and is no socket; to repair: move it away"):
        listen(path)
    assert path.lstat() == before


@as_root
def test_a_socket_of_another_user_stays(place):
    """Its owner is named, and the command that takes it away."""
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(place / "s"))
    dead.close()
    os.chown(place / "s", NOBODY, -1)
    with pytest.raises(HubError, match=f"the socket {place}/s belongs to user nobody; .*: rm {place}/s") as caught:
        listen(place / "s")
    assert caught.value.state == "foreign_owner"
    assert (place / "s").exists()


def test_a_directory_that_others_may_write_to(place):
    """It is refused with the command that closes it; with the sticky bit, as /tmp has it, it is good."""
    place.chmod(0o777)
    with pytest.raises(HubError, match=rf"may be written to by others \(mode 0777\); to repair: chmod go-w {place}"):
        listen(place / "s")
    place.chmod(0o1777)
    listen(place / "s").close()


@as_root
def test_a_directory_of_another_user(place):
    """Its owner could take the socket's place, so it is refused, unless that is who the process is going to become."""
    os.chown(place, NOBODY, -1)
    with pytest.raises(HubError, match=f"{place} belongs to user nobody, who could take the socket's place"):
        listen(place / "s")
    listen(place / "s", owner=NOBODY).close()


@as_root
def test_a_new_directory_goes_to_whom_the_hub_becomes(place):
    """New and empty directories are given to that user; one with something in it is not."""
    (place / "empty").mkdir()
    (place / "full").mkdir()
    (place / "full" / "x").touch()
    for name in ("new", "empty", "full"):
        listen(place / name / "s", owner=NOBODY).close()
    assert [(place / name).stat().st_uid for name in ("new", "empty", "full")] == [NOBODY, NOBODY, 0]


def test_a_name_that_is_too_long(place):
    """The longest name works; one byte more is refused with both numbers."""
    longest = place / ("x" * (LONGEST - len(os.fsencode(place)) - 1))
    listen(longest).close()
    with pytest.raises(HubError, match=f"has {LONGEST + 1} bytes, and the system takes at most {LONGEST}"):
        listen(f"{longest}x")


def test_a_relative_name():
    """It would depend on where somebody stands."""
    with pytest.raises(HubError, match=r"'hub\.sock' is not absolute"):
        listen("hub.sock")


def test_a_lock_file_that_is_a_link(place):
    """It is not followed: what it leads to stays as it is."""
    (place / "precious").write_text("1")
    (place / "s.lock").symlink_to(place / "precious")
    with pytest.raises(HubError, match=f"{place}/s.lock cannot be opened: it is a link; to repair: rm {place}/s.lock"):
        listen(place / "s")
    assert (place / "precious").read_text() == "1"


def test_a_lock_file_with_a_second_name(place):
    """A hard link to somebody's file is not written into."""
    (place / "precious").write_text("1")
    os.link(place / "precious", place / "s.lock")
    with pytest.raises(HubError, match="is not one of ours"):
        listen(place / "s")
    assert (place / "precious").read_text() == "1"


def test_no_socket(place):
    """Absent, and there is nothing to repair."""
    assert (attempt(place / "s").state, attempt(place / "s").fix) == ("absent", "")
    assert attempt(place / "none" / "s").state == "absent"
    assert attempt(place / ("x" * 200)).state == "absent"


def test_a_file_in_its_place(place):
    """It is said to be no socket."""
    (place / "s").touch()
    assert (attempt(place / "s").state, attempt(place / "s").reason) == (
        "stale",
        f"{place}/s is there and is no socket",
    )


def test_a_full_queue_is_waited_for(place):
    """A hub that accepts nobody is no answer after the timeout, not for ever."""
    with listen(place / "s", backlog=0), connect(place / "s", 0.05):
        answer = attempt(place / "s", 0.05)
    assert (answer.state, answer.peer) == ("no_answer", None)


JOIN = "sudo usermod -aG mail nobody, then log in again"
ASK = "start the agent with --socket-group GROUP and join that group"


@as_root
@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((0o660, 8), f"only root and members of the group mail may connect to {{s}} | {JOIN}"),
        ((0o600, 8), f"only user root may connect to {{s}} | {ASK}"),
        ((0o660, 0), f"only user root may connect to {{s}} | {ASK}"),
    ],
)
def test_whom_the_socket_keeps_out(place, program, wanted, words):
    """The refusal names the group and the exact command that lets the user in, where a group would."""
    with listen(place / "s", mode=wanted[0], group=wanted[1]):
        told = program(CLIENT, place / "s", NOBODY, NOBODY)
        assert told == f"permission_denied | {words.format(s=place / 's')}\n"
        if wanted == (0o660, 8):
            assert program(CLIENT, place / "s", NOBODY, 8).startswith("ok")


@as_root
def test_a_member_since_this_session_began(place, monkeypatch):
    """Who is in the group already has to log in again only."""
    import grp

    with listen(place / "s", group=8):
        monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group(("mail", "x", gid, ["root"])))
        from melodi_otel.hub import refusals

        answer = refusals.explain(place / "s", PermissionError(13, "Permission denied"))
    assert answer.fix == "log in again"
    assert "root has joined it since this session began" in answer.reason


@as_root
def test_a_closed_directory(place, program):
    """The directory that keeps the user out is named."""
    (place / "in").mkdir(mode=0o700)
    with listen(place / "in" / "s"):
        told = program(CLIENT, place / "in" / "s", NOBODY, NOBODY)
    assert told.startswith(f"permission_denied | the directory {place}/in of user root may not be entered")


@as_root
def test_a_stranger_is_not_talked_to(place, program):
    """Whoever listens there and is neither root nor ourselves is refused, with his name and pid; root is good for everybody."""
    place.chmod(0o1777)
    process = hub(program, place / "s", NOBODY)
    answer = attempt(place / "s")
    assert answer.state == "foreign_owner"
    assert answer.reason.startswith(f"user nobody listens on {place}/s: it is not asked")
    assert (answer.peer.pid, answer.peer.uid) == (process.pid, NOBODY)
    with pytest.raises(ConnectRefused, match="user nobody listens"):
        connect(place / "s", 1)
    with listen(place / "r", mode=0o666):
        assert program(CLIENT, place / "r", NOBODY - 1, NOBODY - 1).startswith("ok")


@as_root
@pytest.mark.parametrize(
    ("owner", "above", "state"),
    [(NOBODY, 0o755, "ok"), (0, 0o755, "foreign_owner"), (NOBODY, 0o777, "foreign_owner")],
)
def test_the_user_that_root_gave_the_directory_to(place, program, owner, above, state):
    """A service's user is trusted in a directory that only root can have made and given to him."""
    (place / "run" / "melodi-otel").mkdir(parents=True)
    os.chown(place / "run" / "melodi-otel", NOBODY, -1)
    hub(program, place / "run" / "melodi-otel" / "s", NOBODY)
    os.chown(place / "run" / "melodi-otel", owner, -1)
    (place / "run").chmod(above)
    assert attempt(place / "run" / "melodi-otel" / "s", system=place / "run").state == state
    assert attempt(place / "run" / "melodi-otel" / "s").state == "foreign_owner"


REFUSED = """
import os, sys
from melodi_otel.errors import HubError
from melodi_otel.hub.sockets import listen
if os.geteuid() == 0:  # root may write anywhere
    os.setgroups([])
    os.setuid(int(sys.argv[1]))
try:
    listen("/run/melodi-otel-test/s")
except HubError as error:
    print(error)
"""


def test_where_it_may_not_be_made(program):
    """A user who may not write there is told so, and what to do."""
    assert "start it as root, or name a socket elsewhere" in program(REFUSED, NOBODY)

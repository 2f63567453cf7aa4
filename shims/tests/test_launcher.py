"""The launcher: what it forks is as a new process would be, ends as one, and nothing that a fork does not survive goes unnamed."""

import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import threading

import pytest

from kvstore import Invalid
from kvstore.launcher import caps, fitness, wire

from launchers import PATIENCE_S, Launcher, is_alive, until


@pytest.fixture(scope="module")
def shared():
    # A variable without a value is one, too: make sets such ones.
    launcher = Launcher("json,random", "--workers", "4", environment={"KVSTORE_TEST_EMPTY": ""}).wait_ready()
    yield launcher
    launcher.close()


@pytest.fixture
def launcher():
    launcher = Launcher("json").wait_ready()
    yield launcher
    launcher.close()


# Says its number, and waits.
WAITS = """
import os, signal, sys, time
for number in map(int, sys.argv[1:]):
    signal.signal(number, lambda number, _: print("got", number, flush=True))
print(os.getpid(), flush=True)
while True:
    time.sleep(0.05)
"""

SELF = """
import atexit, json, os, signal, sys, tempfile
told = dict(
    arguments=sys.argv, name=__name__, file=globals().get("__file__"), path=sys.path, folder=os.getcwd(), given=sys.stdin.read(),
    environment={k: v for k, v in os.environ.items() if k not in ("_", "LC_CTYPE")},
    umask=os.umask(0o22), blocked=[int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    handlers={n: str(signal.getsignal(n)) for n in sorted(map(int, signal.valid_signals())) if n not in (9, 19)},
    open=len([n for n in os.listdir("/proc/self/fd") if int(n) > 2]), main=sys.modules["__main__"].__dict__ is globals(),
    spec=getattr(__spec__, "name", None), buffered=sys.stdout.line_buffering, tmp=tempfile.gettempdir(),
)
atexit.register(print, "the end")
print(json.dumps(told))
sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["script", "module", "command", "folder"])
def test_a_worker_is_what_python_would_have_started(shared, tmp_path, kind):
    (tmp_path / "told.py").write_text(SELF)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text(SELF)
    words = {"script": ["told.py"], "module": ["-m", "told"], "command": ["-c", SELF], "folder": ["package"]}[kind]
    words += ["one", "--two", "-m", "ü"]
    environment = {**shared.environment, "NEW": "1\n2", "TMPDIR": str(tmp_path)}
    environment.pop("HOME", None)
    more = dict(input="given", capture_output=True, text=True, cwd=tmp_path, env=environment, umask=0o27, timeout=PATIENCE_S)
    cold = subprocess.run([sys.executable, *words], **more)
    warm = subprocess.run(shared.command(*words), **more)
    assert (warm.returncode, warm.stderr) == (cold.returncode, cold.stderr) == (7, "")
    told = [json.loads(one.stdout.splitlines()[0]) for one in (cold, warm)]
    assert told[0] == told[1]
    assert warm.stdout.splitlines()[1:] == ["the end"]


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("raise ValueError('what')", 1, 'File "<string>", line 1, in <module>\nValueError: what'),
        ("1 +", 1, "SyntaxError"),
        ("import sys; sys.exit('no')", 1, "no"),
        ("import os; os._exit(3)", 3, ""),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        ("import os; os.kill(os.getpid(), 11)", -11, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -2, "KeyboardInterrupt"),
    ],
)
def test_the_client_ends_as_its_worker_ends(shared, program, status, said):
    done = shared.run("-c", program)
    assert done.returncode == status, done.stderr
    assert said in done.stderr and "launcher" not in done.stderr


def test_a_traceback_begins_with_the_program(shared):
    lines = shared.run("-c", "raise ValueError('what')").stderr.splitlines()
    assert lines[1] == '  File "<string>", line 1, in <module>', lines


def test_what_is_not_there(shared, tmp_path):
    done = shared.run(tmp_path / "nothing.py")
    assert done.returncode == 2 and "can't open file" in done.stderr
    assert "No module named nothing" in shared.run("-m", "nothing").stderr
    gone = tmp_path / "gone"
    gone.mkdir()
    # The folder goes between the request and the worker's start.
    program = "import os; print(os.getcwd())"
    assert shared.run("-c", program, cwd=gone).stdout == f"{gone}\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signals_are_passed_on(shared, number):
    client = shared.start("-c", WAITS, str(int(number)))
    worker = int(client.stdout.readline())
    for _ in range(2):
        client.send_signal(number)
        assert client.stdout.readline() == f"got {int(number)}\n"
    os.kill(worker, signal.SIGKILL)
    assert client.wait(PATIENCE_S) == -signal.SIGKILL


def test_a_signal_that_ends_the_worker_ends_the_client(shared):
    client = shared.start("-c", WAITS)
    worker = int(client.stdout.readline())
    client.terminate()
    assert client.wait(PATIENCE_S) == -signal.SIGTERM
    until(lambda: not is_alive(worker), "the worker's end")


def test_a_worker_does_not_outlive_its_client(shared):
    client = shared.start("-c", WAITS)
    worker = int(client.stdout.readline())
    client.kill()
    until(lambda: not is_alive(worker), "the worker's end")


def test_one_that_ignores_its_clients_end_is_killed(shared):
    client = shared.start("-c", WAITS, str(int(signal.SIGHUP)))
    worker = int(client.stdout.readline())
    client.kill()
    assert client.stdout.readline() == f"got {int(signal.SIGHUP)}\n"
    until(lambda: not is_alive(worker), "the worker's end")
    assert shared.run("-c", "print(1)").stdout == "1\n"


def test_no_more_workers_than_allowed(shared):
    clients = [shared.start("-c", WAITS) for _ in range(4)]
    for client in clients:
        client.stdout.readline()
    done = shared.run("-c", "print(1)")
    assert done.returncode == 125 and "4 workers run" in done.stderr
    done = shared.run("-c", "print(1)", options=("--else-cold",))
    assert (done.returncode, done.stdout) == (0, "1\n") and "4 workers run" in done.stderr
    for client in clients:
        client.kill()
    until(lambda: shared.run("-c", "print(1)").stdout == "1\n", "room for another one")


def test_random_numbers_differ(shared):
    program = "import random, os; print(random.random(), os.urandom(8))"
    assert shared.run("-c", program).stdout != shared.run("-c", program).stdout


@pytest.mark.parametrize("who", ["serve", "template"])
def test_workers_end_with_the_launcher(launcher, who):
    client = launcher.start("-c", WAITS)
    worker = int(client.stdout.readline())
    os.kill(launcher.process.pid if who == "serve" else launcher.template(), signal.SIGKILL)
    until(lambda: not is_alive(worker), "the worker's end")
    _, said = client.communicate(timeout=PATIENCE_S)
    # The template may say how the worker ended before it ends itself.
    assert client.returncode in (125, -signal.SIGTERM) and (client.returncode < 0 or f"its worker {worker}" in said)
    if who == "template":
        launcher.wait_ready(times=2)
        assert launcher.run("-c", "print(1)").stdout == "1\n"


def test_a_clean_end_ends_the_workers(launcher):
    client = launcher.start("-c", WAITS)
    client.stdout.readline()
    launcher.process.terminate()
    assert launcher.process.wait(PATIENCE_S) == 0
    assert client.wait(PATIENCE_S) == -signal.SIGTERM
    assert not os.path.exists(launcher.socket)
    done = launcher.run("-c", "print(1)")
    assert done.returncode == 125 and "no launcher answers" in done.stderr
    assert launcher.run("-c", "print(1)", options=("--else-cold",)).stdout == "1\n"


def test_one_that_was_killed_is_followed_by_another(launcher):
    launcher.process.kill()
    launcher.process.wait(PATIENCE_S)
    command = [sys.executable, "-m", "kvstore.launcher", "serve", "--socket", launcher.socket, "--import", "json"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as second:
        try:
            assert "ready" in second.stderr.readline()
            assert launcher.run("-c", "print(1)").stdout == "1\n"
            third = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S)
            assert third.returncode == 1 and "another launcher serves" in third.stderr
        finally:
            second.terminate()


@pytest.mark.parametrize(
    "sent",
    [
        b"\xff" * 100,
        struct.pack("<I", caps.MESSAGE_BYTES_MAX + 1),
        struct.pack("<I", 2) + b"{]",
        struct.pack("<I", 2) + b"[]",
        struct.pack("<I", 100_000) + b"[" * 100_000,
        struct.pack("<I", 2) + b"{}",
        wire.encoded({"format": 1}),
        b"\x01",
    ],
)
def test_garbage_is_refused_and_harms_nobody(shared, sent):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(shared.socket)
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while some := connection.recv(4096):
            answer += some
    assert b"error" in answer or sent == b"\x01"
    assert shared.run("-c", "print(1)").stdout == "1\n"


def asked(**other) -> dict:
    message = wire.Request("command", "print(1)", [], dict(os.environ), "/", 0o22, sys.prefix, [], []).message()
    return {**message, **other}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (dict(format=2), "format is 2"),
        (dict(kind="program"), "kind is not valid"),
        (dict(umask=-1), "umask is not valid"),
        (dict(arguments=["a\0b"]), "arguments is not valid"),
        (dict(environment={"A=B": "1"}), "environment is not valid"),
        (dict(environment=[]), "environment is not valid"),
        (dict(ignored=[9]), "ignored is not valid"),
        (dict(odd=1), "odd"),
        (dict(prefix="/elsewhere"), "the Python of /elsewhere"),
        (dict(), "3 descriptors"),
    ],
)
def test_a_wrong_request_is_refused_by_name(shared, other, said):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        connection.connect(shared.socket)
        connection.sendall(wire.encoded(asked(**other)))
        answer = connection.recv(1 << 16)
    assert said in json.loads(answer[4:])["error"]


def test_descriptors_too_many_are_refused_and_closed():
    ours, theirs = socket.socketpair()
    stream = wire.Stream(theirs)
    socket.send_fds(ours, [wire.encoded({})], [0, 1])
    socket.send_fds(ours, [wire.encoded({})], [0, 1])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Invalid, match="more than 3"):
        for _ in range(2):
            stream.read()
    stream.close()
    ours.close()
    # Two sockets were open before.
    assert len(os.listdir("/proc/self/fd")) == before - 2


@pytest.mark.parametrize("first", [b"", wire.encoded({})])
@pytest.mark.parametrize("then", [wire.encoded({"fill": "x" * length}) for length in (1_000, 100_000)])
def test_a_peer_that_sends_for_ever_is_not_kept(first, then):
    """The length of the first message alone was looked at: behind a short one, all that came was kept."""

    class Peer:
        """Has 64 MB, and never makes a reader wait."""

        def __init__(self):
            self.left = memoryview(first + then * ((64 << 20) // len(then)))

        def setblocking(self, _) -> None:
            pass

        def recvmsg(self, length, *_):
            some, self.left = bytes(self.left[:length]), self.left[length:]
            return some, [], 0, None

    stream = wire.Stream(Peer())
    most = len(then) + wire._READ_BYTES
    while (messages := stream.read()) is not None:
        assert len(messages) <= most and len(stream._came) <= most


def test_a_client_that_says_nothing_is_sent_away(monkeypatch):
    from kvstore.launcher import template

    monkeypatch.setattr(caps, "REQUEST_SECONDS", 0.0)
    ours, theirs = socket.socketpair()
    parent, other = socket.socketpair()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)}
    try:
        one = template.Template(socket.socket(socket.AF_UNIX), parent, {}, 1)
        one._clients.append(template._Client(theirs))
        one._pass_time()
        assert not one._clients
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert b"no request came" in ours.recv(4096)
    other.close()


def test_other_users_are_refused(monkeypatch):
    from kvstore.launcher import template

    ours, theirs = socket.socketpair()
    template.check_user(ours)
    monkeypatch.setattr(wire, "peer", lambda _: os.getuid() + 1)
    with pytest.raises(Invalid, match=f"not user {os.getuid() + 1}"):
        template.check_user(ours)
    theirs.close()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_other_users_are_refused_by_the_kernels_word(launcher):
    folder = pathlib.Path(launcher.socket).parent
    folder.chmod(0o755)
    os.chmod(launcher.socket, 0o777)
    pid = os.fork()
    if not pid:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(launcher.socket)
            os._exit(0 if b"not user 65534" in connection.recv(4096) else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_folder_that_others_may_enter_is_refused(tmp_path):
    tmp_path.chmod(0o755)
    with pytest.raises(Invalid, match="chmod 700"):
        wire.checked_folder(f"{tmp_path}/s")
    with pytest.raises(Invalid, match="107 bytes"):
        wire.checked_folder(f"/tmp/{'x' * 107}")


def test_each_folder_that_is_made_is_checked(tmp_path, monkeypatch):
    """Above the socket's folder, what another user made in /tmp was taken, and could be exchanged."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("KVSTORE_LAUNCHER", raising=False)
    own = tmp_path / "kvstore"
    path = wire.default_path()
    previous = os.umask(0)
    try:
        assert wire.checked_folder(path) == own / "launcher"
    finally:
        os.umask(previous)
    assert [one.stat().st_mode & 0o777 for one in (own, own / "launcher")] == [0o700, 0o700]
    own.chmod(0o711)
    with pytest.raises(Invalid, match=f"{own} is open to others"):
        wire.checked_folder(path)
    own.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: own.stat().st_uid + 1)
    with pytest.raises(Invalid, match=f"{own} belongs to user"):
        wire.checked_folder(path)
    monkeypatch.undo()
    for at in (own / "launcher", own):
        at.rename(tmp_path / "elsewhere")
        at.symlink_to(tmp_path / "elsewhere")
        with monkeypatch.context() as context:
            context.setenv("XDG_RUNTIME_DIR", str(tmp_path))
            with pytest.raises(Invalid, match=f"{at} is no folder, or a link"):
                wire.checked_folder(f"{own}/launcher/launcher.sock")
        at.unlink()
        (tmp_path / "elsewhere").rename(at)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    (folder / "s.lock").symlink_to(tmp_path / "another")
    done = subprocess.run(
        [sys.executable, "-m", "kvstore.launcher", "serve", "--socket", f"{folder}/s", "--import", "json"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1 and "s.lock" in done.stderr
    assert not (tmp_path / "another").exists()


def test_variables_that_are_read_once(shared):
    done = shared.run("-c", "print(1)", environment=dict(OMP_NUM_THREADS="77"))
    assert done.returncode == 125 and "others: OMP_NUM_THREADS;" in done.stderr
    done = shared.run("-c", "print(1)", environment=dict(OMP_NUM_THREADS="77"), options=("--may-differ", "OMP_NUM_THREADS"))
    assert done.stdout == "1\n"
    assert fitness.differing({"LD_PRELOAD": "a", "X": "1"}, {"X": "2", "PYTHONHASHSEED": "0"}, ["LD_PRELOAD"]) == [
        "PYTHONHASHSEED"
    ]


def test_what_imports_set_is_set_in_workers(tmp_path):
    """vLLM sets variables while it is imported. A worker that had its client's environment alone would lack them."""
    (tmp_path / "sets.py").write_text("import os\nos.environ.update(A='imported', B='imported')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = Launcher("sets", environment=dict(PYTHONPATH=path, B="before"))
    try:
        launcher.wait_ready()
        program = "import os; print([os.environ.get(name) for name in ('A', 'B', 'OPENBLAS_NUM_THREADS')])"
        assert launcher.run("-c", program).stdout == "['imported', 'imported', None]\n"
        assert launcher.run("-c", program, environment=dict(A="mine", B="own")).stdout == "['mine', 'own', None]\n"
    finally:
        launcher.close()


UNFIT = {
    "a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), name='sleeper', daemon=True).start()",
        "sleeper",
    ),
    "a listener": ("import socket\none = socket.socket(socket.AF_UNIX)\none.bind('')\none.listen()", "the socket that listens"),
    "a connection": ("import socket\npair = socket.socketpair()", "the connection to"),
    "an event loop": ("import select\none = select.epoll()", "an event loop"),
    "a process": ("import subprocess\none = subprocess.Popen(['sleep', '60'])", "the child process "),
    "an error": ("raise ValueError('what')", "ValueError: what"),
    # The interpreter would wait for this one before it ends, and nobody would hear why.
    "a thread that is waited for": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,), name='waits').start()",
        "waits",
    ),
    "an error behind a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nraise ValueError('what')",
        "ValueError: what",
    ),
    "an exit behind a thread": (
        "import sys, threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nsys.exit('enough')",
        "enough",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_a_fork_does_not_survive_is_named(tmp_path, what):
    program, said = UNFIT[what]
    (tmp_path / "unfit.py").write_text(program)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = Launcher("unfit", environment=dict(PYTHONPATH=path))
    try:
        assert launcher.process.wait(PATIENCE_S) == 1
        assert said in launcher.log
    finally:
        launcher.close()


def test_what_comes_up_later_is_named_before_the_fork(tmp_path):
    """A timer that an import left behind: nothing was wrong when the launcher began."""
    (tmp_path / "later.py").write_text(
        "import os, signal, threading, time\n"
        "def start(*_): threading.Thread(target=time.sleep, args=(1000,), name='late', daemon=True).start()\n"
        "signal.signal(signal.SIGUSR2, start)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = Launcher("later", environment=dict(PYTHONPATH=path)).wait_ready()
    try:
        assert launcher.run("-c", "print(1)").stdout == "1\n"
        template = launcher.template()
        os.kill(template, signal.SIGUSR2)
        until(lambda: len(os.listdir(f"/proc/{template}/task")) == 2, "the thread")
        done = launcher.run("-c", "print(1)")
        assert done.returncode == 125 and "the thread 'late'" in done.stderr
    finally:
        launcher.close()


def test_a_changed_module_is_imported_again(tmp_path):
    module = tmp_path / "version.py"
    module.write_text("number = 1\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = Launcher("version", environment=dict(PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")).wait_ready()
    try:
        program = "import version; print(version.number)"
        assert launcher.run("-c", program).stdout == "1\n"
        old = launcher.start("-c", WAITS)
        worker = int(old.stdout.readline())
        module.write_text("number = 22\n")
        assert launcher.run("-c", program).stdout == "22\n"
        assert "has changed" in launcher.log and is_alive(worker)
        old.terminate()
        assert old.wait(PATIENCE_S) == -signal.SIGTERM
        # While it cannot be imported, clients wait; then it is tried again.
        module.write_text("raise ValueError('half written')\n")
        waiting = launcher.start("-c", program)
        until(lambda: "half written" in launcher.log, "the attempt")
        module.write_text("number = 333\n")
        assert waiting.communicate(timeout=PATIENCE_S)[0] == "333\n"
    finally:
        launcher.close()


def test_many_at_once(shared):
    results = []

    def work(at: int) -> None:
        for _ in range(5):
            done = shared.run("-c", f"import sys; sys.exit(10 + {at})")
            results.append((done.returncode - at, done.stderr))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(10, "")] * 20


def test_numpy_has_its_threads_and_its_own_random_numbers():
    """OpenBLAS starts threads while it is imported: numpy could not be imported by a launcher at all."""
    pytest.importorskip("numpy")
    program = "import os, numpy; numpy.ones((500, 500)) @ numpy.ones((500, 500)); print(len(os.listdir('/proc/self/task')))"
    launcher = Launcher("numpy").wait_ready()
    try:
        for threads in ({}, dict(OPENBLAS_NUM_THREADS="1")):
            environment = {**launcher.environment, **threads}
            cold = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
            assert launcher.run("-c", program, environment=threads).stdout == cold.stdout
        program = "import numpy; print(numpy.random.random())"
        assert launcher.run("-c", program).stdout != launcher.run("-c", program).stdout
    finally:
        launcher.close()

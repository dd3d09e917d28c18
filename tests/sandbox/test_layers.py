"""Every layer does what its name says, where this machine allows it; and what holds without any."""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from esper import doctor
from esper.errors import EsperError
from esper.sandbox.allowance import Allowance, explain
from esper.sandbox.layers import Layer
from esper.sandbox.probe import allowed, available, describe
from esper.sandbox.watch import end_family

MOST = Allowance(memory_bytes=1 << 30)


def shut_in(program: str, folder: Path, layers: tuple[Layer, ...], most: Allowance = MOST) -> str:
    """The source of a program that shuts itself in first."""
    return (
        "from pathlib import Path\n"
        "from esper.sandbox.allowance import Allowance\n"
        "from esper.sandbox.layers import Layer, enter\n"
        "import os, signal, socket, subprocess, sys\n"
        f"enter({[*map(str, layers)]}, {most!r}, [Path({str(folder)!r})])\n{program}"
    )


def inside(
    program: str, folder: Path, layers: tuple[Layer, ...], most: Allowance = MOST
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", shut_in(program, folder, layers, most)],
        capture_output=True, text=True, timeout=120,
    )


def only(layer: Layer) -> tuple[Layer, ...]:
    """The layer with those below it, so that its effect is its own as far as can be."""
    if available()[layer]:
        pytest.skip(f"this machine does not allow {layer!r}: {available()[layer]}")
    needed = {Layer.PROCESSES: (Layer.FILES,)}.get(layer, ())
    first = (Layer.PRIVILEGES,) if not available()[Layer.PRIVILEGES] else ()
    return tuple(dict.fromkeys((*first, *needed, layer)))


@pytest.fixture(params=["no layer", "all layers"])
def layers(request: pytest.FixtureRequest) -> tuple[Layer, ...]:
    return allowed() if request.param == "all layers" else ()


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A listening port and a listening Unix socket; whoever gets through is the test's failure."""
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        yield tcp.getsockname()[1], path
        for listener in (tcp, unix):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_no_privileges(tmp_path: Path) -> None:
    done = inside(
        "print(open('/proc/self/status').read(), os.getuid())\n"
        "sys.stdout.flush()\nsubprocess.run(['cat', '/proc/self/status'])",
        tmp_path, only(Layer.PRIVILEGES))
    held = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("CapEff")]
    assert held == ["0" * 16] * 2, done.stderr
    assert f" {os.getuid()}\n" in done.stdout, "the same user to the files"


def test_no_network(tmp_path: Path, ports: tuple[int, Path]) -> None:
    done = inside(f"socket.create_connection(('127.0.0.1', {ports[0]}))",
                  tmp_path, only(Layer.NETWORK))
    assert "Network is unreachable" in done.stderr


def test_no_sockets(tmp_path: Path, ports: tuple[int, Path]) -> None:
    for program in (f"socket.create_connection(('127.0.0.1', {ports[0]}))",
                    f"socket.socket(socket.AF_UNIX).connect({str(ports[1])!r})"):
        done = inside(program, tmp_path, only(Layer.SOCKETS))
        assert "PermissionError" in done.stderr
    done = inside("print(socket.socketpair())", tmp_path, only(Layer.SOCKETS))
    assert done.returncode == 0, "what leads nowhere is let be"


def test_own_ipc(tmp_path: Path) -> None:
    name = "/proc/self/ns/ipc"
    done = inside(f"print(os.readlink({name!r}))", tmp_path, only(Layer.IPC))
    assert done.stdout.strip() not in ("", os.readlink(name))


def test_read_only_files(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    done = inside(
        "Path('/dev/shm/esper-test').write_text('')\n"
        f"Path({str(own)!r}, 'x').write_text('')\n"
        "open('/dev/null', 'w').write('x')\n"
        f"Path({str(other)!r}, 'x').write_text('')",
        own, only(Layer.FILES))
    assert "Read-only file system" in done.stderr and f"{other}/x" in done.stderr
    assert [p.name for p in tmp_path.rglob("x")] == ["x"] and (own / "x").exists()
    assert not Path("/dev/shm/esper-test").exists()


def test_own_processes(tmp_path: Path) -> None:
    done = inside(
        "print([n for n in os.listdir('/proc') if n.isdigit()])\n"
        f"os.kill({os.getpid()}, 0)", tmp_path, only(Layer.PROCESSES))
    assert done.stdout == "['1', '2']\n" and "ProcessLookupError" in done.stderr


def test_the_keeper_ends_as_the_child_did(tmp_path: Path, layers: tuple[Layer, ...]) -> None:
    assert inside("pass", tmp_path, layers).returncode == 0
    assert inside("sys.exit(7)", tmp_path, layers).returncode == 7
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
        program = f"signal.signal({number}, signal.SIG_DFL) if {number} != 9 else 0\n"
        done = inside(program + f"os.kill(os.getpid(), {number})", tmp_path, layers)
        assert done.returncode == -number


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="this system has no SCHED_IDLE")
def test_idle_priority_goes_in_with_it(tmp_path: Path, layers: tuple[Layer, ...]) -> None:
    program = shut_in("print(os.sched_getscheduler(0), flush=True); signal.pause()",
                      tmp_path, layers)
    idle = "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))\n"
    with subprocess.Popen([sys.executable, "-c", idle + program], text=True,
                          stdout=subprocess.PIPE) as keeper:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == f"{os.SCHED_IDLE}\n"
        family = [keeper.pid, *(p.pid for p in psutil.Process(keeper.pid).children())]
        # Idle is compared within one session only.
        assert len(family) > 1 and {os.getsid(pid) for pid in family} == {os.getsid(0)}
        end_family(keeper.pid)


def test_nothing_outlives_it(tmp_path: Path, layers: tuple[Layer, ...]) -> None:
    # The orphan holds standard output open: as long as it lives, reading does not end.
    orphan = (
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        os.execlp('sleep', 'sleep', '600')\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    assert inside(orphan + "print('done')", tmp_path, layers).stdout == "done\n"
    # Nor when the keeper is killed, which with no layer takes its owner (`end_family`).
    if Layer.PROCESSES in layers:
        program = shut_in(orphan + "print('up', flush=True); signal.pause()", tmp_path, layers)
        keeper = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert keeper.stdout is not None and keeper.stdout.readline() == b"up\n"
        keeper.kill()
        assert keeper.stdout.read() == b"" and keeper.wait() == -signal.SIGKILL


def test_nothing_is_left_to_whoever_inherits_orphans(
    tmp_path: Path, layers: tuple[Layer, ...]
) -> None:
    """As the slow track's supervisor does, and the first process of a container."""
    program = shut_in("if len(sys.argv) > 1: print('up', flush=True); signal.pause()",
                      tmp_path, layers)
    heir = (
        "import subprocess, sys, psutil\n"
        "from esper.sandbox import layers, watch\n"
        "layers._call('prctl', layers._CHILD_SUBREAPER, 1, 0, 0, 0)\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
        "print([p.status() for p in psutil.Process().children()])\n"
        "keeper = subprocess.Popen([sys.executable, '-c', sys.argv[1], 'stay'],\n"
        "                          stdout=subprocess.PIPE, process_group=0)\n"
        "keeper.stdout.readline()\n"
        "watch.end_family(keeper.pid)\n"
        "keeper.wait()\n"
        "print([p.status() for p in psutil.Process().children()])\n"
    )
    done = subprocess.run([sys.executable, "-c", heir, program], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout == "[]\n[]\n", done


def test_limits_hold_and_say_which_they_were(tmp_path: Path, layers: tuple[Layer, ...]) -> None:
    most = Allowance(memory_bytes=512 << 20, cpu_seconds=1, file_bytes=1 << 20)
    said = (
        "from esper.sandbox.allowance import explain\n"
        "try:\n    {}\nexcept BaseException as e:\n"
        f"    print(explain(e, {most!r}), file=sys.stderr)"
    )
    run = "subprocess.run([sys.executable, '-c', {!r}], capture_output=True, check=True)"
    program = f"a program that it ran, {Path(sys.executable).name}, "
    for work, words in (
        ("bytearray(1 << 30)", "ran out of memory (limit 512 MiB)"),
        (f"Path(r'{tmp_path}', 'big').write_bytes(bytes(2 << 20))",
         "wrote a file over 1 MiB"),
        (run.format("while True: pass"), program + "used more than 1 s of processor time"),
        (run.format("import os; os.abort()"), program + "was killed by SIGABRT"),
        (run.format("raise SystemExit(3)"), program + "ended with status 3"),
        (run.format("print('virtual memory exhausted: Cannot allocate memory'); exit(1)"),
         program + "ran out of memory (limit 512 MiB)"),
    ):
        assert inside(said.format(work), tmp_path, layers, most).stderr.strip() == words
    assert explain(ValueError("anything else"), most) == ""


def test_a_process_that_forks_without_end_comes_to_an_end(tmp_path: Path) -> None:
    """Held by the kernel itself, not only seen by the owner (tests/sandbox/test_watch.py)."""
    kernel = tuple(map(int, platform.release().split("-")[0].split(".")[:2]))
    held = (Layer.PROCESSES in allowed() and kernel >= (6, 14)) or (
        Layer.PRIVILEGES in allowed() and os.getuid() != 0 and kernel >= (5, 14))
    if not held:
        pytest.skip(f"Linux {kernel} holds no number of processes for user {os.getuid()} here")
    bomb = (
        "count = 0\n"
        "try:\n"
        "    while count < 5000:\n"
        "        if os.fork() == 0: signal.pause()\n"
        "        count += 1\n"
        "except BlockingIOError: pass\n"
        "print(count)"
    )
    done = inside(bomb, tmp_path, allowed())
    assert MOST.processes <= int(done.stdout) <= 300 + MOST.processes, done.stderr


# A user namespace in which there may be no other, left by a process without a capability.
REFUSING = (
    "import os, struct, sys\n"
    "from esper.sandbox import layers\n"
    "layers._call('prctl', layers._NO_NEW_PRIVS, 1, 0, 0, 0)\n"
    "layers._enter_user_namespace()\n"
    "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
    "layers._call('capset', struct.pack('Ii', layers._CAPABILITY_VERSION, 0), bytes(24))\n"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
)


def test_a_machine_that_refuses_namespaces_is_told_apart_and_works(tmp_path: Path) -> None:
    def there(*arguments: str) -> subprocess.CompletedProcess[str]:
        start = [] if available()[Layer.PRIVILEGES] else ["-c", REFUSING]
        return subprocess.run([sys.executable, *start, *arguments], capture_output=True,
                              text=True, timeout=120, check=True)

    found = {Layer(n): why for n, why in json.loads(
        there("-m", "esper.sandbox.probe").stdout).items()}
    assert found[Layer.PRIVILEGES] and found[Layer.FILES]
    assert found[Layer.PROCESSES] == f"needs {Layer.FILES}"
    assert found[Layer.SOCKETS] == available()[Layer.SOCKETS], "it needs no namespace"
    on = tuple(layer for layer, why in found.items() if not why)
    assert there("-c", shut_in("print('works')", tmp_path, on)).stdout == "works\n"


def test_the_doctor_tells_which_layers_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    check = doctor._sandbox()
    assert check.found == describe(available())
    assert check.ok is (None if any(available().values()) else True)
    refused = {**dict.fromkeys(Layer, ""), Layer.NETWORK: "Operation not permitted"}
    monkeypatch.setattr(doctor, "available", lambda: refused)
    check = doctor._sandbox()
    assert "off: no network (Operation not permitted)" in check.found
    assert "no sockets" in check.found and check.ok is None and "unshare" in check.hint


def test_a_probe_that_cannot_start_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EsperError, match="did not"):
        available.__wrapped__()
    monkeypatch.setattr(doctor, "available", available.__wrapped__)
    assert doctor._sandbox().ok is False

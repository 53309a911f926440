"""The harness itself: what tests with guests rely on. No shmsock sockets here."""

from __future__ import annotations

import base64
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shmsock.guests import image as guest_image
from shmsock.guests.qemu import (
    Bridge,
    CommandFailed,
    CommandTimeout,
    Fleet,
    GuestDied,
    GuestUnavailable,
    Ivshmem,
    missing,
)

if TYPE_CHECKING:
    from tests.vm.conftest import Pair

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

# Prints a byte of BAR2, or sets it when a value is given.
BAR2 = """
import mmap, sys
from pathlib import Path
offset, *value = map(int, sys.argv[1:])
for device in Path("/sys/bus/pci/devices").iterdir():
    if (device / "vendor").read_text() + (device / "device").read_text() == "0x1af4\\n0x1110\\n":
        (device / "enable").write_text("1")
        with open(device / "resource2", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            if value:
                memory[offset] = value[0]
            print(device.name, len(memory), memory[offset])
"""


def running(pid: int) -> bool:
    """Whether the process is there, and not just a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def processes(fleet: Fleet) -> list[int]:
    """The processes that name this fleet's directory in their arguments or have a file open in it."""
    needle, found = str(fleet.directory), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [os.readlink(link) for link in (process / "fd").iterdir()]
            text = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if int(process.name) != os.getpid() and any(needle in part for part in (text, *files)):
            found.append(int(process.name))
    return found


def test_exit_codes(two_guests: Pair) -> None:
    a = two_guests.a
    assert a.run(["true"]).returncode == 0
    assert a.run(["sh", "-c", "exit 7"], check=False).returncode == 7
    assert a.run(["sh", "-c", "kill -TERM $$"], check=False).returncode == -signal.SIGTERM
    assert a.run(["no-such-program"], check=False).returncode == 127
    with pytest.raises(CommandFailed, match=r"(?s)vm-a: exit status 3.*--- stderr\nwhy"):
        a.run(["sh", "-c", "echo why >&2; exit 3"])


def test_output_and_input(two_guests: Pair) -> None:
    a = two_guests.a
    result = a.run(["sh", "-c", "echo out; echo err >&2"])
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    data = os.urandom(3_000_000)
    assert a.run(["cat"], input=data).stdout == data
    assert a.run(["true"], input=data).stdout == b""  # input that nobody reads
    big = a.run(["sh", "-c", "yes | head -c 2000000; yes n | head -c 2000000 >&2"])
    assert (big.stdout, big.stderr) == (b"y\n" * 1_000_000, b"n\n" * 1_000_000)


def test_environment(two_guests: Pair) -> None:
    for guest in two_guests.a, two_guests.b:
        assert guest.run(["uname", "-n"]).text == guest.name
    a = two_guests.a
    assert a.run(["sh", "-c", "echo $ONE $HOME; pwd"], env={"ONE": "1"}, cwd="/run").text == "1 /tmp\n/run"
    same = a.run(["python", "-c", "import sys; print(sys.version, sys.executable, sep='\\n')"]).text
    assert same == f"{sys.version}\n{sys.executable}"
    assert a.run(["uname", "-r"]).text == guest_image.find_kernel().version
    assert a.accel in ("kvm", "tcg")


def test_only_the_loopback_device(two_guests: Pair) -> None:
    script = "import socket as s; l = s.create_server(('127.0.0.1', 0)); s.create_connection(l.getsockname())"
    for guest in two_guests.a, two_guests.b:
        assert guest.run(["ls", "/sys/class/net"]).text == "lo"
        guest.run(["python", "-c", script])


def test_host_files_cannot_be_written(two_guests: Pair) -> None:
    target = Path(__file__).with_name("must-not-appear")
    script = f"mount -o remount,rw /; echo > {target}"
    result = two_guests.a.run(["busybox", "sh", "-c", script], check=False)
    assert result.returncode != 0
    assert not target.exists()
    two_guests.a.run(["sh", "-c", "for d in /tmp /run /dev/shm; do echo > $d/file; done"])
    assert not Path("/run/file").exists()


def test_hanging_command_is_killed(two_guests: Pair) -> None:
    a = two_guests.a
    with pytest.raises(CommandTimeout, match=r"(?s)still running after 5 s.*started"):
        a.run(["sh", "-c", "echo started; sleep 4321 & sleep 4321"], timeout=5)
    alive = a.run(["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"], check=False).text
    assert "guests/agent.py" in alive
    assert "sleep" not in alive


def test_talking_to_a_running_command(two_guests: Pair) -> None:
    script = "echo ready; while read line; do echo got $line; done; echo bye"
    with two_guests.a.start(["sh", "-c", script]) as one, two_guests.a.start(["sh", "-c", script]) as two:
        assert one.readline() == "ready"
        assert two.expect("read") == "ready"
        one.send(b"x\n")
        assert one.readline() == "got x"
        assert one.running
        with pytest.raises(CommandTimeout, match="no line"):
            one.readline(timeout=0.1)
        one.close_stdin()
        with pytest.raises(CommandFailed, match=r"(?s)no line is left.*got x\nbye"):
            one.expect("never")
        assert one.wait().returncode == 0
        two.kill(signal.SIGTERM)
        assert two.wait().returncode == -signal.SIGTERM


PROGRAM = """
import os, sys
print(sys.argv, "decimal" in sys.modules, os.environ.get("ONE"), os.getcwd(), os.getsid(0) == os.getpid())
print(sys.stdin.read(), file=sys.stderr)
"""


def test_programs_that_begin_with_their_modules(two_guests: Pair) -> None:
    """The same as from the beginning, whichever way Python is told what to run."""
    a = two_guests.a
    program = ["python", "-c", PROGRAM, "x"]
    for modules in (), ("decimal",):
        done = a.run(program, modules=modules, env={"ONE": "1"}, cwd="/run", input=b"in")
        assert done.text == f"['-c', 'x'] {bool(modules)} 1 /run True"
        assert done.stderr == b"in\n"
    for argv in ["-m", "base64", "-t"], [base64.__file__, "-t"]:
        assert "Aladdin:open sesame" in a.run(["python", *argv], modules=["decimal"]).text
    for code, status in ("sys.exit(3)", 3), ("1 / 0", 1), ("os.kill(os.getpid(), 15)", -signal.SIGTERM):
        fails = ["python", "-c", f"import atexit, os, sys; atexit.register(print, 'end'); {code}"]
        done = a.run(fails, modules=["decimal"], check=False)
        assert (done.returncode, done.text) == (status, "" if status < 0 else "end")
        assert (b"ZeroDivisionError" in done.stderr) == (status == 1)
    pickles = "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)"
    assert a.run(["python", "-c", pickles], modules=["decimal"]).text == "True"
    done = a.run(["python", "-c", "", "x" * (1 << 17)], modules=["decimal"], check=False)
    assert done.returncode == 127
    assert b"expected at most 131072" in done.stderr
    sleeps = ["python", "-c", "import time; print('up'); time.sleep(1000)"]
    with a.start(sleeps, modules=["decimal"]) as command:
        assert command.readline() == "up"
        command.kill()
        assert command.wait().returncode == -signal.SIGKILL
    done = a.run(program, modules=["no_such_module"], check=False)
    assert done.returncode == 127
    assert b"cannot be imported" in done.stderr
    zombies = a.run(["sh", "-c", "cat /proc/[0-9]*/stat | grep ') Z'"], check=False)
    assert zombies.stdout == b""


def test_what_a_command_leaves_behind(two_guests: Pair) -> None:
    a = two_guests.a
    with a.start(["sh", "-c", "(sleep 0.5; echo later) & echo first"]) as command:
        assert command.wait().stdout.startswith(b"first\n")  # does not wait for who holds the pipe
        deadline = time.monotonic() + 30
        while command.stdout != b"first\nlater\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    zombies = a.run(["sh", "-c", "cat /proc/[0-9]*/stat | grep ') Z'"], check=False)
    assert zombies.stdout == b""


def test_shared_memory(two_guests: Pair) -> None:
    a, b, region, size, *_ = two_guests
    address, length, _ = a.run(["python", "-c", BAR2, "12345", "201"]).text.split()
    assert int(length) == size
    assert b.run(["python", "-c", BAR2, "12345"]).text.split() == [address, length, "201"]
    with region.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        assert memory[12345] == 201
        memory[12345] = 17
    assert a.run(["python", "-c", BAR2, "12345"]).text.split()[2] == "17"


def test_the_next_test_finds_zeroes(two_guests: Pair) -> None:
    assert not any(two_guests.region.read_bytes())


def test_stop_and_cont(two_guests: Pair) -> None:
    with two_guests.a.start(["cat"]) as cat:
        two_guests.a.stop()
        cat.send(b"hello\n")
        with pytest.raises(CommandTimeout):
            cat.readline(timeout=1)
        two_guests.a.cont()
        assert cat.readline() == "hello"


def test_reset(two_guests: Pair) -> None:
    a = two_guests.a
    a.run(["touch", "/tmp/here"])
    pid = a.process.pid
    with a.start(["sh", "-c", "yes"]) as flood:  # half a line, half a frame: whatever is on its way
        flood.readline()
        flood.send(b"x" * 1_000_000)
        a.reset()
        with pytest.raises(GuestDied, match="was reset while running"):
            flood.wait()
    assert "here" not in a.run(["ls", "/tmp"]).text.split()
    assert a.run(["uname", "-n"]).text == "vm-a"
    assert (a.process.pid, a.alive) == (pid, True)
    assert two_guests.b.run(["echo", "undisturbed"]).text == "undisturbed"


def test_killed_guest(two_guests: Pair) -> None:
    with two_guests.b.start(["sleep", "1000"]) as command:
        two_guests.b.kill()
        with pytest.raises(GuestDied, match=r"(?s)the guest died while running.*serial log of vm-b"):
            command.wait()
    with pytest.raises(GuestDied, match="QEMU ended with status -9"):
        two_guests.b.run(["true"])
    assert not two_guests.b.alive
    assert two_guests.a.run(["echo", "alive"]).text == "alive"


def test_killed_guest_is_booted_anew(two_guests: Pair) -> None:
    assert two_guests.b.run(["uname", "-n"]).text == "vm-b"


def test_guest_that_panics(fleet: Fleet) -> None:
    guest = fleet.boot("vm-p")
    with pytest.raises(GuestDied, match=r"(?s)the guest died while running.*Kernel panic"):
        guest.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])


def test_failed_boots_show_the_log(fleet: Fleet) -> None:
    panic = fleet.boot("vm-panic", append="rdinit=/no-such-file")
    wrong = fleet.boot("vm-wrong", extra=["-device", "no-such-device"])
    module = fleet.boot("vm-module", modules=["no_such_module"])
    slow = fleet.boot("vm-slow", timeout=0.1)
    with pytest.raises(GuestDied, match=r"(?s)vm-slow did not boot within 0.1 s.*serial log of vm-slow"):
        slow.run(["true"])
    with pytest.raises(GuestDied, match=r"(?s)QEMU ended with status 1.*no-such-device"):
        wrong.run(["true"])
    with pytest.raises(GuestDied, match=r"(?s)QEMU ended with status 0.*Kernel panic"):
        panic.run(["true"])
    with pytest.raises(GuestDied, match=r"modprobe .*no_such_module"):
        module.run(["true"])
    with pytest.raises(ValueError, match="running already"):
        fleet.boot("vm-slow")
    assert next(title for title, _ in fleet.report()) == "guest vm-panic"


def test_network_on_request(fleet: Fleet) -> None:
    with Bridge() as bridge:
        taps = bridge.tap(), bridge.tap()
        a, b = (fleet.boot(f"vm-{number}", net=tap) for number, tap in enumerate(taps))
        serve = f"import socket; s = socket.create_server(('{taps[1].ip}', 7000)); print('ready')\n"
        serve += "c = s.accept()[0]; c.sendall(c.recv(100).upper()); c.recv(1)"
        talk = f"import socket; c = socket.create_connection(('{taps[1].ip}', 7000)); c.sendall(b'hello')\n"
        talk += "print(c.recv(100).decode())"
        with b.start(["python", "-c", serve]) as server:
            server.expect("ready")
            assert a.run(["python", "-c", talk]).text == "HELLO"
            assert server.wait().returncode == 0
        assert a.run(["ls", "/sys/class/net"]).text == "eth0\nlo"
        a.kill()
        b.kill()
    assert not Path("/sys/class/net", bridge.name).exists()
    assert not Path("/sys/class/net", taps[0].ifname).exists()


def test_a_bridge_whose_maker_was_killed_goes_with_the_next() -> None:
    make = "import os, signal; from shmsock.guests.qemu import Bridge; bridge = Bridge().__enter__()\n"
    make += "print(bridge.name, bridge.tap().ifname, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    with Bridge() as bridge:
        tap = bridge.tap().ifname
        left = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True).stdout.split()
        assert len(left) == 2
        assert all(Path("/sys/class/net", name).exists() for name in left)
        with Bridge():
            assert not any(Path("/sys/class/net", name).exists() for name in left)
            assert all(Path("/sys/class/net", name).exists() for name in (bridge.name, tap))


def test_iommu_and_two_devices(fleet: Fleet) -> None:
    devices = [Ivshmem(fleet.shared_file(size), size) for size in (1 << 20, 1 << 22)]
    guest = fleet.boot("vm-i", ivshmem=devices, iommu=True, modules=["vfio-pci"], cpus=2, memory_mb=640)
    lines = sorted(guest.run(["python", "-c", BAR2, "0"]).text.splitlines())
    assert [int(line.split()[1]) for line in lines] == [1 << 20, 1 << 22]
    assert guest.run(["ls", "/sys/kernel/iommu_groups"]).text
    assert guest.run(["nproc"]).text == "2"


def test_nothing_is_left(fleet: Fleet) -> None:
    region = fleet.shared_file(1 << 20)
    guest = fleet.boot("vm-x", ivshmem=[Ivshmem(region, 1 << 20)])
    guest.wait_ready()
    found = processes(fleet)
    assert guest.process.pid in found
    assert len(found) == 2  # QEMU, virtiofsd
    fleet.close()
    assert not any(running(pid) for pid in found)
    assert not fleet.directory.exists()
    assert not region.exists()
    fleet.close()


def test_killed_test_run_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time\n"
        "from shmsock.guests.qemu import Fleet\n"
        "fleet = Fleet()\n"
        "guest = fleet.boot('vm-k')\n"
        "print(fleet.directory, guest.process.pid, guest._server.pid, flush=True)\n"
        "time.sleep(1000)\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=env, text=True) as run:
        assert run.stdout is not None
        directory, *pids = run.stdout.readline().split()
        assert Path(directory).is_dir()
        assert all(running(int(pid)) for pid in pids)
        run.kill()
    deadline = time.monotonic() + 10
    while any(running(int(pid)) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shutil.rmtree(directory)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert missing() == []
    monkeypatch.setattr(guest_image, "_ADMIN_PATH", str(tmp_path))
    monkeypatch.setattr(guest_image, "_VIRTIOFSD", ())
    packages = missing()
    assert {"qemu-system-x86", "busybox-static", "kmod"} < set(packages)
    with pytest.raises(GuestUnavailable, match=r"sudo apt-get install busybox-static .*qemu-system-x86"):
        Fleet()


def test_folders_that_guests_would_hide(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("seen")
    with Fleet(show=[tmp_path]) as fleet, tempfile.TemporaryDirectory() as other:
        guest = fleet.boot("vm-a")
        assert guest.run(["cat", tmp_path / "file"]).stdout == b"seen"
        assert guest.run(["test", "-e", other], check=False).returncode == 1
        assert guest.run(["touch", tmp_path / "mine"], check=False).returncode != 0


def test_nonsense_is_refused(fleet: Fleet) -> None:
    with pytest.raises(ValueError, match="power of two"):
        fleet.boot("vm-a", ivshmem=[Ivshmem("/dev/shm/none", 5000)])
    with pytest.raises(ValueError, match="kvm, tcg or auto"):
        fleet.boot("vm-a", accel="xen")

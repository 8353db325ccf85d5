"""Programs that attack the sandbox, and what has to become of each.

Imported without pytest too, by a process that gives up being root.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_rlsd.rewards.sandbox import Limits, Sandbox, output_of


def limits(**changes: Any) -> Limits:
    usual = {"cpu_seconds": 10, "memory_bytes": 1 << 29, "processes": 16, "output_bytes": 1 << 20}
    return Limits(**{**usual, **changes})


SECRET = "a secret of the machine"
ATTACKS = """
import ctypes, json, os, socket, sys
done, libc = {}, ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try: done[name] = act()
    except BaseException as error: done[name] = f"refused: {type(error).__name__}"
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0: raise OSError(ctypes.get_errno())
    return "done"
def write(path):
    with open(path, "w") as file: file.write("x")
    return "done"
def everywhere(name):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try: found.append(open(f"/proc/{pid}/{name}").read())
        except OSError: pass
    return found
attempt("read a file", lambda: open(%(secret)r).read())
attempt("read passwords", lambda: open("/etc/shadow").read())
attempt("read through /proc", lambda: open(f"/proc/1/root{%(secret)r}").read())
attempt("read through the working folder", lambda: open(f"/proc/1/cwd/{%(secret)r}").read())
attempt("list the root", lambda: sorted(os.listdir("/")))
attempt("write beside it", lambda: write(%(secret)r + "2"))
attempt("write to the root", lambda: write("/x"))
attempt("write to /usr", lambda: write("/usr/x"))
attempt("write to its folder", lambda: write("x"))
attempt("core pattern", lambda: write("/proc/sys/kernel/core_pattern"))
attempt("sysrq", lambda: write("/proc/sysrq-trigger"))
attempt("own memory limit", lambda: __import__("resource").setrlimit(9, (1 << 40, 1 << 40)))
for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_VSOCK", "AF_PACKET"):
    attempt(family, lambda: str(socket.socket(getattr(socket, family))))
attempt("resolve a name", lambda: socket.getaddrinfo("example.org", 80))
attempt("be root", lambda: os.setuid(0) or os.getuid())
attempt("mount", lambda: call("mount", b"none", b"/tmp", b"tmpfs", 0, None))
attempt("new user namespace", lambda: call("unshare", 0x10000000))
attempt("chroot", lambda: os.chroot("/tmp"))
attempt("trace", lambda: call("ptrace", 16, 1, 0, 0))
attempt("kill the first process", lambda: os.kill(1, 9) or os.path.exists("/proc/1"))
attempt("kill all processes", lambda: os.kill(-1, 0))
attempt("other processes", lambda: len(everywhere("cmdline")))
attempt("environments", lambda: [e for e in everywhere("environ") if "RLSD_SECRET" in e])
attempt("descriptors", lambda: sorted(
    os.readlink(f"/proc/self/fd/{n}").split(":")[0] for n in os.listdir("/proc/self/fd")
    if os.path.exists(f"/proc/self/fd/{n}")))
attempt("capabilities", lambda: [
    line.split()[1] for line in open("/proc/self/status") if line.startswith("Cap")])
attempt("devices", lambda: [
    d for d in os.listdir("/dev") if d.startswith(("sd", "vd", "kvm", "mem", "nvidia"))])
print(json.dumps(done))
"""
HARMLESS: dict[str, Any] = {
    "write to its folder": "done",
    "kill the first process": True,
    "environments": [],
    "capabilities": ["0" * 16] * 5,
    "devices": [],
}


def check_attacks(sandbox: Sandbox, secret: Path) -> None:
    written = output_of(sandbox, ATTACKS % {"secret": str(secret)}, b"", limits(), 60)
    assert written is not None
    done = json.loads(written)
    # bubblewrap's first process, and this program.
    assert done.pop("other processes") <= 3
    assert set(done.pop("list the root")) <= {
        *("bin", "dev", "lib", "lib64", "proc", "sbin", "tmp", "usr"),
        Path(sys.base_prefix).parts[1],
    }
    assert set(done.pop("descriptors")) <= {"pipe", "/dev/null", "/proc/2/fd", "/proc/3/fd"}
    done.pop("kill all processes")  # its own, if any
    for name, expected in HARMLESS.items():
        assert done.pop(name) == expected, name
    assert {name: what for name, what in done.items() if not str(what).startswith("refused")} == {}
    assert len(done) > 15
    assert sorted(path.name for path in secret.parent.iterdir()) == ["secret"]


FORKS = """
import os, time
n = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
        n += 1
except OSError:
    pass
print(n < 20, flush=True)
os._exit(0)
"""
DEAF = """
import signal, time
for n in range(1, 65):
    try: signal.signal(n, lambda *_: 0)
    except (OSError, ValueError): pass
time.sleep(60)
"""
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    os.close(1)
    time.sleep(600)
print("left one behind", flush=True)
"""


def check_forks(sandbox: Sandbox) -> None:
    assert output_of(sandbox, FORKS, b"", limits(), 60) == b"True\n"
    # A bomb: whatever becomes of it, the next program runs.
    assert output_of(sandbox, "import os\nwhile True: os.fork()", b"", limits(), 1) is None
    assert output_of(sandbox, "print(1)", b"", limits(), 60) == b"1\n"


def check_limits_of_a_process(sandbox: Sandbox) -> None:
    def run(code: str, seconds: float = 60, **changes: Any) -> bytes | None:
        return output_of(sandbox, code, b"", limits(**changes), seconds)

    assert run("while True: print('x' * 10000)") is None
    assert run("import sys\nwhile True: sys.stderr.write('x' * 10000)", cpu_seconds=1) is None
    assert run("x = bytearray(1 << 30)") is None
    assert run("while True: pass", cpu_seconds=1) is None
    assert run("import time; time.sleep(60)", 0.5) is None
    assert run("f = open('x', 'wb')\nwhile True: f.write(bytes(1 << 20))") is None
    assert run(DEAF, 0.5) is None
    assert run("print('ä', end='')") == "ä".encode()

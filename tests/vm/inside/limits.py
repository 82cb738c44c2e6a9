"""Jobs about memory, processes and CPU time of a job as a whole, one for each promise: as root and as a user, cold
and warm. Run as a program it is one of these four, in the group that `delegated` made.
"""

import json
import subprocess
import sys
import textwrap

from report import PAYLOAD, SLOW, check, combinations

MIB = 1 << 20
ALONE = str(PAYLOAD / "alone/sandpiper")

CASES = []


def case(name, status, program, also=None, **limits):
    """A job: its name, the status that it must end with, what else must hold of its result, and its limits."""
    CASES.append((name, status, textwrap.dedent(program), also, limits))


def peak(result):
    """The most memory that a job had."""
    return result["usage"]["memory_peak_bytes"]


case("plain", "succeeded", "print(1)", lambda r: r["stdout"] == "1\n" and 0 < peak(r) < 40 * MIB)
case(
    "groups_are_out_of_sight",
    "succeeded",
    "import os; print(open('/proc/self/cgroup').read().strip(), os.path.exists('/sys/fs/cgroup'))",
    lambda r: r["stdout"] == "0::/ False\n",
)
case(
    "memory_of_one",
    "memory_limit",
    "print(len(bytearray(300 << 20)))",
    lambda r: 40 * MIB < peak(r) <= 64 * MIB,
    memory_bytes=64 * MIB,
)
# Children that hold memory say so by a byte, and stay.
HOLD = """
import os, signal
said, say = os.pipe()
def hold(children, mib):
    for i in range(children):
        if os.fork() == 0:
            held = bytearray(mib << 20)
            os.write(say, b'x')
            signal.pause()
    for i in range(children): os.read(said, 1)
"""
case("memory_of_children", "memory_limit", HOLD + "hold(5, 20); print('fits')", memory_bytes=64 * MIB)
case(
    "peak_of_children",
    "succeeded",
    HOLD + "hold(3, 30)",
    lambda r: 90 * MIB < peak(r) <= 200 * MIB,
    memory_bytes=200 * MIB,
)
case(
    "memory_of_a_child_that_is_waited_for",
    "memory_limit",
    """
    import os
    child = os.fork()
    if child == 0:
        bytearray(200 << 20)
        os._exit(0)
    print(os.waitpid(child, 0))
    """,
    memory_bytes=64 * MIB,
)
case(
    "memory_of_files",
    "memory_limit",
    """
    with open('/tmp/a', 'wb', 0) as file:
        for i in range(100): file.write(bytes(1 << 20))
    print('wrote')
    """,
    memory_bytes=64 * MIB,
    disk_bytes=200 * MIB,
)
case(
    "memory_of_a_memfd",
    "memory_limit",
    """
    import os
    file = os.memfd_create('x')
    for i in range(100): os.write(file, bytes(1 << 20))
    print('wrote')
    """,
    memory_bytes=64 * MIB,
    disk_bytes=200 * MIB,
)
case(
    "memory_that_is_shared",
    "memory_limit",
    """
    import mmap
    shared = mmap.mmap(-1, 100 << 20)
    for i in range(0, 100 << 20, 4096): shared[i] = 1
    print('wrote')
    """,
    memory_bytes=64 * MIB,
)
case(
    "memory_of_pipes",
    "memory_limit",
    """
    import fcntl, os
    pipes = [os.pipe() for i in range(100)]
    for reader, writer in pipes:
        fcntl.fcntl(writer, 1031, 1 << 20)
        os.set_blocking(writer, False)
        try: os.write(writer, bytes(1 << 20))
        except BlockingIOError: pass
    print('wrote')
    """,
    memory_bytes=40 * MIB,
)
case(
    "memory_that_fits",
    "succeeded",
    "print(len(bytearray(40 << 20)))",
    lambda r: 40 * MIB < peak(r) <= 64 * MIB,
    memory_bytes=64 * MIB,
)
case(
    "processes",
    "succeeded",
    """
    import os, signal
    made = 0
    try:
        while True:
            if os.fork() == 0: signal.pause()
            made += 1
    except OSError as error: print(made, error.errno)
    """,
    lambda r: r["stdout"] == "7 11\n",
    processes=8,
)
case(
    "threads",
    "succeeded",
    """
    import os, signal, threading
    made = 0
    try:
        while True:
            threading.Thread(target=signal.pause, daemon=True).start()
            made += 1
    except RuntimeError: print(made, flush=True)
    os._exit(0)
    """,
    lambda r: r["stdout"] == "7\n",
    processes=8,
)
case("cpu_of_all", "cpu_limit", "import os\nfor i in range(3): os.fork()\nwhile True: pass", cpu_ms=int(500 * SLOW))
case(
    "cpu_of_children_that_ended",
    "cpu_limit",
    """
    import os, time
    while True:
        child = os.fork()
        if child == 0:
            while time.process_time() < .2: pass
            os._exit(0)
        os.waitpid(child, 0)
    """,
    cpu_ms=int(500 * SLOW),
)
case(
    "orphans",
    "succeeded",
    """
    import os, signal
    for i in range(5):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: signal.pause()
            os._exit(0)
    print('left')
    """,
    lambda r: r["stdout"] == "left\n",
)
case(
    "timeout_of_a_tree",
    "timeout",
    "import os, signal\nfor i in range(5):\n    if os.fork() == 0: break\nsignal.pause()",
)
case("a_signal_is_not_memory", "signaled", "import os; os.kill(os.getpid(), 9)", lambda r: r["signal"] == "SIGKILL")


def main():
    """Each combination in a service of its own."""
    import host

    for user, start in combinations():
        name = f"limits.{user}.{start}"
        command = [PAYLOAD / "inside/delegated", "/usr/bin/python3", __file__, name]
        ended = host.service(user, command, stdout=None)
        note = f"code {ended.returncode}, processes {host.jobs()}"
        check(f"{name}.nothing_is_left", ended.returncode == 0 and not host.jobs(), note)


def run_all(name):
    """All of them, in one combination."""
    options = ["--set", f"sandbox.start_timeout_ms={int(10_000 * SLOW)}"]
    if name.endswith(".warm"):
        options.append("--warm")
    for each, status, program, also, limits in CASES:
        # What is to end by its timeout ends soon; anything else is given the time that a slow machine takes.
        timeout = int(min((1000 if status == "timeout" else 60_000) * SLOW, 300_000))
        job = {"code": program, "timeout_ms": timeout, "limits": {"cpu_ms": int(20_000 * SLOW), **limits}}
        command = [ALONE, "exec", "--json", "--job", json.dumps(job), *options]
        ran = subprocess.run(command, check=False, capture_output=True, text=True)
        try:
            result = json.loads(ran.stdout)
        except ValueError:
            check(f"{name}.{each}", False, f"no result: {ran.stdout} {ran.stderr}")
            continue
        usage = result["usage"] or {}
        peaked, wall = usage.get("memory_peak_bytes", 0) / MIB, usage.get("wall_ms")
        note = f"{result['status']}, peak {peaked:.1f} MiB, wall {wall} ms"
        holds = result["status"] == status and (also is None or also(result))
        if not holds:
            note += f"; {result['error']}; stdout {result['stdout'][-100:]!r}; stderr {result['stderr'][-300:]!r}"
        check(f"{name}.{each}", holds, note)


if __name__ == "__main__":
    run_all(sys.argv[1])

"""The shipped unit as its head says: start, load, stop under load, kill -9, memory over, daemon-reload, stop."""

import os
import signal
import time

import host
from load import Load
from report import SETTINGS, SLOW, check

# User-mode Linux maps each page by itself, and its host allows 65,530 of them in a process: less than 256 MiB.
LIMIT = 128 << 20
SLEEP = "import time; time.sleep(.3); print(1)"


def main():
    """One life of it."""
    count = SETTINGS["unit_jobs"]
    host.broker()
    host.install_unit()
    if not check("unit.starts", host.start_unit(), host.state()):
        return
    check("unit.one_home", len(host.groups()) == 1, host.groups())

    load = Load(count)
    check("unit.load", load.all_are("succeeded") and not load.duplicates, load)

    stop = Stop()
    load = Load(count, code=SLEEP, at=0.2, then=stop)
    check("unit.stop_under_load", stop.is_clean(40), stop)
    check("unit.nothing_is_lost_by_a_stop", load.all_are("succeeded") and not load.duplicates, load)

    before = host.main_pid()
    load = Load(count, code=SLEEP, at=0.2, then=lambda: os.kill(before, signal.SIGKILL))
    # What was answered and not yet acked comes again.
    check("unit.nothing_is_lost_by_a_kill", load.all_are("succeeded") and load.duplicates <= 8, load)
    restarted = host.until(lambda: host.main_pid() not in (0, before), 60)
    check("unit.restarts", restarted, f"{host.shown('NRestarts')} restarts")
    host.until(lambda: host.answers("/readyz") == 200, 60)
    check("unit.one_home_after_a_kill", len(host.groups()) == 1, host.groups())

    worker = host.main_pid()
    load = Load(2, code="x = bytearray(600 << 20)", memory_bytes=LIMIT)
    check("unit.memory_of_a_job", load.all_are("memory_limit") and host.main_pid() == worker, load)

    host.run("systemctl", "set-property", "--runtime", host.UNIT, "MemoryMax=160M")
    load = Load(4, code="x = bytearray(200 << 20)\nimport time; time.sleep(1); print(len(x))")
    # Within their own limit: it is the worker that could not give what it promised.
    check("unit.memory_of_the_unit", load.all_are("worker_error") and host.main_pid() == worker, load)
    host.run("systemctl", "set-property", "--runtime", host.UNIT, "MemoryMax=4G")
    load = Load(4)
    check("unit.works_on_after_that", load.all_are("succeeded") and host.main_pid() == worker, load)

    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "set-property", "--runtime", host.UNIT, "CPUWeight=50")
    load = Load(2, code="x = bytearray(600 << 20)", memory_bytes=LIMIT)
    check("unit.limits_after_daemon_reload", load.all_are("memory_limit") and host.main_pid() == worker, load)

    stop = Stop(start=False)
    stop()
    check("unit.stop", stop.is_clean(10), stop)
    host.uninstall_unit()


class Stop:
    """`systemctl stop`, how long it took and what was there after it; then a start."""

    def __init__(self, start=True):
        """With `start`, it is started again."""
        self.start, self.seconds, self.result, self.left = start, float("inf"), "not stopped", []

    def __call__(self):
        """Does it."""
        began = time.monotonic()
        host.run("systemctl", "stop", host.UNIT)
        self.seconds = time.monotonic() - began
        self.result = host.shown("Result")
        self.left = host.groups() + host.jobs()
        if self.start:
            host.start_unit()

    def is_clean(self, seconds):
        """It ended by itself in so many seconds of a real machine, and left nothing."""
        return self.seconds < seconds * SLOW and self.result == "success" and not self.left

    def __str__(self):
        """For the note of a check."""
        return f"after {self.seconds:.1f} s, {self.result}, left: {self.left}"

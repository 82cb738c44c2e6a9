"""A worker whose control groups are renewed at one time stays at work: cold jobs in four slots of the shipped unit.

On kernels that cannot reset a memory peak (5.19 to 6.11) each job needs a new group, and four threads make theirs at
once, here with pipes that are slow to come (slow_pipes.c). A worker that stands still answers nobody: when no job
came back for long, its processes are shown.
"""

import pathlib

import host
from load import Load
from report import SETTINGS, check, say
from unit import Stop


def main():
    """Several rounds, each with a worker that was started anew."""
    host.broker()
    cold = {"SANDPIPER_ENVIRONMENTS__DEFAULT__WARM": "false"}
    slow = {"LD_PRELOAD": "/opt/sandpiper/slow_pipes.so"}
    host.install_unit(**cold, **slow, SANDPIPER_WORKER__SLOTS="4", TOKIO_WORKER_THREADS="4")
    for turn in range(1, SETTINGS["stall_rounds"] + 1):
        name = f"stall.{turn}"
        if not check(f"{name}.starts", host.start_unit(), host.state()):
            return
        load = Load(SETTINGS["stall_jobs"], quiet=30)
        if not check(f"{name}.all_are_answered", load.all_are("succeeded") and not load.duplicates, load):
            show()
        # What a watchdog puts right went wrong before.
        check(f"{name}.was_never_restarted", host.shown("NRestarts") == "0", f"{host.shown('NRestarts')} restarts")
        check(f"{name}.is_alive", host.answers("/healthz") == 200, f"/healthz {host.answers('/healthz')}")
        stop = Stop(start=False)
        stop()
        check(f"{name}.stops", stop.is_clean(10), stop)
        # What an earlier round left unanswered is not this round's.
        host.run("rabbitmqctl", "-q", "purge_queue", "sandpiper.jobs")
    # One seat: a peak that was not forgotten would be seen in whoever comes next.
    host.install_unit(**cold, SANDPIPER_WORKER__SLOTS="1")
    if not check("stall.peak.starts", host.start_unit(), host.state()):
        return
    peaks = [max(Load(2, code=code).peaks) >> 20 for code in ("print(1)", "x = bytearray(100 << 20)", "print(1)")]
    check("stall.peak_is_ones_own", peaks[0] < 60 and peaks[1] >= 100 and peaks[2] < 60, f"MiB {peaks}")
    host.uninstall_unit()


def show():
    """Where the worker stands, and what it waits for."""
    main_process = host.main_pid()
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
            if fields.split()[1] == str(main_process):
                say(f"child {name}) {fields.split()[0]} waits in {(stat.parent / 'wchan').read_text()}")
        except OSError:
            continue
    for task in pathlib.Path(f"/proc/{main_process}/task").glob("*"):
        say(f"thread {(task / 'comm').read_text().strip()} waits in {(task / 'wchan').read_text()}")
    say(host.journal())

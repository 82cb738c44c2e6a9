"""Two workers at once, each in a service of its own: both work, and what one of them leaves the other does."""

import host
from load import Load
from report import SETTINGS, SLOW, WORKER, check
from unit import SLEEP


def main():
    """A load for both, then one in the middle of which the first stops."""
    host.broker()
    for number in (1, 2):
        host.run(
            "systemd-run", "--quiet", "--collect", f"--unit=pair-{number}", "-p", "Delegate=yes", "-p", "User=worker",
            "-p", "KillMode=mixed", "-p", "TasksMax=4000", "-p", "TimeoutStopSec=120",
            "-E", f"SANDPIPER_SANDBOX__START_TIMEOUT_MS={int(10_000 * SLOW)}", "-E", "SANDPIPER_WORKER__SLOTS=2",
            "-E", f"SANDPIPER_HTTP__LISTEN=127.0.0.1:{9470 + number}", WORKER, "serve",
        )  # fmt: skip
    try:
        for number in (1, 2):
            ready = host.until(lambda port=9470 + number: host.answers("/readyz", port) == 200, 60)
            log = host.run("journalctl", "-u", f"pair-{number}", "-n", "5", "-o", "cat", "--no-pager").stdout
            if not check(f"pair.worker_{number}_starts", ready, "" if ready else log):
                return
        check("pair.two_homes", len(host.groups()) == 2, host.groups())
        load = Load(SETTINGS["unit_jobs"])
        shares = list(load.workers.values())
        check("pair.both_work", load.all_are("succeeded") and len(shares) == 2, f"{load} {shares}")
        load = Load(SETTINGS["unit_jobs"], code=SLEEP, at=0.2, then=lambda: host.run("systemctl", "stop", "pair-1"))
        check("pair.one_goes_on_alone", load.all_are("succeeded") and not load.duplicates, load)
        check("pair.one_home_is_left", len(host.groups()) == 1, host.groups())
    finally:
        host.run("systemctl", "stop", "pair-1", "pair-2")
    check("pair.nothing_is_left", not host.groups() and not host.jobs(), host.groups() + host.jobs())

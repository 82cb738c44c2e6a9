"""The system around a worker: commands and services, the broker, the shipped unit, and what is left of a worker."""

import os
import pathlib
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request

from report import PAYLOAD, SLOW, say

CGROUPS = pathlib.Path("/sys/fs/cgroup")
UNIT = "sandpiper.service"
DROP_IN = pathlib.Path("/run/systemd/system/sandpiper.service.d/test.conf")


def run(*command, **options):
    """A command, and what it said on both streams."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run([str(each) for each in command], check=False, text=True, **{**streams, **options})


def service(user, command, environment=(), **options):
    """A command as a service of its own with a delegated group: its exit code and output."""
    return run(*as_service(user, command, environment), **options)


def followed(user, command, environment=()):
    """The same, and how many lines came so far is told each minute."""
    began, told, lines = time.monotonic(), 0, []
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(as_service(user, command, environment), text=True, **streams) as process:
        for line in process.stdout:
            lines.append(line)
            if time.monotonic() - began > told + 60:
                told = time.monotonic() - began
                say(f"{len(lines)} lines after {told:.0f} s: {line.strip()}")
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(lines))


def as_service(user, command, environment):
    """What starts a command as a service."""
    arguments = ["systemd-run", "--quiet", "--pipe", "--wait", "--collect"]
    for each in [f"User={user}", "Delegate=yes", f"WorkingDirectory={PAYLOAD}", "TasksMax=infinity"]:
        arguments += ["-p", each]
    for each in environment:
        arguments += ["-E", each]
    return [str(each) for each in [*arguments, *command]]


def until(condition, seconds, every=0.2):
    """Whether it came true in so many seconds of a real machine."""
    end = time.monotonic() + seconds * SLOW
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True


def groups():
    """Control groups that a worker made."""
    # Groups come and go meanwhile; a walk does not mind.
    return sorted(
        os.path.relpath(os.path.join(place, name), CGROUPS)
        for place, names, _ in os.walk(CGROUPS)
        for name in names
        if re.fullmatch(r"sandpiper-\d+-[0-9a-f]{8}", name)
    )


def jobs():
    """Processes of jobs and of warm interpreters, whoever started them."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-I", b"-"]:
            found.append(path.parent.name)
    return found


def answers(path, port=9464):
    """The status of a worker's own HTTP server; 0 when there is none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5 * SLOW) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def broker():
    """Starts Debian's broker, once."""
    run("ip", "link", "set", "lo", "up")
    if run("systemctl", "is-active", "-q", "rabbitmq-server").returncode:
        began = time.monotonic()
        drop_in = pathlib.Path("/run/systemd/system/rabbitmq-server.service.d/test.conf")
        drop_in.parent.mkdir(parents=True, exist_ok=True)
        drop_in.write_text("[Service]\nTimeoutStartSec=infinity\n")
        run("systemctl", "daemon-reload")
        started = run("systemctl", "start", "rabbitmq-server")
        if started.returncode:
            log = run("journalctl", "-u", "rabbitmq-server", "-n", "30", "--no-pager").stdout
            raise RuntimeError(f"the broker does not start: {started.stdout} {log}")
        say(f"the broker is up after {time.monotonic() - began:.0f} s")


def install_unit(**settings):
    """deploy/systemd/sandpiper.service as its head says, with these variables besides, not yet started."""
    uninstall_unit()
    pathlib.Path("/opt/sandpiper").mkdir(parents=True, exist_ok=True)
    for name in ("sandpiper", "libsandpiper_shim.so", "slow_pipes.so"):
        shutil.copy(PAYLOAD / "opt" / name, "/opt/sandpiper/")
    etc = pathlib.Path("/etc/sandpiper")
    etc.mkdir(exist_ok=True)
    shutil.copy(PAYLOAD / "config.toml", etc)
    (etc / "amqp_url").touch(mode=0o600)
    (etc / "amqp_url").write_text("amqp://guest:guest@127.0.0.1:5672/%2f")
    shutil.copy(PAYLOAD / "sandpiper.service", "/etc/systemd/system/")
    # What is slow here is the machine, not the worker.
    settings = {"SANDPIPER_SANDBOX__START_TIMEOUT_MS": int(10_000 * SLOW), **settings}
    DROP_IN.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"Environment={name}={value}" for name, value in settings.items()]
    DROP_IN.write_text("\n".join(["[Service]", "TimeoutStartSec=infinity", *lines, ""]))
    run("systemctl", "daemon-reload")


def uninstall_unit():
    """Stops it, and forgets it."""
    run("systemctl", "stop", UNIT, timeout=300 * SLOW)
    run("systemctl", "revert", UNIT)
    DROP_IN.unlink(missing_ok=True)
    run("systemctl", "daemon-reload")
    run("systemctl", "reset-failed", UNIT)


def start_unit():
    """Whether it is ready, after a start. One that hangs is not waited for longer than that."""
    began = time.monotonic()
    run("systemctl", "start", "--no-block", UNIT)
    ready = until(lambda: answers("/readyz") == 200 and shown("ActiveState") == "active", 60)
    say(f"{'ready' if ready else 'NOT READY'} after {time.monotonic() - began:.0f} s, {shown('NRestarts')} restarts")
    return ready


def main_pid():
    """The worker of the unit; 0 when there is none."""
    return int(shown("MainPID"))


def shown(name):
    """A property of the unit."""
    return run("systemctl", "show", "-p", name, "--value", UNIT).stdout.strip()


def state():
    """Of the unit, for the note of a check: what it is, and why if it is not what it should be."""
    active = shown("ActiveState")
    return active if active == "active" else f"{active} {shown('SubState')}, {shown('StatusText')}: {journal(12)}"


def journal(lines=20):
    """The end of what the unit said."""
    return run("journalctl", "-u", UNIT, "-n", str(lines), "-o", "cat", "--no-pager").stdout


"""What `doctor` says of control groups in every place that a worker may be started in: that it is what was to be
expected there, that a job meets the limits that it promises, and that nothing is left behind.
"""

import json
import pathlib
import shlex

import host
from report import SETTINGS, SLOW, WORKER, check, say

# Five processes that have 20 MiB each at one time, under a limit of 64 MiB: an end by it for the job as a whole.
TOGETHER = """
import os, signal
r, w = os.pipe()
for i in range(5):
    if os.fork() == 0:
        held = bytearray(20 << 20)
        os.write(w, b'x')
        signal.pause()
for i in range(5): os.read(r, 1)
print('fits')
"""
JOB = {"code": TOGETHER, "timeout_ms": int(min(20_000 * SLOW, 300_000)), "limits": {"memory_bytes": 64 << 20}}

KEY = pathlib.Path("/root/key")
SSH = ["ssh", "-q", "-i", str(KEY), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]


def login(user, *before):
    """A login session."""
    return lambda command: [*SSH, f"{user}@localhost", shlex.join([*before, *command])]


def scope(*options):
    """Root's own scope."""
    return lambda command: ["systemd-run", "--quiet", "--scope", *options, *command]


def service(*properties, user="root"):
    """A service."""
    options = [word for each in [f"User={user}", *properties] for word in ("-p", each)]
    return lambda command: ["systemd-run", "--quiet", "--pipe", "--wait", "--collect", *options, *command]


def shell(line, place=list):
    """A shell in a place, with the worker's command as its arguments."""
    return lambda command: place(["bash", "-c", line, "-", *command])


def apart(line, *namespaces):
    """A delegated group, seen from namespaces of the worker's own that a line has changed."""
    place = service(DELEGATE)
    return shell(f'{line} && exec "$@"', lambda command: place(["unshare", "--mount", *namespaces, *command]))


DELEGATE = "Delegate=yes"
USER_SCOPE = ["systemd-run", "--quiet", "--user", "--scope"]
MOUNT = "umount -l /sys/fs/cgroup && mount -t cgroup2 c /sys/fs/cgroup"
READ_ONLY = f"{MOUNT} && mount -o remount,bind,ro /sys/fs/cgroup"
# A name, how to get there, whether control groups are to be had there, and whether it belongs to the short list.
PLACES = [
    ("root_login", login("root"), False, True),
    ("user_login", login("worker"), False, False),
    ("root_scope_delegated", scope("-p", DELEGATE), True, True),
    ("root_scope", scope(), False, False),
    ("user_scope_delegated", login("worker", *USER_SCOPE, "-p", DELEGATE), True, True),
    ("user_scope", login("worker", *USER_SCOPE), True, False),
    ("root_service", service(), False, True),
    ("root_service_delegated", service(DELEGATE), True, True),
    ("user_service", service(user="worker"), False, True),
    ("user_service_delegated", service(DELEGATE, user="worker"), True, True),
    ("user_service_delegated_cpu", service("Delegate=cpu", user="worker"), True, False),
    ("user_service_read_only", service(DELEGATE, "ProtectControlGroups=yes", user="worker"), False, False),
    ("root_service_read_only", service(DELEGATE, "ProtectControlGroups=yes"), False, False),
    ("root_service_not_alone", shell('sleep 1000 & "$@"; r=$?; kill $!; exit $r', service(DELEGATE)), False, True),
    ("own_namespace", apart(MOUNT, "--cgroup"), True, False),
    ("own_namespace_read_only", apart(READ_ONLY, "--cgroup"), False, False),
    ("own_namespace_mount_of_host", apart("true", "--cgroup"), False, False),
    ("not_mounted", apart("umount -l /sys/fs/cgroup"), False, False),
    ("root_group", shell('echo $$ >/sys/fs/cgroup/cgroup.procs && exec "$@"'), True, False),
]


def main():
    """Each place: doctor there, then a job there."""
    let_in()
    for name, place, expected, short in PLACES:
        if short or not SETTINGS["fast"]:
            visit(f"contexts.{name}", place, expected)


def let_in():
    """Root may log in as either."""
    if not KEY.exists():
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", KEY)
    for home, user in (("/root", "root"), ("/home/worker", "worker")):
        folder = pathlib.Path(home, ".ssh")
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / "authorized_keys").write_text(KEY.with_suffix(".pub").read_text())
        host.run("chown", "-R", f"{user}:", folder)
    host.run("systemctl", "start", "ssh")


def visit(name, place, expected):
    """One place."""
    told = host.run(*place([WORKER, "doctor", "--json"]), stderr=None)
    try:
        found = {each["name"]: each for each in json.loads(told.stdout)["checks"]}["cgroups"]
    except (ValueError, KeyError):
        check(name, False, f"doctor said: {told.stdout}")
        return
    left = host.groups()
    ran = host.run(*place([WORKER, "exec", "--json", "--job", json.dumps(JOB), *patience()]), stderr=None)
    try:
        status = json.loads(ran.stdout)["status"]
    except ValueError:
        status = ran.stdout
    left += host.groups()
    # Without control groups it depends on whether the worker counts in the moment in which all are there.
    true = status == "memory_limit" or (status == "succeeded" and not found["ok"])
    note = f"{'there' if found['ok'] else 'not there'}: {found['detail']}; a job: {status}"
    if not check(name, found["ok"] == expected and true and not left, note + (f"; LEFT BEHIND {left}" if left else "")):
        say(f"the job's worker ended with {ran.returncode}; the last of the journal:")
        say(host.run("journalctl", "-n", "20", "-o", "short-monotonic", "--no-pager").stdout)


def patience():
    """A worker's settings on a slow machine."""
    return ["--set", f"sandbox.start_timeout_ms={int(10_000 * SLOW)}"]

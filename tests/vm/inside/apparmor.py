"""AppArmor that denies user namespaces, as Ubuntu does for programs without a profile: what `doctor` says of it to a
user and to root, and whether its remedy is one. As root, for Debian 13 with its stock kernel.
"""

import json
import pathlib

import host
from report import SLOW, WORKER, check, say, skip

PROFILE = pathlib.Path("/etc/apparmor.d/sandpiper")
RESTRICTED = pathlib.Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
# What the kernel's AppArmor mediates about namespaces.
MASK = pathlib.Path("/sys/kernel/security/apparmor/features/namespaces/mask")
# All that an unconfined program may do, but for making user namespaces; that too; and the profile of deploy/README.md.
DENIED = "abi <abi/4.0>,\nprofile sandpiper {worker} flags=(attach_disconnected) {{ allow all, audit deny userns, }}\n"
REMEDIES = {
    "by_a_rule": "abi <abi/4.0>,\nprofile sandpiper {worker} flags=(attach_disconnected) {{ allow all, userns, }}\n",
    "by_the_profile": "abi <abi/4.0>,\nprofile sandpiper {worker} flags=(unconfined) {{ userns, }}\n",
}


def main():
    """Denied, then allowed; to a user and to root."""
    enabled = pathlib.Path("/sys/module/apparmor/parameters/enabled")
    if not enabled.exists() or enabled.read_text().strip() != "Y":
        skip("apparmor", "this kernel runs without AppArmor")
        return
    if not MASK.exists() or "userns_create" not in MASK.read_text():
        skip("apparmor", "the AppArmor of this kernel does not mediate user namespaces")
        return
    say(f"{RESTRICTED.name}: {RESTRICTED.read_text().strip() if RESTRICTED.exists() else 'not in this kernel'}")
    for user in ("worker", "root"):
        load(DENIED)
        say(host.service(user, [WORKER, "doctor"]).stdout)
        found, status = tried(user)
        # `exec` does as well as it can: root makes the other namespaces without.
        denied = not found["ok"] and (user == "root" or status != "succeeded")
        check(f"apparmor.{user}.is_denied", denied, f"{found['detail']}; a job: {status}")
        check(f"apparmor.{user}.is_named", "AppArmor" in found["remedy"], f"{found['detail']}; {found['remedy']}")
        say(host.run("journalctl", "-k", "-n", "3", "-o", "cat", "--no-pager", "--grep", "apparmor=").stdout)
        for name, profile in REMEDIES.items():
            load(profile)
            found, status = tried(user)
            remedied = found["ok"] and status == "succeeded"
            check(f"apparmor.{user}.is_remedied_{name}", remedied, f"{found['detail']}; a job: {status}")
    host.run("apparmor_parser", "--remove", PROFILE)


def load(profile):
    """A profile of the worker."""
    PROFILE.write_text(profile.format(worker=WORKER))
    loaded = host.run("apparmor_parser", "--replace", "--skip-cache", PROFILE)
    if loaded.returncode:
        raise RuntimeError(f"the profile cannot be loaded: {loaded.stdout}")


def tried(user):
    """What doctor found, and the status of a job; none where the worker does not start."""
    told = host.service(user, [WORKER, "doctor", "--json"], stderr=None)
    found = {each["name"]: each for each in json.loads(told.stdout)["checks"]}["user_namespaces"]
    job = json.dumps({"code": "print(1)", "timeout_ms": int(min(5000 * SLOW, 300_000))})
    patience = ["--set", f"sandbox.start_timeout_ms={int(10_000 * SLOW)}"]
    ran = host.service(user, [WORKER, "exec", "--json", "--job", job, *patience])
    say(ran.stdout[-600:])
    try:
        return found, json.loads(ran.stdout.splitlines()[-1])["status"]
    except (ValueError, IndexError):
        return found, None

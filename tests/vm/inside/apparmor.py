"""AppArmor that denies user namespaces, as Ubuntu does for programs without a profile: what `doctor` says of it to a
user and to root, and whether its remedy is one. As root, for Debian 13 with its stock kernel.
"""

import json
import pathlib

import host
from report import SLOW, WORKER, check, say, skip

PROFILE = pathlib.Path("/etc/apparmor.d/sandpiper")
RESTRICTED = pathlib.Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
# All that an unconfined program may do, but for making user namespaces, or with that.
TEXT = """abi <abi/4.0>,
profile sandpiper {worker} flags=(attach_disconnected) {{
  allow all,
  {userns}
}}
"""


def main():
    """Denied, then allowed; to a user and to root."""
    enabled = pathlib.Path("/sys/module/apparmor/parameters/enabled")
    if not enabled.exists() or enabled.read_text().strip() != "Y":
        skip("apparmor", "this kernel runs without AppArmor")
        return
    if "userns_create" not in features():
        skip("apparmor", f"the AppArmor of this kernel does not mediate user namespaces: {features()}")
        return
    say(f"{RESTRICTED.name}: {RESTRICTED.read_text().strip() if RESTRICTED.exists() else 'not in this kernel'}")
    for user in ("worker", "root"):
        load("audit deny userns,")
        say(host.service(user, [WORKER, "doctor"]).stdout)
        found, status = tried(user)
        denied = not found["ok"] and status in (None, "worker_error")
        check(f"apparmor.{user}.is_denied", denied, f"{found['detail']}; a job: {status}")
        named = "apparmor" in (found["detail"] + found["remedy"]).lower()
        check(f"apparmor.{user}.is_named", named, f"{found['detail']}; {found['remedy']}")
        say(host.run("journalctl", "-k", "-n", "3", "-o", "cat", "--no-pager", "--grep", "apparmor=").stdout)
        load("userns,")
        found, status = tried(user)
        check(f"apparmor.{user}.is_remedied", found["ok"] and status == "succeeded", f"{found['detail']}; a job: {status}")
    host.run("apparmor_parser", "--remove", PROFILE)


def features():
    """What the kernel's AppArmor can say of namespaces."""
    folder = pathlib.Path("/sys/kernel/security/apparmor/features/namespaces")
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []


def load(userns):
    """The profile of the worker, with this about user namespaces."""
    PROFILE.write_text(TEXT.format(worker=WORKER, userns=userns))
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

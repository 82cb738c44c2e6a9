"""Runs the worker's sandbox in real containers, made by runc with deploy/seccomp.json and the settings that the
Kubernetes manifests and the compose file give the worker: its user, capabilities, /proc and read-only root.

What an engine adds (images, networks, its own daemon) is not here, and neither is AppArmor or SELinux.
"""
import json
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

# AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: what the worker's and its jobs' own sockets are.
FAMILIES = (1, 2, 10, 16)
# The groups of deploy/seccomp.json that exist for the worker, and not for every container.
WALLS = {"unshare", "setns", "mount", "mount_setattr", "umount2", "pivot_root", "sethostname"}
ENOSYS = 38
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
# tests/run puts it there.
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parents[2] / "target"))
DOCKER_PROFILE = TARGET / "deploy/docker-seccomp.json"

GREETING = "import os, threading\nthread = threading.Thread(target=print, args=['hello'])\nthread.start()\nthread.join()\n"
FORBIDDEN = "import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\nprint('not reached')\n"
ENDLESS = '{"code": "while True: pass", "timeout_ms": 300}'

# Each step ends the container with its own number.
STEPS = """
sandpiper doctor >/tmp/doctor || { cat /tmp/doctor; exit 10; }
grep -q "%(layers)s" /tmp/doctor || { cat /tmp/doctor; exit 11; }
test "$(sandpiper exec /programs/greeting.py)" = hello || exit 12
%(warm)s
sandpiper exec /programs/forbidden.py 2>/tmp/forbidden; test $? = 126 || exit 14
grep -q 'system call ptrace' /tmp/forbidden || { cat /tmp/forbidden; exit 15; }
sandpiper exec --job /programs/endless.json 2>/dev/null; test $? = 124 || exit 16
exit 42
"""
WARM = 'test "$(sandpiper exec --warm /programs/greeting.py)" = hello || exit 13'


def specification(place, worker, profile, script, uid=64200, capabilities=(), unmasked=False, own_users=False,
                  escalates=False, environment=()):
    """An OCI bundle in `place`, on the machine's own /usr."""
    root = place / "root"
    for name in ("usr", "etc", "proc", "sys", "dev", "tmp", "opt/sandpiper", "programs"):
        (root / name).mkdir(parents=True)
    # What is mounted there takes this over.
    (root / "tmp").chmod(0o1777)
    (place / "programs").mkdir()
    (place / "programs/greeting.py").write_text(GREETING)
    (place / "programs/forbidden.py").write_text(FORBIDDEN)
    (place / "programs/endless.json").write_text(ENDLESS)
    subprocess.run(["runc", "spec", "--bundle", place], check=True)
    spec = json.loads((place / "config.json").read_text())
    held = ["CAP_" + name for name in capabilities]
    variables = {"PATH": "/opt/sandpiper:/usr/sbin:/usr/bin:/sbin:/bin", **dict(environment)}
    spec["process"] |= {
        "terminal": False, "args": ["sh", "-c", script], "cwd": "/", "user": {"uid": uid, "gid": uid},
        "noNewPrivileges": not escalates, "env": [f"{name}={value}" for name, value in variables.items()],
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), held),
    }
    spec["process"].pop("rlimits", None)
    spec["root"] = {"path": str(root), "readonly": True}
    linux = spec["linux"]
    linux["seccomp"] = profile
    # As Docker and Kubernetes have it on version 2; runc's own example has none.
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] != "cgroup"] + [{"type": "cgroup"}]
    if unmasked:
        del linux["maskedPaths"], linux["readonlyPaths"]
    if own_users:
        linux["namespaces"].append({"type": "user"})
        linux["uidMappings"] = linux["gidMappings"] = [{"containerID": 0, "hostID": 1_000_000, "size": 65_536}]
    binds = [("/usr", "/usr"), ("/etc", "/etc"), (place / "programs", "/programs")]
    for file in (worker, worker.with_name("libsandpiper_shim.so")):
        inside = f"opt/sandpiper/{file.name}"
        (root / inside).touch()
        binds.append((file, "/" + inside))
    for name in ("bin", "sbin", "lib", "lib64"):
        if (Path("/") / name).is_symlink():
            (root / name).symlink_to(os.readlink(Path("/") / name))
        elif (Path("/") / name).exists():
            (root / name).mkdir()
            binds.append((Path("/") / name, "/" + name))
    spec["mounts"] += [{"destination": inside, "source": str(outside), "type": "bind", "options": ["rbind", "ro"]}
                       for outside, inside in binds]
    spec["mounts"].append({"destination": "/tmp", "source": "tmpfs", "type": "tmpfs",
                           "options": ["nosuid", "nodev", "mode=1777", "size=16m"]})
    (place / "config.json").write_text(json.dumps(spec))


def contain(worker, profile, script, **settings):
    """The exit code of a script in such a container, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="sandpiper-container.") as place:
        place = Path(place)
        # Others must get at the root as well: in a user namespace of its own the container is one of them.
        place.chmod(0o755)
        specification(place, worker, profile, script, **settings)
        runc = ["runc", "--root", str(place / "state")]
        try:
            ended = subprocess.run([*runc, "run", "--bundle", str(place), place.name], stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        finally:
            subprocess.run([*runc, "delete", "--force", place.name], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
        return ended.returncode, ended.stdout


def of_pod(document):
    """The settings of the worker's container in a Deployment."""
    pod = document["spec"]["template"]["spec"]
    container = pod["containers"][0]
    security = container["securityContext"]
    variables = {one["name"]: one.get("value", "name") for one in container["env"]}
    return {
        "uid": pod["securityContext"]["runAsUser"],
        "capabilities": security["capabilities"].get("add", []),
        "unmasked": security.get("procMount") == "Unmasked",
        "own_users": pod.get("hostUsers") is False,
        "escalates": security["allowPrivilegeEscalation"],
        "environment": {name: value for name, value in variables.items() if "SANDBOX" in name},
    }


def of_service(service):
    """The settings of the worker's container in the compose file; its user is the image's."""
    variables = service["environment"]
    return {
        "unmasked": "systempaths=unconfined" in service["security_opt"],
        "environment": {name: value for name, value in variables.items() if "SANDBOX" in name},
    }


def named(profile, action):
    """The calls that a profile gives this answer to, whatever their arguments."""
    return {name for entry in profile["syscalls"] if entry["action"] == action for name in entry["names"]}


def check(deploy, worker, documents, want, run):
    profile = json.loads((deploy / "seccomp.json").read_text())
    want("architectures" in profile and "archMap" not in profile,
         "seccomp.json: Kubernetes hands it to the runtime as it is, which knows no archMap")
    for entry in profile["syscalls"]:
        want(entry.get("comment"), f"seccomp.json: no reason for {entry['names'][:3]}")
        want(not {"includes", "excludes"} & entry.keys(), "seccomp.json: the runtime would not look at a condition")
    want({entry["action"] for entry in profile["syscalls"]} == {"SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"},
         "seccomp.json: another action than to allow or to answer with an errno")
    families = [entry["args"] for entry in profile["syscalls"] if "socket" in entry["names"]]
    want(families == [[{"index": 0, "value": family, "op": "SCMP_CMP_EQ"}] for family in FAMILIES],
         "seccomp.json: sockets of other families than AF_UNIX, AF_INET, AF_INET6 and AF_NETLINK")
    refused = named(profile, "SCMP_ACT_ERRNO")
    # An engine may ignore the default errno, and nobody falls back to an older call after EPERM.
    want(profile["defaultErrnoRet"] == ENOSYS and all(entry["errnoRet"] == ENOSYS for entry in profile["syscalls"]
                                                      if entry["action"] == "SCMP_ACT_ERRNO"),
         "seccomp.json: what it does not allow is not answered by ENOSYS")
    known = {call["name"] for machine in ("x86_64", "aarch64") for call in
             json.loads(run(worker, "policy", "--json", "--arch", machine, env={}))["syscalls"]}
    want(not refused & named(profile, "SCMP_ACT_ALLOW"), "seccomp.json: a call is allowed and refused")
    unnamed = known - refused - named(profile, "SCMP_ACT_ALLOW")
    want(not unnamed, f"seccomp.json leaves {sorted(unnamed)} to the engine's own default")

    base, *others = (set(entry["names"]) for entry in profile["syscalls"] if entry["action"] == "SCMP_ACT_ALLOW")
    for default in (DEFAULT_PROFILE, DOCKER_PROFILE):
        # Docker asks for nothing but a kernel, 4.8, where it gives ptrace to containers without capabilities.
        usual = {name for entry in json.loads(default.read_text())["syscalls"]
                 if entry["action"] == "SCMP_ACT_ALLOW" and not entry.get("args")
                 and not (entry.get("includes") or {}).keys() - {"minKernel"} for name in entry["names"]}
        want(base <= usual, f"seccomp.json: {sorted(base - usual)} of its base is not in {default}")
    want(set().union(*others) == WALLS | {"clone", "socket", "arch_prctl"},
         "seccomp.json: what it allows beyond its base is not what this test knows to be needed")

    example = of_pod(documents(deploy, "overlays/example")[0]["Deployment"])
    ordinary = of_service(yaml.safe_load((deploy / "compose.yaml").read_text())["services"]["worker"])
    contexts = {
        # Docker's and Kubernetes' default /proc: jobs have none.
        "kubernetes/base": (of_pod(documents(deploy, "base")[0]["Deployment"]), "^without  proc "),
        "kubernetes/overlays/example": (example, "^ok       several_uids"),
        "compose.yaml": (ordinary, "^ok       proc "),
    }
    for name, (settings, layers) in contexts.items():
        code, said = contain(worker, profile, STEPS % {"layers": layers, "warm": WARM}, **settings)
        want(code == 42, f"a container with seccomp.json and the settings of {name} ends with {code}:\n{said}")

    # Root in a pod whose uids do not reach to the default sandbox.uid_base: no worker, instead of failing jobs.
    lost = example | {"environment": {}}
    code, said = contain(worker, profile, "sandpiper exec /programs/greeting.py || sandpiper doctor", **lost)
    want(code == 1 and "sandbox.uid_base: the ids 2000000 to" in said and "MISSING  several_uids" in said,
         f"a worker whose sandbox.uid_base is outside of its user namespace says ({code}):\n{said}")

    # Nothing is in it that need not be: without any one of them a job cannot start. One has a substitute, which makes
    # each mount read-only by itself: mount_setattr, which Linux has from 5.12 on.
    for name in sorted(WALLS):
        less = profile | {"syscalls": [entry | {"names": [one for one in entry["names"] if one != name]}
                                       for entry in profile["syscalls"] if entry["names"] != [name]]}
        code, said = contain(worker, less, WARM.replace("|| exit 13", "&& exit 42"), **ordinary)
        want((code == 42) == (name == "mount_setattr"),
             f"without {name} in seccomp.json a container ends with {code}:\n{said}")

#!/usr/bin/env python3
"""The image, the seccomp profile and compose.yaml in real container engines: private ones (private_engine.py), with
images made of Debian's packages (images.py).

    engines.py                            Docker of Debian 12 (20.10), with a sample of the attack fixtures
    engines.py --all                      the same with every one of them, each cold and warm
    engines.py --prepare                  only what these take time to make: the engine, base images, the image
    engines.py --optimised                the image as it is shipped, which takes some minutes more to build
    engines.py --engine docker-trixie     Docker of Debian 13 (26.1)
    engines.py --engine podman            Podman of Debian 12 (4.3), rootless, with the image that Docker built last

The commands are those of deploy/README.md and of the head of deploy/compose.yaml, read from there. Needs root on
Debian, Rust, SP_TEST_BIN (the worker) and SP_TEST_SANDBOX (the binary of the test `sandbox`); tests/run has them.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import tempfile

import composed
import images
from private_engine import CACHE, Docker, Podman, debian_package, run, say, the_only_one, with_packages

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
WORKER = pathlib.Path(os.environ.get("SP_TEST_BIN", REPOSITORY / "target/debug/sandpiper")).resolve()

# One in so many of the attack fixtures.
SAMPLE = 6

# What the profile allows beyond Docker's own, and why.
WALLS = {"unshare", "setns", "mount", "mount_setattr", "umount2", "pivot_root", "sethostname"}

# Of the kernel's own making, when a process is traced: newer ones let them pass every filter.
PROBES = {"uprobe", "uretprobe"}

# Makes every call that it is told and prints those that are not answered by ENOSYS.
ASK = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
for word in sys.argv[1:]:
    name, number = word.split("=")
    ctypes.set_errno(0)
    libc.syscall(int(number), 0, 0, 0, 0, 0, 0)
    if ctypes.get_errno() != 38:
        print(name, ctypes.get_errno())
"""

# Each part of the sandbox tests in turn, so that one container does for all.
PARTS = """
for part in behaviour files hostile; do /stage/sandbox --test-threads 2 $part:: || failed=$part; done
test -z "$failed"
"""

# How fixtures are run, and what says so to the test program.
WAYS = {"cold": [], "warm": ["--env", "SP_TEST_WARM=1"]}


def want(true, sentence):
    if not true:
        raise AssertionError(sentence)


# --- what the page says

def of_readme():
    """How deploy/README.md builds the image, and the options that it runs it with."""
    page = (REPOSITORY / "deploy/README.md").read_text()
    block = re.search(r"^### Docker and Podman\n.*?^```sh\n(.*?)^```", page, re.M | re.S)[1]
    build, start = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    want(start[:2] == ["docker", "run"] and start[-2:] == ["sandpiper", "doctor"], f"deploy/README.md says {start}")
    return build, start[2:-2]


def without(options, gone):
    """The options less one of them, with what belongs to it."""
    left = " ".join(options)
    want(gone in left, f"deploy/README.md runs the image without {gone}")
    return left.replace(gone, "").split()


# --- the image

def checkout(place):
    """What the build and compose.yaml need, with new times: cargo goes by them, and its cache outlives a build."""
    ignored = (REPOSITORY / "deploy/Containerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    for name in {name for name in kept if not name.startswith("deploy/")} | {"deploy"}:
        source, copy = REPOSITORY / name, place / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, copy_function=shutil.copyfile,
                            ignore=shutil.ignore_patterns("amqp_url", "__pycache__"))
        else:
            shutil.copyfile(source, copy)


class Image:
    """The worker's image in an engine, run with the options of deploy/README.md or with others."""

    def __init__(self, engine, place, options):
        self.engine, self.place, self.options = engine, place, options

    def run(self, arguments, options=None, entrypoint=None, codes=(0,)):
        """What such a container prints, and it must end with one of these codes."""
        options = self.options if options is None else options
        chosen = ["--entrypoint", entrypoint] if entrypoint else []
        command = self.engine.inside("env", f"--chdir={self.place}", *self.engine.CLIENT, "run",
                                     *self.engine.BESIDES, *options, *chosen, "sandpiper", *arguments)
        return run(command, codes=codes)

    def doctor(self, options=None):
        """The layers by name."""
        found = json.loads(self.run(["doctor", "--json"], options, codes=(0, 1)))
        return found["ready"], {check["name"]: check for check in found["checks"]}


# --- the profile

def named(action, profile=None):
    """The calls that deploy/seccomp.json, or another profile, gives this answer to."""
    profile = profile or json.loads((REPOSITORY / "deploy/seccomp.json").read_text())
    return {name for entry in profile["syscalls"] if entry["action"] == action for name in entry["names"]}


def refusals(image):
    """Whatever the profile does not allow answers as if the kernel did not have it."""
    refused = named("SCMP_ACT_ERRNO")
    known = json.loads(run([WORKER, "policy", "--json"], env={}))["syscalls"]
    asked = [f"{call['name']}={call['number']}" for call in known if call["name"] in refused - PROBES]
    want(len(asked) > 50, f"only {len(asked)} calls to ask for")
    said = image.run(["-I", "-c", ASK, *asked], entrypoint="python3")
    want(said == "", f"these calls are not answered by ENOSYS (name, errno):\n{said}")
    say(f"{len(asked)} calls that the profile refuses answer with ENOSYS")


def width(engine):
    """Nothing is allowed that the engine's own profile refuses, but for the walls."""
    wider = named("SCMP_ACT_ALLOW") - named("SCMP_ACT_ALLOW", engine.own_profile()) - WALLS
    want(not wider, f"deploy/seccomp.json allows more than the engine's own profile: {sorted(wider)}")
    say("the profile allows no more than the engine's own, but for the walls")


# --- what doctor says when an option is missing

def remedies(image):
    seccomp, unmasked = "--security-opt seccomp=deploy/seccomp.json", f"--security-opt {image.engine.UNMASKED}"
    bare = without(image.options, seccomp)
    # What Docker 20.10 made of the profile when it left clone3 to the default.
    older = json.loads((REPOSITORY / "deploy/seccomp.json").read_text()) | {"defaultErrnoRet": 1}
    older["syscalls"] = [entry for entry in older["syscalls"] if entry["action"] == "SCMP_ACT_ALLOW"]
    (image.place / "older.json").write_text(json.dumps(older))
    cases = [("the engine's own seccomp profile", bare, layer, seccomp) for layer in ("user_namespaces", "pivot_root")
             if image.engine.STRICT]
    cases += [
        ("/proc masked", without(image.options, unmasked), "proc", unmasked),
        ("root without capabilities", [*image.options, "--user", "0:0"], "user_namespaces", "--cap-add SETFCAP"),
        ("an older profile", [*bare, "--security-opt", "seccomp=older.json"], "environments.default", seccomp),
    ]
    for what, options, layer, remedy in cases:
        check = image.doctor(options)[1][layer]
        want(not check["ok"] and remedy in check["remedy"], f"with {what} doctor says: {check}")
        say(f"with {what}, {layer}: {check['detail']}; remedy: {check['remedy']}")
    enough = {"every option": image.options} | ({} if image.engine.STRICT else {"its own profile": bare})
    for what, options in enough.items():
        ready, found = image.doctor(options)
        want(ready and found["proc"]["ok"], f"with {what} doctor says: {found}")
        say(f"with {what} a worker would start, and jobs have a /proc")


# --- the fixtures

def told(expected):
    """The calls that a fixture wants to see named in the result."""
    calls = {expected.get("syscall"), *expected.get("blocked", []), *(expected.get("blocked_exactly") or [])}
    return calls.union(*map(told, expected.get("any", [])))


def sampled(lines, step, first=0):
    """One in so many, with the cases that these want to be run right before them."""
    chosen = lines[first::step]
    before = {json.loads(line).get("after") for line in chosen}
    return [line for line in lines if line in chosen or json.loads(line)["name"] in before]


# `socket` by another ABI: the engine's filter refuses all but four families there as well.
BY_FAMILY = {"x32_41"}


def staged(place, every, turn):
    """Copies the fixtures of one way to run them, and says how many of them are there."""
    shutil.copytree(REPOSITORY / "tests/fixtures", place)
    refused = named("SCMP_ACT_ERRNO")
    expected = 0
    for file in sorted(place.rglob("*.jsonl")):
        lines = file.read_text().splitlines()
        if file.parent.name == "hostile" and not every:
            lines = sampled(lines, SAMPLE)
        # The engine's filter is before ours: what it refuses is never seen there, and so cannot be told.
        lines = [line for line in lines if not refused & told(json.loads(line).get("assert", {}))
                 and json.loads(line)["name"] not in BY_FAMILY]
        if not every:
            lines = sampled(lines, len(WAYS), turn)
        file.write_text("".join(f"{line}\n" for line in lines))
        if file.parent.name == "hostile" or file.stem in ("behaviour", "files"):
            expected += len(lines)
    return expected


def fixtures(image, every):
    """What jobs may do and what they must not, with the worker of the image: each cold and warm, or in turn."""
    stage = image.place / "stage"
    expected = {way: staged(stage / way, every, turn) for turn, way in enumerate(WAYS)}
    shutil.copy(os.environ["SP_TEST_SANDBOX"], stage / "sandbox")
    run(["chmod", "--recursive", "a+rX", stage])
    for way, setting in WAYS.items():
        said = image.run(["-c", PARTS], entrypoint="sh", options=[
            *image.options, *setting, "--volume", f"{stage}:/stage:ro", "--env", f"SP_TEST_FIXTURES=/stage/{way}",
            "--env", "SP_TEST_BIN=/opt/sandpiper/sandpiper",
            # What is looked for here is not how fast the image is, and this machine may be busy with other tests.
            "--env", "SP_TEST_SLOW=3"])
        passed, ignored = (sum(map(int, re.findall(rf"(\d+) {word};", said))) for word in ("passed", "ignored"))
        want(passed + ignored == expected[way] and passed > expected[way] * 0.9,
             f"{passed} fixtures passed and {ignored} were ignored, {expected[way]} are there:\n{said}")
        skipped = re.findall(r"SKIPPED: .*", said)
        # A container has no control groups of its own; all else is there.
        beyond = [line for line in skipped if "there is no cgroups here" not in line]
        want(not beyond, "skipped in the container:\n" + "\n".join(beyond))
        say(f"{way}: {passed} fixtures passed, {len(skipped)} of them for want of control groups not tried")


# --- all of it

def docker_of(suite, place):
    """Debian's Docker Engine, with Compose 2, which Debian has from 13 on."""
    # What is one package in Debian 12 is three in 13.
    others = [] if suite == "bookworm" else ["docker-cli", "docker-buildx"]
    root = with_packages(f"docker-{suite}", suite, ["docker.io", *others, "iptables", "iproute2", "slirp4netns"])
    plugin = "usr/libexec/docker/cli-plugins/docker-compose"
    (root / plugin).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(debian_package("trixie", "docker-compose") / plugin, root / plugin)
    return Docker(root, CACHE / f"docker-{suite}.data", place)


def docker(suite, place, every, optimised, prepare):
    with docker_of(suite, place) as engine:
        build, options = of_readme()
        say("Docker " + engine.client("version", "--format", "{{.Server.Version}}").strip() + ", Compose "
            + engine.client("compose", "version", "--short").strip())
        with engine.way_out():
            images.provide(engine, REPOSITORY, optimised)
            say(f"building: {shlex.join(build)}")
            run(engine.inside("env", f"--chdir={place}", *build))
        if prepare:
            return
        image = Image(engine, place, options)
        width(engine)
        refusals(image)
        remedies(image)
        fixtures(image, every)
        composed.check(engine, place, WORKER)


def built_last():
    """The suite whose Docker built or was given an image last."""
    found = [*CACHE.glob("docker-*.data/image/*/repositories.json")]
    want(found, "no Docker has built the image yet: run with --prepare first")
    last = max(found, key=lambda path: path.stat().st_mtime_ns).relative_to(CACHE).parts[0]
    return last.removeprefix("docker-").removesuffix(".data")


def podman(place, every):
    archive = place / "sandpiper.tar"
    with docker_of(built_last(), place) as engine:
        engine.client("save", "--output", archive, "sandpiper")
    archive.chmod(0o644)
    packages = ["podman", "crun", "uidmap", "iptables", "iproute2", "slirp4netns"]
    root = with_packages("podman-bookworm", "bookworm", packages)
    with Podman(root, CACHE / "podman-bookworm.data", place) as engine:
        say(engine.client("--version").strip())
        engine.client("load", "--input", archive)
        _, options = of_readme()
        image = Image(engine, place, [*without(options, f"--security-opt {Docker.UNMASKED}"),
                                      "--security-opt", engine.UNMASKED])
        refusals(image)
        remedies(image)
        fixtures(image, every)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["docker", "docker-trixie", "podman"], default="docker")
    parser.add_argument("--all", action="store_true", help="every attack fixture, each cold and warm")
    parser.add_argument("--prepare", action="store_true", help="make what is missing, and run nothing")
    parser.add_argument("--optimised", action="store_true", help="build the image as it is shipped")
    arguments = parser.parse_args()
    if arguments.prepare and arguments.engine == "podman":
        parser.error("--prepare is for Docker: Podman runs the image that it built")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    with the_only_one(), tempfile.TemporaryDirectory(prefix="sandpiper-engine.", dir="/var/tmp") as place:
        place = pathlib.Path(place)
        # Containers run as others.
        place.chmod(0o755)
        checkout(place)
        if arguments.engine == "podman":
            podman(place, arguments.all)
        else:
            suite = "trixie" if arguments.engine == "docker-trixie" else "bookworm"
            docker(suite, place, arguments.all, arguments.optimised, arguments.prepare)
    say("prepared" if arguments.prepare else "passed")


if __name__ == "__main__":
    main()

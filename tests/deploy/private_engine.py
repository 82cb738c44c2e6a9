"""A container engine of a test's own, whatever engine the machine has: its programs come from a Debian root that is
made by debootstrap, and it runs in mount, pid and network namespaces of its own.

So every bridge, firewall rule, mount and process of it is gone when its first process is; only control groups are
outside, under one name, and are removed here. Containers reach nothing but each other. While something is built
or installed there is a way out of the network namespace (slirp4netns), which changes nothing on the machine.

Roots, images and the build cache are kept under SP_TEST_ENGINES (/var/tmp/sandpiper-engines, some 5 GB) for the
next run; removing it is always safe when no test runs.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

CACHE = pathlib.Path(os.environ.get("SP_TEST_ENGINES", "/var/tmp/sandpiper-engines"))
AUTHORITIES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
NO_SERVICES = "#!/bin/sh\nexit 101\n"
GROUP = "sandpiper-engine"
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# The first process of the engine's namespaces: makes the root its own and waits for the engine. $1 is the root, $2
# what the engine keeps, $3 the directory that is the same inside and outside; the rest is the engine's command.
FIRST = r"""
root=$1 kept=$2 shared=$3
shift 3
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t sysfs sysfs "$root/sys"
mount --rbind /sys/fs/cgroup "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir -p "$root/var/lib/docker" "$root$shared"
mount --bind "$kept" "$root/var/lib/docker"
mount --bind "$shared" "$root$shared"
cat /etc/resolv.conf >"$root/etc/resolv.conf"
mkdir -p "$root/mnt/outside"
cd "$root"
pivot_root . mnt/outside
umount -l /mnt/outside
ip link set lo up
"$@" &
wait
"""


BEGAN = time.monotonic()


def say(sentence):
    print(f"{time.monotonic() - BEGAN:5.0f} s  {sentence}", flush=True)


def await_true(what, condition, seconds=60):
    """The first true value of the condition, or the test ends."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} s: {what}")


def run(command, codes=(0,), **options):
    """The output of a command that must end with one of these codes."""
    options = {"stdin": subprocess.DEVNULL, "timeout": 1800} | options
    ended = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           text=True, errors="replace", **options)
    if ended.returncode not in codes:
        raise AssertionError(f"{' '.join(map(str, command))} ends with {ended.returncode}:\n{ended.stdout[-6000:]}")
    return ended.stdout


@contextlib.contextmanager
def the_only_one():
    """Two runs would share roots and images."""
    CACHE.mkdir(parents=True, exist_ok=True)
    found = CACHE.lstat()
    # Programs are taken from there and run as root.
    alone = found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    assert alone, f"{CACHE} is a link, or somebody else's, or others can write to it; name another: SP_TEST_ENGINES"
    with open(CACHE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AssertionError(f"another run uses {CACHE}") from None
        yield


# --- Debian roots

def mirror():
    """Where this machine's own packages come from."""
    listed = run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(COMPONENT) $(REPO_URI) $(CODENAME)",
                  "Created-By: Packages"])
    found = [line.split() for line in listed.splitlines()]
    found = [words[2] for words in found if words[:2] == ["Debian", "main"] and len(words) == 4
             and "-" not in words[3]]
    assert found, "apt-get knows no Debian mirror; is this Debian, and was `apt-get update` run?"
    return found[0]


def debian(suite):
    """A minimal system of that suite."""
    root = CACHE / suite
    if root.exists():
        return root
    if not shutil.which("debootstrap"):
        run(["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-qy", "--no-install-recommends", "debootstrap"],
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    part = CACHE / f"{suite}.part"
    shutil.rmtree(part, ignore_errors=True)
    say(f"making a minimal Debian {suite}")
    # In namespaces of its own, so that neither a mount nor a process of an installation stays.
    run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "debootstrap", "--variant=minbase", suite, part,
         mirror()])
    run(["chroot", part, "apt-get", "clean"])
    # As in Debian's own image: what is installed starts nothing.
    policy = part / "usr/sbin/policy-rc.d"
    policy.write_text(NO_SERVICES)
    policy.chmod(0o755)
    if AUTHORITIES.exists():
        # Where this machine trusts an authority of its own, what is built here must do so as well.
        inside = part / AUTHORITIES.relative_to("/")
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(AUTHORITIES, inside)
    part.rename(root)
    return root


def with_packages(name, suite, packages):
    """A system of that suite with these packages."""
    root, made_of = CACHE / name, " ".join([suite, *packages])
    if root.exists() and (root / "made-of").read_text() == made_of:
        return root
    shutil.rmtree(root, ignore_errors=True)
    base = debian(suite)
    part = CACHE / f"{name}.part"
    shutil.rmtree(part, ignore_errors=True)
    run(["cp", "-a", "--reflink=auto", base, part])
    shutil.copy("/etc/resolv.conf", part / "etc/resolv.conf")
    say(f"installing {' '.join(packages)} of Debian {suite} into a root of its own")
    run(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc", """
         mount -t proc proc "$1/proc"
         export DEBIAN_FRONTEND=noninteractive
         chroot "$1" apt-get update -q
         root=$1; shift
         chroot "$root" apt-get install -qy --no-install-recommends "$@"
         chroot "$root" apt-get clean""", "sh", part, *packages], env={"PATH": SEARCH})
    (part / "made-of").write_text(made_of)
    part.rename(root)
    return root


def debian_package(suite, package):
    """The files of one package of another suite, without what it depends on."""
    root = CACHE / f"{package}-{suite}"
    if root.exists():
        return root
    place = CACHE / f"{package}-{suite}.part"
    shutil.rmtree(place, ignore_errors=True)
    for folder in ("lists/partial", "cache/archives/partial", "etc", "files"):
        (place / folder).mkdir(parents=True)
    (place / "status").touch()
    signed = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (place / "etc/sources.list").write_text(f"deb [signed-by={signed}] {mirror()} {suite} main\n")
    (place / "apt.conf").write_text(
        f'Dir::State "{place}";\nDir::State::status "{place}/status";\nDir::State::lists "{place}/lists";\n'
        f'Dir::Cache "{place}/cache";\nDir::Etc::sourcelist "{place}/etc/sources.list";\n'
        'Dir::Etc::sourceparts "-";\n')
    say(f"fetching {package} of Debian {suite}")
    environment = os.environ | {"APT_CONFIG": str(place / "apt.conf")}
    run(["apt-get", "update", "-q"], env=environment)
    run(["apt-get", "download", "-q", package], env=environment, cwd=place)
    [archive] = place.glob("*.deb")
    run(["dpkg", "-x", archive, place / "files"])
    (place / "files").rename(root)
    shutil.rmtree(place)
    return root


# --- the engine

def of_parent(parent):
    """The process whose parent this is, if it is there."""
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(status.read_text().rpartition(")")[2].split()[1]) == parent:
                return int(status.parent.name)
    return None


class Engine:
    """Namespaces with a root of Debian's, and in them whatever `command` starts."""

    # Its client, how that names an unmasked /proc, and what each run needs besides.
    CLIENT, UNMASKED, BESIDES = [], "", []
    # Its own seccomp profile refuses what the walls are built with.
    STRICT = True

    def __init__(self, root, kept, shared):
        self.root, self.kept, self.shared = root, kept, shared

    def __enter__(self):
        self.kept.mkdir(parents=True, exist_ok=True)
        # Of a run that was killed.
        self.clear_groups()
        self.log = open(self.shared / "engine.log", "w")
        # A test that is killed takes it along.
        self.outer = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--net", "--fork", "--kill-child",
             "--propagation", "private", "sh", "-euc", FIRST, "sh", self.root, self.kept, self.shared, *self.command()],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            env={"PATH": SEARCH})
        try:
            self.first = await_true("the engine's first process", lambda: of_parent(self.outer.pid))
            await_true("the engine answers", self.answers)
        except BaseException:
            self.__exit__()
            say("".join(open(self.log.name).readlines()[-30:]))
            raise
        return self

    def __exit__(self, *_):
        # Whatever is in the pid namespace dies with its first process.
        self.outer.kill()
        self.outer.wait()
        self.log.close()
        self.clear_groups()
        with contextlib.suppress(OSError):  # where it ended before it had one
            (self.root / self.shared.relative_to("/")).rmdir()

    def clear_groups(self):
        def cleared():
            tops = [path for where in ("", "*/") for path in pathlib.Path("/sys/fs/cgroup").glob(where + GROUP)]
            for folder in sorted((f for top in tops for f in (top, *top.rglob("*/"))), reverse=True):
                with contextlib.suppress(OSError):  # the last processes may still be dying
                    folder.rmdir()
            return not any(top.exists() for top in tops)
        await_true("the engine's control groups are gone", cleared)

    def answers(self):
        assert self.outer.poll() is None, "the engine's first process has ended"
        return subprocess.run(self.inside(*self.CLIENT, "info"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              stdin=subprocess.DEVNULL, timeout=60).returncode == 0

    def enter(self, network=True):
        """What a command is put behind to run in the engine's namespaces."""
        return ["nsenter", "--target", str(self.first), "--mount", "--pid", *(["--net"] if network else []),
                "env", "-i", f"PATH={SEARCH}", "HOME=/root"]

    def inside(self, *command, **environment):
        """A command in the engine's namespaces, as who may use the engine."""
        pairs = [f"{name}={value}" for name, value in environment.items()]
        return [*self.enter(), *pairs, *(str(word) for word in command)]

    def client(self, *arguments, environment=None, **options):
        """The output of the engine's own client, which must succeed."""
        return run(self.inside(*self.CLIENT, *arguments, **(environment or {})), **options)

    def beside(self, *command):
        """A program of this machine, in the engine's network."""
        return ["nsenter", "--target", str(self.first), "--net", *(str(word) for word in command)]

    @contextlib.contextmanager
    def way_out(self):
        """The containers reach what this machine reaches."""
        slirp = subprocess.Popen(
            [*self.enter(network=False), "slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback",
             "1", "tap0"], stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT)
        try:
            await_true("a way out of the engine's network",
                       lambda: "tap0" in run(self.beside("cat", "/proc/net/route")))
            yield
        finally:
            # nsenter waits for it.
            os.kill(of_parent(slirp.pid), signal.SIGTERM)
            slirp.wait()


class Docker(Engine):
    """A Docker Engine."""

    CLIENT, UNMASKED = ["docker"], "systempaths=unconfined"

    def command(self):
        return ["dockerd", "--data-root", "/var/lib/docker", "--exec-root", "/run/docker",
                "--pidfile", "/run/docker.pid", "--host", "unix:///run/docker.sock",
                "--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", f"/{GROUP}",
                # slirp4netns answers there while there is a way out.
                "--dns", "10.0.2.3"]

    def inside(self, *command, **environment):
        # BuildKit is the default from Docker 23 on; Docker 20.10 must be told, as deploy/README.md says.
        return super().inside(*command, DOCKER_HOST="unix:///run/docker.sock", **environment)

    def own_profile(self):
        """The filter that a container gets without any option, as the runtime is told."""
        container = self.client("run", "--detach", "--entrypoint", "sleep", "sandpiper", "60").strip()
        try:
            bundle = f"/run/docker/containerd/daemon/io.containerd.runtime.v2.task/moby/{container}/config.json"
            return json.loads(run(self.inside("cat", bundle)))["linux"]["seccomp"]
        finally:
            self.client("rm", "--force", container)


class Podman(Engine):
    """Podman without a daemon, for an ordinary user of the root."""

    # Storage is where Docker's would be.
    CLIENT, UNMASKED = ["podman", "--root=/var/lib/docker", "--cgroup-manager=cgroupfs"], "unmask=ALL"
    # It has systemd do health checks and delegate control groups; here is none.
    BESIDES = ["--no-healthcheck", "--cgroups=disabled"]
    STRICT = False
    USER = 1000

    def command(self):
        return ["sh", "-euc", f"""
            touch /etc/subuid /etc/subgid
            id tester >/dev/null 2>&1 || useradd --create-home --uid {self.USER} tester
            chown tester /var/lib/docker
            install --directory --owner tester --mode 700 /run/user/{self.USER}
            # crun refuses a machine with both versions of control groups.
            ! mountpoint --quiet /sys/fs/cgroup/unified || umount /sys/fs/cgroup/unified
            mount --make-rshared /
            # For its networks; the machine's own may be root's alone.
            mknod --mode 666 /run/tun c 10 200
            mount --bind /run/tun /dev/net/tun
            exec sleep infinity"""]

    def inside(self, *command, **environment):
        return super().inside("setpriv", f"--reuid={self.USER}", f"--regid={self.USER}", "--init-groups", "env",
                              "HOME=/home/tester", f"XDG_RUNTIME_DIR=/run/user/{self.USER}", *command, **environment)


if __name__ == "__main__":
    sys.exit("this is a part of engines.py")

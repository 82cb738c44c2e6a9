"""What the benchmarks here share: the machine, what is built and installed for them, a private broker, workers,
the publisher, tables. Everything that is started belongs to a `Stage` and ends with it, however that comes.
"""
import argparse
import contextlib
import json
import os
import pathlib
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
BROKER = ROOT / "deploy" / "broker"
PYTHON = "/usr/bin/python3"
CODE = "print(1)"
CORES = len(os.sched_getaffinity(0))
# An environment with nothing of the caller's: a backtrace of theirs would make an error's message unreadable.
PLAIN = {"PATH": "/usr/local/bin:/usr/bin:/bin", "SP_TEST_RUN": os.environ.get("SP_TEST_RUN", "")}
# What is compared with, as the Python package index has it.
PACKAGES = {"celery": "celery==5.7.0", "numpy": "numpy==1.26.4", "pandas": "pandas==2.2.3"}


class Failed(Exception):
    """The benchmark did not come to its end, or a job did not do what it should."""


# --- the command line


def options(document, **more):
    """The options that all benchmarks have, and `more` of their own: name -> keyword arguments."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", type=pathlib.Path,
                        help="the worker, with the shim and sandpiper-load beside it (otherwise a release build, made first)")
    parser.add_argument("--quick", action="store_true",
                        help="few jobs: shows that everything runs, the figures mean nothing")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    for name, keywords in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args()


def run(main):
    """Runs a benchmark; SIGTERM and Ctrl-C end it the same way, with everything that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {error}")


def say(text):
    print(text, file=sys.stderr, flush=True)


def skip(what, why):
    """What cannot be measured here is said aloud; with CI=true it is a failure."""
    say(f"SKIPPED: {what}: {why}")
    if os.environ.get("CI") == "true":
        raise Failed(f"{what} was skipped, which CI does not allow")


# --- what must be there


def binary(chosen):
    """The worker's binary; beside it are the shim and the publisher, sandpiper-load."""
    if chosen:
        return chosen.resolve()
    command = ["cargo", "build", "--release", "--workspace", "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True)
    return TARGET / "release" / "sandpiper"


def packages(*names):
    """A python that has these; what is missing is installed into target/venv, or where SP_TEST_LIBRARIES has it."""
    home = pathlib.Path(os.environ.get("SP_TEST_LIBRARIES", TARGET / "venv/bin/python")).parent.parent
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run([PYTHON, "-m", "venv", home], check=True)
    there = subprocess.run([python, "-c", f"import {', '.join(names)}"], stderr=subprocess.DEVNULL, check=False)
    if there.returncode != 0:
        say(f"installing {', '.join(names)} into {home}")
        wanted = [PACKAGES[name] for name in names]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted], check=True)
    return str(python)


def debian(program, package):
    """Whether a program is there, after an attempt to install it where we may."""
    def there():
        return any(os.access(os.path.join(folder, program), os.X_OK) for folder in ("/usr/bin", "/usr/local/bin"))
    if not there() and os.geteuid() == 0:
        command = f"apt-get update -q && apt-get install -qy --no-install-recommends {package}"
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["sh", "-c", command], stdout=sys.stderr, stdin=subprocess.DEVNULL, env=env, check=False)
    if not there():
        skip(program, f"it is not here and could not be installed (Debian package {package})")
    return there()


# --- what is started


class Stage(contextlib.ExitStack):
    """A directory of our own, and all that was started; all of it is gone when the stage is left."""

    def __enter__(self):
        super().__enter__()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory(prefix="sandpiper-bench.")))
        return self

    def __exit__(self, *details):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return super().__exit__(*details)

    def start(self, command, log, patience=20, **keywords):
        """A process in a session of its own; at the end it is asked to go, and after `patience` made to."""
        with (self.folder / log).open("ab") as file:
            keywords = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, **keywords}
            process = subprocess.Popen(command, start_new_session=True, **keywords)
        self.callback(end, process, patience)
        return process

    def log(self, name):
        """The end of a log, for a message."""
        return (self.folder / name).read_text(errors="replace")[-2000:]


def end(process, patience=20):
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # Its children are in its session; of those that it left none may stay.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(what, condition, seconds=60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            raise Failed(f"after {seconds} s still not: {what() if callable(what) else what}")
        time.sleep(0.05)
    return value


def free_port():
    """A port outside the range that the kernel hands out by itself, so that nobody gets it meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Broker:
    """A private RabbitMQ, of one node or several."""

    def __init__(self, stage, plugins="", memory="2GB", nodes=1):
        self.stage, self.folder, self.nodes = stage, stage.folder / "broker", nodes
        config = stage.folder / "extra.conf"
        # A long backlog must not set off the alarm that the small node of tests has.
        config.write_text(f"vm_memory_high_watermark.absolute = {memory}\n")
        stage.callback(subprocess.run, [BROKER, "stop", self.folder], stderr=subprocess.DEVNULL, check=False)
        subprocess.run([BROKER, "install"], stderr=subprocess.DEVNULL, check=True)
        more = (["--plugins", plugins] if plugins else []) + (["--nodes", str(nodes)] if nodes > 1 else [])
        command = [BROKER, "start", self.folder, "--config", config, *more]
        started = subprocess.run(command, capture_output=True, text=True, check=False)
        if started.returncode != 0:
            raise Failed(f"no broker: {started.stderr}")
        address = started.stdout.strip().split("=", 1)[1]
        self.urls = json.loads(address) if nodes > 1 else [address]
        self.url = self.urls[0]

    def addresses(self, first):
        """All of them, as a worker takes them, beginning with one of our choice."""
        first %= self.nodes
        return json.dumps(self.urls[first:] + self.urls[:first])

    def pids(self):
        folders = [self.folder / str(at) for at in range(1, self.nodes + 1)] if self.nodes > 1 else [self.folder]
        return [int((folder / "pid").read_text()) for folder in folders]


class Worker:
    """A `sandpiper serve`, as its defaults have it, apart from what `settings` say."""

    workers = 0

    def __init__(self, stage, sandpiper, url, name="worker", queue="sandpiper.jobs", config=None, wait=True, **settings):
        self.stage, self.name, self.queue, self.port = stage, name, queue, free_port()
        # Workers on one host that share no identities: each has a range of its own.
        base = 2_000_000 + 1_000 * Worker.workers
        Worker.workers += 1
        env = {
            **PLAIN,
            "SANDPIPER_AMQP__URL": url,
            "SANDPIPER_AMQP__JOBS_QUEUE": queue,
            "SANDPIPER_HTTP__LISTEN": f"127.0.0.1:{self.port}",
            "SANDPIPER_WORKER__NAME": name,
            "SANDPIPER_SANDBOX__UID_BASE": str(base),
            **{f"SANDPIPER_{key.upper()}": str(value) for key, value in settings.items()},
        }
        command = [sandpiper, "serve", *(["--config", config] if config else [])]
        self.process = stage.start(command, f"{name}.log", env=env, patience=40)
        if wait:
            wait_for(lambda: f"{name} is ready; its log: {stage.log(f'{name}.log')}", self.ready)

    def get(self, path):
        with contextlib.suppress(OSError, urllib.error.HTTPError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.read().decode()
        return None

    def ready(self):
        if self.process.poll() is not None:
            raise Failed(f"{self.name} ended: {self.stage.log(f'{self.name}.log')}")
        return self.get("/readyz") is not None

    def metric(self, name):
        """The sum over all labels."""
        lines = (self.get("/metrics") or "").splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines
                   if line.startswith(name) and line[len(name)] in "{ ")

    def pids(self):
        return [self.process.pid]


def load(sandpiper, url, *arguments):
    """Runs the publisher, and returns its report."""
    command = [sandpiper.with_name("sandpiper-load"), "--url", url, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=PLAIN, check=False)
    if done.returncode != 0:
        raise Failed(f"load {arguments[0]}: {done.stderr.strip()}")
    return json.loads(done.stdout)


# --- what is measured


def processes():
    """Process id -> parent, of all that run."""
    parents = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = pathlib.Path(entry.path, "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(entry.name)] = int(stat[1])
    return parents


def tree(*roots):
    """These processes, and all that descend from them."""
    parents = processes()
    found, grown = set(roots), True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found


def cpu_seconds(*roots):
    """Processor time of these processes, their descendants, and those of them that are gone already."""
    ticks = 0
    for pid in tree(*roots):
        with contextlib.suppress(OSError):
            stat = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, stat[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def status_mib(pid, field):
    """A field of /proc/PID/status, in MiB."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    return 0.0


def busy():
    """The share of all processors that others take, over a second."""
    def times():
        fields = list(map(int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
        return sum(fields), fields[3] + fields[4]
    (total, idle), _ = times(), time.sleep(1)
    later, idle_later = times()
    return 1 - (idle_later - idle) / max(1, later - total)


def machine():
    """Where it was measured, and how busy that was with other things."""
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo", encoding="utf-8")
                  if line.startswith("model name")), platform.machine())
    return {"processor": model, "cores": CORES, "kernel": platform.release(), "root": os.geteuid() == 0,
            "busy_before": round(busy(), 3)}


def percentile(values, percent):
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[max(1, -(-len(ordered) * percent // 100)) - 1]


def median(rows, key):
    return statistics.median(row[key] for row in rows)


# --- what is printed


def number(value, digits=2):
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:,.{digits}f}" if isinstance(value, float) else f"{value:,}"


def table(heads, rows):
    """Lines of a table for people that is valid Markdown as well. The first column is text."""
    cells = [[number(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    lines = ["| " + " | ".join(cell.ljust(width) if at == 0 else cell.rjust(width)
                               for at, (cell, width) in enumerate(zip(row, widths))) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 2) if at == 0 else "-" * (width + 1) + ":" for at, width in enumerate(widths))
    return [lines[0], rule + "|", *lines[1:]]


def report(options, place, document, *tables):
    """`document` as JSON, or the tables: (title, heads, rows)."""
    if options.json:
        json.dump({"machine": place, "quick": options.quick, **document}, sys.stdout, indent=2)
        print()
        return
    user = "root" if place["root"] else "an ordinary user"
    print(f"{place['processor']}, {place['cores']} cores, Linux {place['kernel']}, as {user}; "
          f"{place['busy_before']:.0%} busy with other things before it began"
          + (" (--quick: the figures mean nothing)" if options.quick else ""))
    for title, heads, rows in tables:
        print(f"\n{title}\n")
        print("\n".join(table(heads, rows)))

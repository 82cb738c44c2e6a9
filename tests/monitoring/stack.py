"""A broker, workers and a Prometheus that scrapes them, all real, private and temporary; and load with failures of
every kind. For the tests of dashboards and alerts, and for the pictures of the dashboards.

Prometheus runs with the configuration that operators get (deploy/prometheus), its targets replaced.
"""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
from outside_client import BROKER, WORKER, Client, await_true, free_port  # noqa: E402

CONFIG = """
[environments.default]
standby = 2

[environments.reports]
imports = ["json", "csv", "decimal"]
standby = 1

[environments.fresh]
warm = false

# Cannot be warm: its import fails. Its jobs start cold.
[environments.broken]
imports = ["no_such_module"]
"""

# Each kind of job and how often it comes in a mixed load.
KINDS = {
    "succeeded": (60, {"code": "import time, random\ntime.sleep(random.random() / 20)\nprint(sum(range(1000)))"}),
    "reports": (15, {"environment": "reports", "code": "print(json.dumps([1]))" , "files": []}),
    "fresh": (4, {"environment": "fresh", "code": "print(1)"}),
    "broken": (1, {"environment": "broken", "code": "print(1)"}),
    "failed": (8, {"code": "1 / 0"}),
    "refused": (3, {"code": "import socket\ntry:\n    socket.socket()\nexcept OSError:\n    pass"}),
    "timeout": (1, {"code": "import time\ntime.sleep(9)", "timeout_ms": 400}),
    "cpu_limit": (1, {"code": "while True: pass", "limits": {"cpu_ms": 200}}),
    "memory_limit": (1, {"code": "x = b'x' * 200_000_000", "limits": {"memory_bytes": 64 << 20}}),
    "output_limit": (1, {"code": "while True: print('x' * 999)", "limits": {"output_bytes": 4096}}),
    "signaled": (1, {"code": "import os; os.abort()"}),
    "syscall_killed": (2, {"code": "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)"}),
    "syscall_killed_by_another": (1, {"code": "import ctypes; ctypes.CDLL(None).unshare(0x10000000)"}),
    "rejected": (2, {"code": "print(1)", "timeout_ms": 10**9}),
    "expired": (1, {"code": "print(1)", "deadline": "2020-01-01T00:00:00Z"}),
}
KINDS["reports"][1]["code"] = "import json\nprint(json.dumps([1]))"


class Worker:
    """A `sandpiper serve` of its own; the log of all its lives is kept."""

    def __init__(self, stack, name):
        self.name, self.port, self.log = name, free_port(), stack.folder / f"{name}.log"
        self.env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin", "SP_TEST_RUN": os.environ.get("SP_TEST_RUN", ""),
            "SANDPIPER_AMQP__URL": stack.url, "SANDPIPER_AMQP__DELIVERY_LIMIT": "2",
            "SANDPIPER_AMQP__RECONNECT_MAX_MS": "1000", "SANDPIPER_HTTP__LISTEN": f"127.0.0.1:{self.port}",
            "SANDPIPER_WORKER__NAME": name, "SANDPIPER_WORKER__SLOTS": "2", "SANDPIPER_LOG__FORMAT": "json",
            "SANDPIPER_SANDBOX__UID_BASE": str(4_000_000 + free_port() * 100),
        }
        self.config = stack.folder / "worker.toml"
        self.start()

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([WORKER, "serve", "--config", self.config], env=self.env,
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        await_true(f"{self.name} is ready", self.ready, seconds=60)

    def get(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            return ""

    def ready(self):
        assert self.process.poll() is None, f"{self.name} ended:\n{self.log.read_text()[-3000:]}"
        return self.get("/readyz").startswith("ready")

    def end(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(timeout=60)


class Stack:
    """All of it, until the block ends."""

    def __init__(self, folder, scrape="1s", workers=("alpha", "beta")):
        self.folder, self.scrape, self.names = pathlib.Path(folder), scrape, workers
        self.ends = contextlib.ExitStack()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.ends.close()
            raise
        return self

    def __exit__(self, *_):
        self.ends.close()

    def start(self):
        node, config = self.folder / "broker", self.folder / "extra.conf"
        # As often as Prometheus looks; five seconds by default.
        config.write_text("collect_statistics_interval = 1000\n")
        self.ends.callback(subprocess.run, [BROKER, "stop", node], stdin=subprocess.DEVNULL)
        started = subprocess.run([BROKER, "start", node, "--plugins", "rabbitmq_prometheus", "--config", config],
                                 stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
        self.url = started.stdout.decode().strip().split("=", 1)[1]
        settings = dict(line.split("=", 1) for line in (node / "settings").read_text().splitlines())
        self.rabbitmq = f"127.0.0.1:{int(settings['block']) + 4}"
        (self.folder / "worker.toml").write_text(CONFIG)
        self.workers = []
        for name in self.names:
            worker = Worker(self, name)
            self.workers.append(worker)
            self.ends.callback(worker.end, signal.SIGKILL)
        self.start_prometheus()

    def start_prometheus(self):
        folder = self.folder / "prometheus"
        shutil.copytree(ROOT / "deploy" / "prometheus", folder)
        file = folder / "prometheus.yml"
        workers = ", ".join(f"127.0.0.1:{worker.port}" for worker in self.workers)
        text = file.read_text()
        for old, new in (
            ("    dns_sd_configs:\n      - names: [worker]\n        type: A\n        port: 9464\n",
             f"    static_configs:\n      - targets: [{workers}]\n"),
            ("[rabbitmq:15692]", f"[{self.rabbitmq}]"),
            ("interval: 15s", f"interval: {self.scrape}"),
        ):
            assert old in text, f"prometheus.yml has no {old!r} any more"
            text = text.replace(old, new)
        file.write_text(text)
        self.prometheus = f"http://127.0.0.1:{free_port()}"
        log = (folder / "log").open("wb")
        process = subprocess.Popen(
            ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address={self.prometheus.removeprefix('http://')}", "--log.level=warn"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder)
        self.ends.callback(process.wait, 30)
        self.ends.callback(process.terminate)

        def up():
            assert process.poll() is None, (folder / "log").read_text()
            with contextlib.suppress(OSError, AssertionError):
                return {one["health"] for one in self.api("targets")["activeTargets"]} == {"up"}

        await_true("every target of Prometheus is up", up, seconds=60)

    def api(self, path, **parameters):
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def value(self, expression):
        """The sum of what it gives at this moment."""
        return sum(float(one["value"][1]) for one in self.api("query", query=expression)["result"])

    def ctl(self, *arguments):
        subprocess.run([BROKER, "ctl", self.folder / "broker", "-q", *arguments], check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL)


class Load:
    """Publishes a mix of jobs at a rate that may change, from a thread of its own, until the block ends."""

    def __init__(self, stack, rate, seed=7):
        self.stack, self.rate, self.random = stack, rate, random.Random(seed)
        self.over, self.began, self.error = threading.Event(), time.monotonic(), None
        self.thread = threading.Thread(target=self.run)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        if self.error:
            raise self.error

    def run(self):
        kinds, weights = list(KINDS), [weight for weight, _ in KINDS.values()]
        client, number = None, 0
        while not self.over.is_set():
            try:
                client = client or Client(self.stack.url)
                # Every kind once, then by chance.
                kind = kinds[number] if number < len(kinds) else self.random.choices(kinds, weights)[0]
                properties = {"timestamp": int(time.time()), "headers": {"timestamp_in_ms": int(time.time() * 1000)}}
                client.publish({"id": f"{kind}-{number}"} | KINDS[kind][1], str(number), client.reply_to, **properties)
                number += 1
                client.connection.process_data_events(0)
                client.got.clear()
                self.over.wait(1 / self.rate(time.monotonic() - self.began))
            except Exception as error:  # noqa: BLE001 - pika has many; the broker cuts connections off here
                if self.over.is_set() or type(error).__module__.startswith("pika"):
                    client = None
                    self.over.wait(0.2)
                else:
                    self.error = error
                    return


def mishaps(stack):
    """What a mix of jobs does not bring about: cancelled, malformed, returned, lost, redelivered and poison ones.
    Each is waited for until Prometheus has seen it: a worker that is killed counts from 0 again."""

    def seen(expression):
        await_true(f"{expression} is above 0", lambda: stack.value(f"sum({expression})") > 0, seconds=60)

    client = Client(stack.url)
    sleeper = {"id": "to-be-cancelled", "code": "import time\ntime.sleep(60)", "timeout_ms": 90_000}
    client.publish(sleeper, "cancelled", client.reply_to)
    await_true("a job runs on", lambda: stack.value("max(sandpiper_oldest_running_job_seconds)") > 2, seconds=60)
    subprocess.run([WORKER, "cancel", sleeper["id"]], env={"PATH": "/usr/bin", "SANDPIPER_AMQP__URL": stack.url},
                   check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    client.publish(b"{not json", "malformed", client.reply_to)
    client.publish({"code": "print(1)"}, "gone", "no-such-queue")
    client.collect(["cancelled", "malformed"])
    seen('sandpiper_jobs_completed_total{status="cancelled"}')
    seen('sandpiper_jobs_dead_lettered_total{reason="malformed"}')
    seen('sandpiper_results_published_total{outcome="returned"}')
    # Their acknowledgements get lost; the same worker answers from memory when they come again.
    for n in range(8):
        client.publish({"id": f"cut-off-{n}", "code": "import time\ntime.sleep(2)"}, str(n))
    await_true("jobs run", lambda: stack.value("sum(sandpiper_jobs_running)") >= 2, seconds=60)
    stack.ctl("close_all_connections", "an operator closed it")
    seen('sandpiper_deliveries_settled_total{action="lost"}')
    seen('sandpiper_connection_reconnects_total{role="consume"}')
    up = "sum(sandpiper_connection_up)"
    await_true("reconnected", lambda: stack.value(up) == 2 * len(stack.workers), seconds=60)
    # With a delivery limit of two, what two deaths of its worker have sent back is poison.
    client = Client(stack.url)
    for n in range(6):
        client.publish({"id": f"orphan-{n}", "code": "import time\ntime.sleep(4)"}, str(n), client.reply_to)
    for _ in range(2):
        for worker in stack.workers:
            await_true("it is busy", lambda worker=worker: "sandpiper_jobs_running 2" in worker.get("/metrics"),
                       seconds=60)
        for worker in stack.workers:
            worker.end(signal.SIGKILL)
        for worker in stack.workers:
            worker.start()
    with contextlib.suppress(Exception):
        client.connection.close()

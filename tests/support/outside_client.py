"""Sandpiper as a stranger meets it: a client library that shares no code with it (pika), a broker, two workers.

Jobs go in, results come out; a worker is killed in the middle, the other is asked to stop under load. What must
hold: every job ends with a result, a job is answered twice only where its worker died before the acknowledgement,
duplicates carry the same message id, and nothing is left, in the queues or as a process.

Needs deploy/broker, the worker's binary (SP_TEST_BIN) and pika; tests/run provides them.
"""

import collections
import contextlib
import glob
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pika

ROOT = pathlib.Path(__file__).resolve().parents[2]
BROKER = ROOT / "deploy" / "broker"
WORKER = os.environ.get("SP_TEST_BIN", str(ROOT / "target" / "debug" / "sandpiper"))
JOBS, RESULTS, DEAD = "sandpiper.jobs", "sandpiper.results", "sandpiper.dead"
# The host uids of jobs begin here by default; nothing else on a machine has any of them.
JOB_UIDS = range(2_000_000, 2_010_000)


def free_port():
    """A port outside the range that the kernel hands out by itself, so that nobody gets it meanwhile."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


def await_true(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"after {seconds} s still not: {what}"
        time.sleep(0.05)
    return value


class Worker:
    """A `sandpiper serve` of our own."""

    def __init__(self, name, url, folder, settings=None):
        self.name = name
        self.port = free_port()
        self.log = pathlib.Path(folder) / f"{name}.log"
        env = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "SANDPIPER_AMQP__URL": url,
            "SANDPIPER_HTTP__LISTEN": f"127.0.0.1:{self.port}",
            "SANDPIPER_WORKER__NAME": name,
            "SANDPIPER_WORKER__SLOTS": "2",
            "SP_TEST_RUN": os.environ.get("SP_TEST_RUN", ""),
        } | (settings or {})
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([WORKER, "serve"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        await_true(f"{name} is ready; its log: {self.log.read_text()}", self.ready)

    def get(self, path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def ready(self):
        assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log.read_text()}"
        return self.get("/readyz")[0] == 200

    def metrics(self):
        """Sample (with labels, as written) to value."""
        lines = self.get("/metrics")[1].splitlines()
        return {k: float(v) for k, v in (line.rsplit(" ", 1) for line in lines if line and line[0] != "#")}

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(timeout=40)


class Client:
    """Publishes jobs and collects what comes back on a reply queue of its own."""

    def __init__(self, url):
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.reply_to = self.channel.queue_declare("", exclusive=True).method.queue
        self.got = collections.defaultdict(list)
        self.channel.basic_consume(self.reply_to, self.take, auto_ack=True)

    def take(self, _channel, _method, properties, body):
        self.got[properties.correlation_id].append((json.loads(body), properties))

    def publish(self, body, correlation_id, reply_to=None, **properties):
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        properties = pika.BasicProperties(correlation_id=correlation_id, reply_to=reply_to, delivery_mode=2, **properties)
        self.channel.basic_publish("", JOBS, body, properties, mandatory=True)

    def collect(self, ids, seconds=60):
        """Waits until each of these has a result."""
        end = time.monotonic() + seconds
        while missing := [i for i in ids if not self.got[i]]:
            assert time.monotonic() < end, f"no result for {len(missing)} jobs after {seconds} s: {missing[:5]}"
            self.connection.process_data_events(0.1)

    def one(self, queue, seconds=20):
        """The next message of a queue."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            method, properties, body = self.channel.basic_get(queue, auto_ack=True)
            if method:
                return properties, body
            self.connection.process_data_events(0.05)
        raise AssertionError(f"nothing came on {queue} within {seconds} s")


# Each kind of program, and what its result must say.
KINDS = {
    "success": ({"code": "print('hello', 6 * 7)"}, {"status": "succeeded", "exit_code": 0, "stdout": "hello 42\n"}),
    "stdin": ({"code": "print(input()[::-1])", "stdin": "abc\n"}, {"status": "succeeded", "stdout": "cba\n"}),
    "exception": ({"code": "1 / 0"}, {"status": "failed", "exit_code": 1}),
    "exit": ({"code": "raise SystemExit(7)"}, {"status": "failed", "exit_code": 7}),
    "timeout": ({"code": "while True: pass", "timeout_ms": 300}, {"status": "timeout", "exit_code": None}),
    "signal": ({"code": "import os; os.abort()"}, {"status": "signaled", "signal": "SIGABRT"}),
    "flood": ({"code": "while True: print('x' * 9999)"}, {"status": "output_limit", "stdout_truncated": True}),
    "forbidden": (
        {"code": "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)"},
        {"status": "syscall_killed", "syscall": "ptrace"},
    ),
}


def same(result, wanted):
    return {k: result.get(k, "missing") for k in wanted} == wanted


def every_kind(client, workers):
    """Eight of each kind at once: the right result each, once, with the requester's own correlation id."""
    wanted = {}
    for n in range(8):
        for kind, (job, expected) in KINDS.items():
            name = f"{kind}.{n}"
            wanted[f"corr-{name}"] = (name, expected)
            client.publish({"id": name, "metadata": {"n": n}} | job, f"corr-{name}", client.reply_to)
    client.collect(wanted)
    names = set()
    for correlation_id, (name, expected) in wanted.items():
        answers = client.got[correlation_id]
        assert len(answers) == 1, f"{name} was answered {len(answers)} times"
        result, properties = answers[0]
        assert same(result, expected), f"{name}: wanted {expected}, got {result}"
        assert result["id"] == name and result["version"] == 1 and result["metadata"] == {"n": int(name[-1])}, result
        assert properties.content_type == "application/json" and properties.type == "result", properties
        assert properties.message_id and properties.timestamp, properties
        names.add(result["worker"])
    assert len({client.got[c][0][1].message_id for c in wanted}) == len(wanted), "two jobs share a message id"
    assert names == {w.name for w in workers}, f"only {names} took part"

    def total(sample):
        return sum(w.metrics()[sample] for w in workers)

    for kind, status in (("timeout", "timeout"), ("flood", "output_limit"), ("forbidden", "syscall_killed")):
        count = total(f'sandpiper_jobs_completed_total{{status="{status}"}}')
        assert count == 8, f"the metrics count {count} jobs as {status} after eight of {kind}"
    assert total("sandpiper_job_timeouts_total") == 8
    assert sum(w.metrics().get('sandpiper_syscall_kills_total{syscall="ptrace"}', 0) for w in workers) == 8


def refusals(client):
    """What is not acceptable is answered, and never run."""
    refused = {
        "unknown field": ({"code": "print(1)", "tiemout_ms": 1}, "timeout_ms"),
        "over the maximum": ({"code": "print(1)", "timeout_ms": 10**9}, "300"),
        "no code": ({"id": "x"}, "code"),
        "preload": ({"code": "print(1)", "preload": "import os"}, "preload"),
    }
    for name, (job, _) in refused.items():
        client.publish(job, name, client.reply_to)
    client.collect(refused)
    for name, (_, word) in refused.items():
        result = client.got[name][0][0]
        assert result["status"] == "rejected" and word in result["error"] and result["usage"] is None, (name, result)


def malformed(client):
    """What cannot be read is kept for the operator, with the reason, and the requester is told."""
    client.publish(b"\xff{not json", "malformed", client.reply_to)
    client.collect(["malformed"])
    # The job with an unknown field is kept as well: its publisher and this worker disagree about the contract.
    dead = {properties.correlation_id: (properties, body) for properties, body in (client.one(DEAD) for _ in range(2))}
    assert dead.keys() == {"unknown field", "malformed"}, dead
    properties, body = dead["malformed"]
    assert body == b"\xff{not json" and properties.headers["x-sandpiper-reason"], (properties, body)
    assert client.got["malformed"][0][0]["status"] == "rejected"


def addresses(client):
    """The ways a result can go: the results queue, direct reply-to, and past a reply queue that is gone."""
    client.publish({"id": "nobody-waits", "code": "print(1)"}, "results")
    properties, body = client.one(RESULTS)
    assert properties.correlation_id == "results" and json.loads(body)["stdout"] == "1\n", body

    client.publish({"id": "gone", "code": "print(2)"}, "gone", "no-such-queue")
    properties, body = client.one(RESULTS)
    assert properties.correlation_id == "gone" and json.loads(body)["stdout"] == "2\n", body

    direct = []
    channel = client.connection.channel()
    channel.basic_consume("amq.rabbitmq.reply-to", lambda *message: direct.append(message[3]), auto_ack=True)
    job = json.dumps({"code": "print(3)"}).encode()
    channel.basic_publish("", JOBS, job, pika.BasicProperties(reply_to="amq.rabbitmq.reply-to"))
    end = time.monotonic() + 20
    while not direct and time.monotonic() < end:
        client.connection.process_data_events(0.1)
    assert direct and json.loads(direct[0])["stdout"] == "3\n", direct
    channel.close()


def sleepers(client, prefix, count):
    ids = [f"{prefix}-{n}" for n in range(count)]
    for i in ids:
        client.publish({"id": i, "code": f"import time; time.sleep(0.4); print({i!r})"}, i, client.reply_to)
    return ids


def answered(client, ids):
    """Each has its result, and duplicates of one job say the same under the same message id."""
    client.collect(ids)
    twice = 0
    for i in ids:
        answers = client.got[i]
        assert all(same(result, {"status": "succeeded", "stdout": f"{i}\n"}) for result, _ in answers), answers
        assert len({properties.message_id for _, properties in answers}) == 1, f"{i}: duplicates with other ids"
        twice += len(answers) > 1
    return twice


def settled(folder):
    """Nothing is ready or unacknowledged any more."""
    listed = subprocess.run(
        [BROKER, "ctl", folder, "-q", "list_queues", "name", "messages_ready", "messages_unacknowledged", "--formatter=json"],
        stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL,
    ).stdout
    counts = {q["name"]: (q["messages_ready"], q["messages_unacknowledged"]) for q in json.loads(listed)}
    return counts[JOBS] == (0, 0)


def job_processes():
    """Processes that run under the uid of a job."""
    found = []
    for status in glob.glob("/proc/[0-9]*/status"):
        with contextlib.suppress(OSError):
            text = pathlib.Path(status).read_text()
            if int(re.search(r"^Uid:\t(\d+)", text, re.M)[1]) in JOB_UIDS:
                found.append(text.split("\n", 1)[0])
    return found


def killed(client, workers, folder):
    """A worker that dies takes nothing with it: its jobs are run by the other one."""
    ids = sleepers(client, "killed", 24)
    client.collect(ids[:2])
    workers[0].end(signal.SIGKILL)
    twice = answered(client, ids)
    # Two slots: that many results may have been sent and not yet acknowledged.
    assert twice <= 2, f"{twice} jobs were answered twice"
    await_true("the queue is empty", lambda: settled(folder))


def drained(client, workers, url, folder):
    """Asked to stop under load, a worker finishes what runs, gives back the rest and exits with 0."""
    ids = sleepers(client, "drained", 24)
    client.collect(ids[:2])
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
    for worker in workers:
        code = worker.process.wait(timeout=40)
        assert code == 0, f"{worker.name} exits with {code} after SIGTERM:\n{worker.log.read_text()}"
    fresh = Worker("gamma", url, folder)
    workers[:] = [fresh]
    twice = answered(client, ids)
    assert twice == 0, f"{twice} jobs were answered twice though every worker stopped in good order"
    await_true("the queue is empty", lambda: settled(folder / "broker"))


def main():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        folder = pathlib.Path(folder)
        node = folder / "broker"
        ends.callback(subprocess.run, [BROKER, "stop", node], stdin=subprocess.DEVNULL)
        started = subprocess.run([BROKER, "start", node], stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
        url = started.stdout.decode().strip().split("=", 1)[1]
        everyone, workers = [], []

        def stop_all():
            for worker in everyone + workers:
                if worker.process.poll() is None:
                    worker.process.kill()
                    worker.process.wait()

        ends.callback(stop_all)
        workers += [Worker("alpha", url, folder), Worker("beta", url, folder)]
        everyone += workers
        client = Client(url)

        def check(name, function, *arguments):
            began = time.monotonic()
            try:
                function(*arguments)
            except BaseException:
                for worker in dict.fromkeys(everyone + workers):
                    print(f"--- the end of {worker.name}'s log", *worker.log.read_text().splitlines()[-15:], sep="\n")
                print(f"FAILED {name}", flush=True)
                raise
            print(f"ok {name} ({time.monotonic() - began:.1f} s)", flush=True)

        check("every kind of job, on two workers", every_kind, client, workers)
        check("refusals", refusals, client)
        check("malformed messages", malformed, client)
        check("where results go", addresses, client)
        check("a worker is killed", killed, client, workers, node)
        workers[0] = Worker("alpha", url, folder)
        everyone.append(workers[0])
        check("workers are asked to stop", drained, client, workers, url, folder)
        assert workers[0].end(signal.SIGTERM) == 0
        await_true("no process of a job is left", lambda: not job_processes(), seconds=5)
    print("every job was answered")


if __name__ == "__main__":
    sys.exit(main())

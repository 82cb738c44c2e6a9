"""compose.yaml in a real engine, with the commands at its head: workers come, drain, die and come again, and the
broker restarts, each while jobs are under way. Every job must have its result, and nothing may be left at the end.

Without Grafana: no Debian has it, and the tests ask no registry of images.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time

from private_engine import await_true, run, say

SERVICES = ["rabbitmq", "worker", "prometheus"]
JOB = "import time\ntime.sleep(0.15)\nprint({number})\n"


# More than three workers do until a broker has stopped.
JOBS = 400


def succeeded(line):
    """The id of a result that is right."""
    result = json.loads(line)
    want((result["status"], result["stdout"]) == ("succeeded", result["id"].rpartition(".")[2] + "\n"), line)
    return result["id"]


def want(true, sentence):
    if not true:
        raise AssertionError(sentence)


class Stack:
    """The services, and a publisher on the machine that they run on."""

    def __init__(self, engine, place, worker):
        self.engine, self.place, self.worker = engine, place, worker
        head = (place / "deploy/compose.yaml").read_text().split("\nname:")[0]
        self.head = [line[1:].strip() for line in head.splitlines() if line.startswith("#   ")]
        [self.password] = re.findall(r"RABBITMQ_PASSWORD=(\S+)", head)

    def shell(self, line):
        """A line of the head of compose.yaml, or one like it."""
        return run(self.engine.inside("env", f"--chdir={self.place}/deploy", "sh", "-euc", line,
                                      RABBITMQ_PASSWORD=self.password))

    def compose(self, *arguments):
        return self.shell(" ".join(["docker", "compose", *arguments]))

    def line(self, start):
        """That command of the head."""
        [found] = [line for line in self.head if start in line]
        return found

    def workers(self):
        return self.compose("ps", "--quiet", "worker").split()

    def inspect(self, container, what):
        return self.engine.client("inspect", "--format", "{{json ." + what + "}}", container).strip()

    def consumers(self):
        """As the broker's own page tells it, which compose.yaml publishes."""
        return self.queue("sandpiper.jobs").get("consumers", 0)

    def queue(self, path, *options):
        return self.ask(f"15672/api/queues/%2F/{path}", "--user", f"sandpiper:{self.password}", *options)

    def submit(self, *arguments, **options):
        """A publisher of this machine, at the port that compose.yaml publishes."""
        environment = {"SANDPIPER_AMQP__URL": f"amqp://sandpiper:{self.password}@127.0.0.1:5672/%2f"}
        return subprocess.Popen(self.engine.beside(self.worker, "submit", *arguments), env=environment, **options)

    def ask(self, page, *options):
        """A JSON page of one of the services; empty while it does not answer."""
        asked = subprocess.run(self.engine.beside("curl", "--silent", "--fail", *options, f"http://127.0.0.1:{page}"),
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, timeout=30)
        return json.loads(asked.stdout) if asked.returncode == 0 else {}

    def await_workers(self, count):
        await_true(f"{count} workers consume", lambda: self.consumers() == count, 120)

    def under_load(self, what, happens):
        """Lets it happen while jobs come and are under way, and wants the result of each of them."""
        began = time.monotonic()
        identity = what.replace(" ", "-")
        path, said = self.place / "results.ndjson", self.place / "submit.log"
        with open(path, "w") as results, open(said, "w") as log:
            submit = self.submit("--batch", "-", stdin=subprocess.PIPE, stdout=results, stderr=log)
            over = threading.Event()
            sent = []

            def publish():
                # Somewhat more than the fewest workers can do, until it has happened, and then some.
                after = 0
                while after < 40:
                    job = {"id": f"{identity}.{len(sent)}", "code": JOB.format(number=len(sent))}
                    submit.stdin.write(json.dumps(job).encode() + b"\n")
                    submit.stdin.flush()
                    sent.append(job["id"])
                    after += over.wait(1 / 30)
                submit.stdin.close()

            publisher = threading.Thread(target=publish, daemon=True)
            publisher.start()
            try:
                await_true("first results", lambda: path.read_text().count("\n") >= 10)
                happens()
                over.set()
                code = submit.wait(timeout=180)
            finally:
                over.set()
                submit.kill()
                submit.wait()
        want(code == 0, f"{what}: submit ends with {code}: {said.read_text()[-2000:]}")
        publisher.join()
        came = sorted(map(succeeded, path.read_text().splitlines()))
        want(came == sorted(sent), f"{what}: {len(sent)} jobs, {len(came)} results of {len(set(came))}")
        say(f"{what} under load: {len(came)} jobs, each with one result, in {time.monotonic() - began:.0f} s")

    # --- what happens

    def scale(self):
        self.shell(self.line("--scale worker=4") + " --no-recreate " + " ".join(SERVICES))
        self.await_workers(4)

    def stop_one(self):
        # As at a rolling restart: compose.yaml's own grace period.
        container = self.workers()[0]
        self.engine.client("stop", "--time", "40", container)
        code = self.inspect(container, "State.ExitCode")
        want(code == "0", f"a worker that is stopped under load ends with {code}")

    def kill_one(self):
        # Not by the engine, which would take it for the operator's wish: it has to start it again.
        container = self.workers()[0]
        pid = self.inspect(container, "State.Pid")
        restarts = int(self.inspect(container, "RestartCount"))
        run(self.engine.inside("sh", "-c", f"kill -9 {pid}"))
        await_true("the engine starts the worker again",
                   lambda: int(self.inspect(container, "RestartCount")) > restarts)

    def restart_broker(self):
        """Jobs and results are in its queues then: a publisher that waits would only be told that it is cut off."""
        began = time.monotonic()
        jobs = self.place / "jobs.ndjson"
        sent = {f"restarted.{number}" for number in range(JOBS)}
        jobs.write_text("".join(json.dumps({"id": one, "code": JOB.format(number=one.rpartition(".")[2])}) + "\n"
                                for one in sent))
        with self.submit("--batch", jobs, "--no-wait", stdin=subprocess.DEVNULL) as submit:
            want(submit.wait(timeout=60) == 0, "the jobs before the restart are not published")
        await_true("first results", lambda: self.queue("sandpiper.results").get("messages", 0) > 0)
        self.compose("restart", "rabbitmq")
        came = []

        def collected():
            taken = self.queue("sandpiper.results/get", "--header", "Content-Type: application/json", "--data",
                               '{"ackmode": "ack_requeue_false", "count": 1000, "encoding": "auto"}')
            if taken:
                rounds.append(len(taken))
                came.extend(succeeded(message["payload"]) for message in taken)
            return sent <= set(came)

        rounds = []
        await_true(f"a result of each of {JOBS} jobs", collected, 120)
        want(rounds[0] < JOBS, "every job was over before the broker stopped")
        want(sent == set(came), "results of other jobs came")
        say(f"the broker restarted: {JOBS} jobs, {rounds[0]} results before or right after it, {len(came)} in all, "
            f"in {time.monotonic() - began:.0f} s")

    def targets(self):
        """How many targets Prometheus reaches, by job."""
        listed = self.ask("9090/api/v1/targets").get("data", {}).get("activeTargets", [])
        up = [target["labels"]["job"] for target in listed if target["health"] == "up"]
        return {job: up.count(job) for job in set(up)}


def check(engine, place, worker):
    stack = Stack(engine, place, worker)
    stack.shell(stack.line("> amqp_url").removeprefix("cd deploy && "))
    stack.shell(stack.line("up -d --build") + " " + " ".join(SERVICES))
    try:
        stack.await_workers(2)
        said = stack.shell(stack.line("sandpiper doctor").replace("exec ", "exec --no-TTY "))
        want("serve would start" in said, f"doctor says in a worker of compose.yaml:\n{said}")
        say("two workers consume")
        stack.under_load("scaled to four", stack.scale)
        stack.under_load("a worker stopped", stack.stop_one)
        stack.under_load("a worker killed", stack.kill_one)
        stack.restart_broker()
        stack.await_workers(3)
        expected = {"sandpiper": 3, "rabbitmq": 1, "rabbitmq-queues": 1}
        await_true(f"Prometheus scrapes {expected}", lambda: stack.targets() == expected, 120)
        say(f"Prometheus scrapes {expected}")
    except BaseException:
        say(stack.compose("ps", "--all"))
        say(stack.compose("logs", "--no-color", "--tail", "8"))
        raise
    finally:
        stack.compose("down", "--volumes", "--timeout", "40")
    for what, listed in (("containers", ["ps", "--all", "--quiet"]), ("volumes", ["volume", "ls", "--quiet"]),
                         ("networks", ["network", "ls", "--quiet", "--filter", "type=custom"])):
        left = engine.client(*listed)
        want(not left, f"{what} are left after compose down: {left}")
    say("all is taken down")


if __name__ == "__main__":
    sys.exit(f"{os.path.basename(__file__)} is a part of engines.py")

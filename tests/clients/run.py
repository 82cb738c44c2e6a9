"""The examples under deploy/clients do what they say, in every language, against a real broker and a real worker.

Each prints one transcript, which must be tests/clients/expected.txt to the letter: every status with what to do
about it, output while a job runs, a cancelled job, files, a duplicate, direct reply-to. The front that speaks
dify-sandbox's HTTP API is asked over HTTP, and what it says is what deploy/MIGRATION.md says. The AsyncAPI document
is read by AsyncAPI's own parser, and the broker has the queues that it names. README's first day is pasted line
by line, except that nothing is built and that nothing lies in a place that a person may use.

Needs deploy/broker, the worker's binary (SP_TEST_BIN), the Rust example beside it, and the packages in
TARGET/venv and TARGET/clients; tests/run provides them. The first argument is TARGET.
"""

import contextlib
import difflib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from outside_client import BROKER, WORKER, Worker, await_true, free_port  # noqa: E402

CLIENTS = ROOT / "deploy" / "clients"
TARGET = pathlib.Path(sys.argv[1]).resolve()
PYTHON = TARGET / "venv" / "bin" / "python"
COMMANDS = {
    "pika": [PYTHON, CLIENTS / "python" / "with_pika.py"],
    "aio-pika": [PYTHON, CLIENTS / "python" / "with_aio_pika.py"],
    "amqplib": ["node", TARGET / "clients" / "node" / "client.js"],
    "lapin": [TARGET / "debug" / "examples" / "client"],
}
# The status that no healthy worker gives.
BROKEN = {"id": "meets-a-broken-worker", "code": "print(1)", "environment": "broken"}


def transcript(memory_limit):
    expected = (ROOT / "tests" / "clients" / "expected.txt").read_text()
    if not memory_limit:
        print("SKIPPED: memory_limit: no cgroups here that this user may write", flush=True)
        assert os.environ.get("CI") != "true", "nothing may be skipped here"
        limited = next(line for line in expected.splitlines() if line.startswith("hoards-memory"))
        expected = expected.replace(limited, "hoards-memory: failed, tell: the job exited with code 1")
    return expected


def has_memory_limit(jobs):
    job = next(line for line in jobs.splitlines() if "hoards-memory" in line)
    ran = subprocess.run([WORKER, "exec", "--json", "--job", job], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return json.loads(ran.stdout)["status"] == "memory_limit"


def clients(url, folder):
    """All of them at once: each must get its own results, in whatever company."""
    jobs = (CLIENTS / "jobs.ndjson").read_text()
    expected = transcript(has_memory_limit(jobs))
    file = folder / "jobs.ndjson"
    file.write_text(jobs + json.dumps(BROKEN) + "\n")
    running = {
        name: subprocess.Popen(
            [*command, url, file], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, command in COMMANDS.items()
    }
    wrong = []
    for name, process in running.items():
        try:
            said = process.communicate(timeout=120)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0] + "(killed after 120 s)\n"
        if said == expected and process.returncode == 0:
            print(f"ok {name}")
            continue
        wrong.append(name)
        print(f"FAILED {name}, exit code {process.returncode}")
        print("".join(difflib.unified_diff(expected.splitlines(True), said.splitlines(True), "expected", name)))
    assert not wrong, f"these clients did not say what they should: {wrong}"


TRACEBACK = """Traceback (most recent call last):
  File "/work/main.py", line 1, in <module>
    1/0
    ~^~
ZeroDivisionError: division by zero
"""


def dify(url, folder):
    """What Dify's own client sends, and what it may get."""
    port, log = free_port(), folder / "front.log"
    environment = {"PATH": os.environ["PATH"], "API_KEY": "a-key", "MAX_REQUESTS": "2"}
    environment["SP_TEST_RUN"] = os.environ.get("SP_TEST_RUN", "")
    with log.open("wb") as output:
        front = subprocess.Popen(
            [PYTHON, CLIENTS / "python" / "dify_front.py", url, str(port)],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )

    def ask(path, request=None, key="a-key"):
        body = request if isinstance(request, bytes | None) else json.dumps(request).encode()
        headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers), timeout=60
            ) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def run(code, **fields):
        # As Dify asks, always with the network.
        request = {"language": "python3", "code": code, "preload": "", "enable_network": True} | fields
        return ask("/v1/sandbox/run", request)

    def healthy():
        assert front.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return ask("/health", key="") == (200, "ok")

    def success(stdout, error):
        return 200, {"code": 0, "message": "success", "data": {"stdout": stdout, "error": error}}

    try:
        await_true("the front answers", healthy)
        assert run("print(6 * 7)") == success("42\n", "")
        status, body = run("1/0")
        error = body["data"]["error"].replace("     ~^~\n", "    ~^~\n")
        assert (status, body["code"], error) == (200, 0, TRACEBACK + "error: exit status 1\n"), body
        assert run("print(1, flush=True)\nwhile True: pass") == success("1\n", "error: timeout\n")
        forbidden = "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0)"
        assert run(forbidden) == success("", "error: operation not permitted\n")
        assert run("import sys; print('careful', file=sys.stderr)") == success("", "careful\n")
        unread = run("open('evil', 'wb').write(b'')\nimport os; os.write(1, b'\\xff')")
        assert unread == success("\ufffd", ""), unread
        # Code before the filter is left out unless ENABLE_PRELOAD, as there.
        assert run("print('ran')", preload="raise SystemExit(9)") == success("ran\n", "")
        # The prescript there has imported os; here a program has only what it imports.
        assert "NameError: name 'os' is not defined" in run("os.getcwd()")[1]["data"]["error"]
        assert run(17)[1]["code"] == -400
        assert run("x", language="nodejs") == (400, {"code": -400, "message": "unsupported language", "data": None})
        for unfit in (b"", b"[]", b"{", b'{"language": "python3"}'):
            assert ask("/v1/sandbox/run", unfit)[1]["code"] == -400, unfit
        assert ask("/v1/sandbox/run", {}, key="another") == (401, None)
        assert ask("/v1/sandbox/dependencies?language=python3") == (
            200, {"code": 0, "message": "success", "data": {"dependencies": []}},
        )
        assert ask("/v1/sandbox/else", {})[0] == 404
    except AssertionError:
        print("--- the front's log", log.read_text()[-3000:], sep="\n")
        raise
    finally:
        front.kill()
        front.wait()
    print("ok dify-sandbox's API")


def asyncapi(node):
    here = TARGET / "clients" / "asyncapi"
    several = here / "several.toml"
    several.write_text('[amqp]\nqueues = [{ name = "eu.jobs" }, { name = "us.jobs" }]\n')
    for options in (["--config", several], []):
        printed = subprocess.run(
            [WORKER, "schema", "asyncapi", *options], stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL
        ).stdout
        subprocess.run(["node", "asyncapi.js"], cwd=here, input=printed, check=True)
    document = json.loads(printed)
    columns = ["name", "durable", "exclusive", "auto_delete"]
    listed = subprocess.run(
        [BROKER, "ctl", node, "-q", "list_queues", *columns, "--formatter=json"],
        stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL,
    ).stdout
    there = {q["name"]: (q["durable"], bool(q["exclusive"]), q["auto_delete"]) for q in json.loads(listed)}
    for name, channel in document["channels"].items():
        queue = channel.get("bindings", {}).get("amqp", {}).get("queue")
        if queue:
            said = (queue["durable"], queue["exclusive"], queue["autoDelete"])
            assert there.get(queue["name"]) == said, f"{name} is not on the broker as described: {queue}, {there}"
    print("ok AsyncAPI, and the broker has its queues")


def first_day(folder):
    section = (ROOT / "README.md").read_text().split("\n## The first day\n")[1].split("\n## ")[0]
    port, here = free_port(), f"{folder}/day"
    script = "set -e -o pipefail\n" + "".join(re.findall(r"```sh\n(.*?)```", section, re.S))
    for as_written, here_instead in (
        ("cargo build --workspace ", ": built before "),
        ("$PWD/target/debug", str(pathlib.Path(WORKER).resolve().parent)),
        ("127.0.0.1:9464", f"127.0.0.1:{port}"),
        ("~/.local/state/sandpiper", here),
    ):
        assert as_written in script, f"README's first day has no {as_written!r}"
        script = script.replace(as_written, here_instead)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "SANDPIPER_HTTP__LISTEN": f"127.0.0.1:{port}"}
    environment["SP_TEST_RUN"] = os.environ.get("SP_TEST_RUN", "")
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )
    try:
        said = process.communicate(timeout=180)[0]
        assert process.returncode == 0, f"README's first day ends with {process.returncode}:\n{said}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        subprocess.run([BROKER, "stop", here], stdin=subprocess.DEVNULL, check=True)
    assert said.count("\n42\n") == 2, said
    assert "direct: succeeded, use: 42\n" in said and 'jobs_completed_total{status="timeout"} 1\n' in said, said
    print("ok README's first day")


def main():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        folder = pathlib.Path(folder)
        folder.chmod(0o755)
        node = folder / "broker"
        ends.callback(subprocess.run, [BROKER, "stop", node], stdin=subprocess.DEVNULL)
        started = subprocess.run([BROKER, "start", node], stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
        url = started.stdout.decode().strip().split("=", 1)[1]
        # Not in /tmp, which each job has to itself.
        python = pathlib.Path(ends.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))) / "python3"
        shutil.copy("/usr/bin/python3", python)
        worker = Worker("clients", url, folder, {
            "SANDPIPER_ENVIRONMENTS__BROKEN__PYTHON": str(python),
            "SANDPIPER_ENVIRONMENTS__BROKEN__WARM": "false",
        })
        ends.callback(lambda: (worker.process.kill(), worker.process.wait()))
        python.write_bytes(b"")  # now it is broken
        try:
            clients(url, folder)
            dify(url, folder)
            asyncapi(node)
        except BaseException:
            print("--- the end of the worker's log", *worker.log.read_text().splitlines()[-15:], sep="\n")
            raise
        code = worker.end(15)
        assert code == 0, f"the worker exits with {code} after SIGTERM"
        first_day(folder)


if __name__ == "__main__":
    main()

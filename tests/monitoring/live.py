"""What operators look at, against the real thing: a broker, two workers under load with failures of every kind, and
the Prometheus that scrapes them. Every panel of every dashboard must show data, every alert rule must be evaluated,
and the page about monitoring must say what is really exported and logged.

Needs deploy/broker, the worker's binary (SP_TEST_BIN), Debian's prometheus and pika; tests/run provides them.
"""

import collections
import contextlib
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import dashboards
import picture
from stack import CONFIG, KINDS, ROOT, Client, Load, Stack, await_true, mishaps

INTERVAL = "10s"  # what $__rate_interval is at a scrape a second
PAGE = ROOT / "deploy" / "MONITORING.md"

# Each of these must have happened for the panels to mean something.
HAPPENED = [
    *(f'sandpiper_jobs_completed_total{{status="{status}"}}' for status in (
        "succeeded", "failed", "signaled", "timeout", "cpu_limit", "memory_limit", "output_limit", "syscall_killed",
        "rejected", "cancelled", "expired")),
    *(f'sandpiper_deliveries_settled_total{{action="{action}"}}' for action in ("acked", "dead_lettered", "lost")),
    *(f'sandpiper_jobs_dead_lettered_total{{reason="{reason}"}}' for reason in ("malformed", "poison")),
    *(f'sandpiper_results_published_total{{outcome="{outcome}"}}' for outcome in ("confirmed", "returned")),
    *(f'sandpiper_job_start_seconds_count{{start="{start}"}}' for start in ("cold", "warm")),
    'sandpiper_connection_reconnects_total{role="consume"}', "sandpiper_jobs_redelivered_total",
    "sandpiper_results_redirected_total", 'sandpiper_syscall_kills_total{syscall="ptrace"}',
    'sandpiper_syscalls_refused_total{syscall="socket"}', "sandpiper_job_timeouts_total",
    'sandpiper_zygote_start_failures_total{environment="broken"}',
]


def every_kind_happens(stack):
    """Load until all of it has been seen, by Prometheus."""
    with Load(stack, lambda _: 15):
        mishaps(stack)
        for expression in HAPPENED:
            # A worker that was killed counts from 0 again.
            seen = f"sum(max_over_time({expression}[10m]))"
            await_true(f"{expression} is above 0", lambda seen=seen: stack.value(seen) > 0, seconds=60)
        # Rates want two samples, after the last start of a worker.
        time.sleep(4)
    await_true("the queue is empty", lambda: stack.value(
        'sum(rabbitmq_detailed_queue_messages{queue="sandpiper.jobs"})') == 0, seconds=60)


def every_panel_has_data(stack, began):
    end, span = time.time(), f"{int(time.time() - began)}s"
    empty, queries = [], 0
    for board in dashboards.load().values():
        for panel in dashboards.panels(board):
            for target in panel["targets"]:
                expression = dashboards.fill_in(board, target["expr"], INTERVAL, span)
                queries += 1
                # A stat shows the last value; what it is at rest says nothing, so it is looked at over time, too.
                data = stack.api("query_range", query=expression, start=began, end=end, step=1)["result"]
                values = [float(value) for series in data for _, value in series["values"]]
                if not any(math.isfinite(value) for value in values):
                    empty.append(f"{board['title']}, {panel['title']} ({panel['id']}): {expression}")
                wanted = set(re.findall(r"{{(\w+)}}", target.get("legendFormat", "")))
                for series in data:
                    missing = wanted - series["metric"].keys()
                    assert not missing, f"{panel['title']}: its legend names {missing}, which {series['metric']} has not"
    assert not empty, "no data for\n  " + "\n  ".join(empty)
    assert queries > 80, f"only {queries} queries"
    print(f"   {queries} queries, all with data")


def every_variable_finds_something(stack):
    for board in dashboards.load().values():
        for variable in board["templating"]["list"]:
            if variable["type"] != "query":
                continue
            match = re.fullmatch(r"label_values\((\w+(?:{.*})?), (\w+)\)", variable["query"]["query"])
            selector = match[1].replace("$job", ".+").replace("$rabbitmq", ".+")
            found = {series.get(match[2]) for series in stack.api("series", **{"match[]": selector})}
            assert found - {None, ""}, f"{board['title']}: the variable {variable['name']} has no value"


def rules_are_evaluated(stack):
    rules = [rule for group in stack.api("rules")["groups"] for rule in group["rules"]]
    assert len(rules) >= 14, f"only {len(rules)} rules are loaded"
    for rule in rules:
        assert rule["health"] == "ok", f"{rule['name']}: {rule['health']}: {rule.get('lastError')}"
    pending = {alert["labels"]["alertname"] for alert in stack.api("alerts")["alerts"]}
    for name in ("SandpiperDeadQueue", "SandpiperStartsCold"):
        assert name in pending, f"{name} should be pending at the least; there are {sorted(pending)}"


def exported(worker):
    """Name to type, labels and meaning, as a worker exports them; and each sample's labels."""
    kinds, meanings, labels, samples = {}, {}, collections.defaultdict(set), []
    for line in worker.get("/metrics").splitlines():
        if line.startswith("# HELP "):
            _, _, name, meaning = line.split(" ", 3)
            meanings[name] = meaning
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            kinds[name] = kind
        elif line and not line.startswith("#"):
            name, _, written = line.rsplit(" ", 1)[0].partition("{")
            pairs = dict(re.findall(r'(\w+)="([^"]*)"', written))
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            name = base if kinds.get(base) == "histogram" else name
            labels[name] |= pairs.keys() - {"le"}
            samples.append((name, pairs))
    return {name: (kind, labels[name], meanings[name]) for name, kind in kinds.items()}, samples


def the_page_names_what_is_exported(stack):
    real, _ = exported(stack.workers[0])
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", PAGE.read_text(), re.M)
    written = {name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows}
    assert len(rows) == len(written), "the table names one metric twice"
    for name in sorted(real.keys() | written.keys()):
        assert real.get(name) == written.get(name), (
            f"{PAGE.name}: {name} is {real.get(name, 'not exported')}, but the table says {written.get(name, 'nothing')}")
    print(f"   {len(real)} metrics")


def promtool_likes_them(stack):
    for worker in stack.workers:
        checked = subprocess.run(["promtool", "check", "metrics"], input=worker.get("/metrics").encode(),
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert checked.returncode == 0 and not checked.stdout, checked.stdout.decode()


def a_picture_can_be_drawn(stack, began):
    drawn = picture.draw(stack, "sandpiper-overview", began, time.time(), INTERVAL)
    assert drawn.startswith(b"\x89PNG") and 20_000 < len(drawn) < 200_000, f"{len(drawn)} bytes"


def labels_stay_bounded(stack):
    """Names that a publisher or a program invents are no labels."""
    client = Client(stack.url)
    ids = []
    for n in range(24):
        number = 460 + 7 * n
        for job in ({"environment": f"invented{n}", "code": "print(1)"},
                    {"code": f"import ctypes\nctypes.CDLL(None).syscall({number})\n"},
                    {"code": f"import ctypes\nctypes.CDLL(None).syscall(0x40000000 + {number})\n"}):
            ids.append(f"bounded-{len(ids)}")
            client.publish(job, ids[-1], client.reply_to)
    client.collect(ids)
    killed = [client.got[i][0][0]["syscall"] for i in ids]
    assert any(name and name.startswith(("x32:", "syscall_")) for name in killed), f"none was nameless: {set(killed)}"
    environments = set(re.findall(r"\[environments\.(\w+)\]", CONFIG))
    for worker in stack.workers:
        _, samples = exported(worker)
        for name, labels in samples:
            assert labels.get("environment", "default") in environments, (name, labels)
            assert labels.get("queue", "sandpiper.jobs") == "sandpiper.jobs", (name, labels)
            assert re.fullmatch(r"[a-z][a-z0-9_]*", labels.get("syscall", "unknown")), (name, labels)
            assert not labels.get("syscall", "").startswith("syscall_"), (name, labels)
        assert len(samples) < 2500, f"{len(samples)} samples"


def a_broken_environment_shows(stack):
    """It takes jobs, and says that one of its environments starts all of them cold, and why."""
    for worker in stack.workers:
        text = worker.get("/readyz")
        assert text.startswith("ready\n") and "environment broken starts every job cold" in text, text
    assert stack.value('sum(sandpiper_zygote_up{environment="broken"})') == 0
    assert stack.value('sum(sandpiper_zygote_up{environment="reports"})') == len(stack.workers)
    assert stack.api("query", query='sandpiper_zygote_up{environment="fresh"}')["result"] == [], "it is never warm"


def the_log_is_as_the_page_says(stack):
    """One event a job, with the fields of the example, and nothing of the job's code or output."""
    page = PAGE.read_text()
    example = json.loads(re.search(r"```json\n(.*?)\n```", page, re.S)[1])
    events = [json.loads(line) for worker in stack.workers for line in worker.log.read_text().splitlines()]
    ended = [event for event in events if event["message"] == example["message"]]
    ids = collections.Counter(event["id"] for event in ended)
    for kind in KINDS:
        assert any(i.startswith(kind + "-") for i in ids), f"no event for a job of the kind {kind}"
    once = [i for i in ids if i.startswith(tuple(f"{kind}-" for kind in KINDS))]
    assert sum(ids[i] for i in once) <= len(once) * 1.1, "more than an event a job"
    fields = set().union(*(event.keys() for event in ended))
    listed = set(re.findall(r"^\| `(\w+)` \| [^|]+ \|$", page[page.index("## Logs"):page.index("## Traces")], re.M))
    assert fields == listed, f"the page lists {sorted(listed)}, the log has {sorted(fields)}"
    for name, value in example.items():
        assert any(type(event.get(name)) is type(value) for event in ended), f"no event has {name} like the example"
    text = json.dumps(events)
    for secret in ("sum(range(1000))", "499500", "guest:guest"):
        assert secret not in text, f"the log says {secret!r}"


def main():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        pathlib.Path(folder).chmod(0o755)
        began = time.time()
        stack = ends.enter_context(Stack(folder))
        print(f"   everything is up after {time.time() - began:.1f} s", flush=True)

        def check(name, function, *arguments):
            start = time.monotonic()
            try:
                function(*arguments)
            except BaseException:
                for worker in stack.workers:
                    print(f"--- the end of {worker.name}'s log", *worker.log.read_text().splitlines()[-15:], sep="\n")
                print(f"FAILED {name}", flush=True)
                raise
            print(f"ok {name} ({time.monotonic() - start:.1f} s)", flush=True)

        check("failures of every kind", every_kind_happens, stack)
        check("every panel has data", every_panel_has_data, stack, began)
        check("every variable finds something", every_variable_finds_something, stack)
        check("the alert rules are evaluated", rules_are_evaluated, stack)
        check("the metrics are those of the page", the_page_names_what_is_exported, stack)
        check("promtool check metrics", promtool_likes_them, stack)
        check("a picture can be drawn", a_picture_can_be_drawn, stack, began)
        check("labels stay bounded", labels_stay_bounded, stack)
        check("a broken environment shows", a_broken_environment_shows, stack)
        for worker in stack.workers:
            worker.end(signal.SIGTERM)
        check("the log is as the page says", the_log_is_as_the_page_says, stack)


if __name__ == "__main__":
    sys.exit(main())

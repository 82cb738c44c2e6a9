"""Traces as a collector gets them: a worker built with the feature `otlp`, a broker, and a server that takes what is
sent and reads it with the messages that OpenTelemetry publishes for Python, which share no code with the sender.

Needs deploy/broker, such a worker (SP_TEST_BIN), pika and opentelemetry-proto; tests/run provides them.
"""

import contextlib
import http.server
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from outside_client import BROKER, JOBS, WORKER, Client, Worker, await_true

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans, or refuses them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Take)
        self.got, self.code, self.refused = [], 200, 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans(self):
        """Each with the attributes of the program that sent it."""
        return [(values(group.resource), span) for request in self.got for group in request.resource_spans
                for scope in group.scope_spans for span in scope.spans]


class Take(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.code == 200:
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf", self.headers
            self.server.got.append(ExportTraceServiceRequest.FromString(body))
        else:
            self.server.refused += 1
        self.send_response(self.server.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def values(holder):
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in holder.attributes}


def every_job_has_its_span(url, folder, client, collector):
    worker = Worker("traced", url, folder, {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"})
    trace = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=7"}
    client.publish({"id": "asked", "code": "import time; time.sleep(0.2)"}, "c-asked", client.reply_to, headers=trace)
    client.publish({"id": "failed", "code": "raise SystemExit(7)"}, "c-failed", client.reply_to)
    client.publish({"id": "refused", "tiemout": 1}, "c-refused", client.reply_to)
    unsampled = {"traceparent": f"00-{TRACE[::-1]}-{PARENT}-00"}
    client.publish({"id": "unsampled", "code": "print(1)"}, "c-unsampled", client.reply_to, headers=unsampled)
    client.collect(["c-asked", "c-failed", "c-refused", "c-unsampled"])
    _, properties = client.got["c-asked"][0]
    assert properties.headers["traceparent"] == trace["traceparent"], "the requester's own context goes back to it"
    # What waits for the next batch is sent at the end.
    assert worker.end(signal.SIGTERM) == 0, worker.log.read_text()

    spans = collector.spans()
    jobs = {values(span)["sandpiper.job.id"]: span for _, span in spans if span.kind == Span.SPAN_KIND_CONSUMER}
    assert jobs.keys() == {"asked", "failed", "refused"}, f"one each, and none that its requester does not want: {jobs.keys()}"
    for sender, _ in spans:
        assert sender["service.name"] == "sandpiper" and sender["service.instance.id"] == "traced", sender
        assert sender["service.version"], sender

    asked = jobs["asked"]
    assert (asked.trace_id.hex(), asked.parent_span_id.hex(), asked.trace_state) == (TRACE, PARENT, "vendor=7"), asked
    assert asked.name == f"process {JOBS}" and asked.status.code == Status.STATUS_CODE_UNSET, asked
    said = values(asked)
    wanted = {
        "messaging.system": "rabbitmq", "messaging.operation.type": "process", "messaging.operation.name": "process",
        "messaging.destination.name": JOBS, "messaging.message.conversation_id": "c-asked",
        "sandpiper.job.status": "succeeded", "sandpiper.job.attempt": 1, "process.exit.code": 0,
    }
    assert said.items() >= wanted.items() and said["messaging.message.body.size"] > 20 and "error.type" not in said, said
    parts = {span.name: span for _, span in spans if span.parent_span_id == asked.span_id}
    assert parts.keys() == {"start", "run"}, parts.keys()
    start, run = parts["start"], parts["run"]
    assert start.trace_id == run.trace_id == asked.trace_id
    times = [asked.start_time_unix_nano, start.start_time_unix_nano, start.end_time_unix_nano, run.start_time_unix_nano,
             run.end_time_unix_nano, asked.end_time_unix_nano]
    # Taken by clocks that are read one after the other.
    assert all(later - earlier > -2_000_000 for earlier, later in zip(times, times[1:])), times
    assert run.end_time_unix_nano - run.start_time_unix_nano > 200_000_000, run

    for name, status in (("failed", "failed"), ("refused", "rejected")):
        span = jobs[name]
        assert span.status.code == Status.STATUS_CODE_ERROR and span.status.message == status, span
        assert values(span)["error.type"] == status and not span.parent_span_id and span.trace_id, span
    assert values(jobs["failed"])["process.exit.code"] == 7
    assert not [span for _, span in spans if span.parent_span_id == jobs["refused"].span_id], "it never ran"


def a_collector_that_takes_nothing_is_no_matter(url, folder, client, collector):
    collector.code = 503
    endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    settings = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_SERVICE_NAME": "mine"}
    worker = Worker("unheard", url, folder, settings)
    for n in range(20):
        client.publish({"id": f"job-{n}", "code": "print(1)"}, f"c-{n}", client.reply_to)
    client.collect([f"c-{n}" for n in range(20)])
    await_true("it was tried", lambda: collector.refused)
    await_true("the log says so", lambda: "503" in worker.log.read_text())
    collector.shutdown()
    collector.server_close()
    client.publish({"id": "last", "code": "print(1)"}, "c-last", client.reply_to)
    client.collect(["c-last"])
    assert worker.end(signal.SIGTERM) == 0, worker.log.read_text()


def a_collector_that_never_answers_holds_nothing_up(url, folder, client):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        worker = Worker("patient", url, folder, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        client.publish({"id": "silent", "code": "print(1)"}, "c-silent", client.reply_to)
        client.collect(["c-silent"])
        began = time.monotonic()
        assert worker.end(signal.SIGTERM) == 0, worker.log.read_text()
        # The export itself would wait for ten.
        assert time.monotonic() - began < 8, worker.log.read_text()
        assert "the last traces could not be sent" in worker.log.read_text(), worker.log.read_text()


def what_is_switched_off_sends_nothing(url, folder, client):
    collector = Collector()
    endpoint = f"http://127.0.0.1:{collector.server_port}"
    for n, off in enumerate(({"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"},
                             {"OTEL_TRACES_SAMPLER": "always_off"})):
        worker = Worker(f"off-{n}", url, folder, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint} | off)
        client.publish({"id": f"off-{n}", "code": "print(1)"}, f"c-off-{n}", client.reply_to)
        client.collect([f"c-off-{n}"])
        assert worker.end(signal.SIGTERM) == 0, worker.log.read_text()
        assert not collector.got, (off, collector.got)


def what_will_not_do_is_refused(url):
    for variable, value, remedy in (
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4318", "must begin with http://"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf"),
    ):
        env = os.environ | {"SANDPIPER_AMQP__URL": url, "SANDPIPER_HTTP__LISTEN": "127.0.0.1:0",
                            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"} | {variable: value}
        ended = subprocess.run([WORKER, "serve"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                               timeout=60)
        said = f"{variable}={value}: {remedy}"
        assert ended.returncode == 1 and said in ended.stderr, (ended.returncode, ended.stderr)


def main():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ends:
        node = pathlib.Path(folder) / "broker"
        ends.callback(subprocess.run, [BROKER, "stop", node], stdin=subprocess.DEVNULL)
        started = subprocess.run([BROKER, "start", node], stdout=subprocess.PIPE, check=True, stdin=subprocess.DEVNULL)
        url = started.stdout.decode().strip().split("=", 1)[1]
        client, collector = Client(url), Collector()
        every_job_has_its_span(url, folder, client, collector)
        a_collector_that_takes_nothing_is_no_matter(url, folder, client, collector)
        a_collector_that_never_answers_holds_nothing_up(url, folder, client)
        what_is_switched_off_sends_nothing(url, folder, client)
        what_will_not_do_is_refused(url)
    print("every job has its span; a collector that takes nothing or never answers is no matter; off is off; what will "
          "not do is refused")


if __name__ == "__main__":
    main()

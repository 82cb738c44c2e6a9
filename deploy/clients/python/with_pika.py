"""Sandpiper from Python with pika: one connection, one thread, nothing but calls that wait.

    pip install -r requirements.txt
    python with_pika.py amqp://guest:guest@127.0.0.1:5672/%2f ../jobs.ndjson

Copy the class and advice.py. `main` shows them at work.
"""

import base64
import collections
import json
import random
import sys
import time
import uuid

import pika

from advice import advice


class Sandpiper:
    def __init__(self, url, direct=False):
        self.connection = pika.BlockingConnection(pika.URLParameters(url))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()  # publishing returns when the broker keeps the job, or raises
        if direct:  # no queue at all: quickest, and what comes when we are gone is lost
            self.reply_to = "amq.rabbitmq.reply-to"
        else:  # a queue of our own: what comes when we are gone is in sandpiper.results
            self.reply_to = self.channel.queue_declare("", exclusive=True).method.queue
        self.results, self.listeners, self.shown = {}, {}, collections.Counter()
        self.seen, self.duplicates = {}, 0
        self.channel.basic_consume(self.reply_to, self._take, auto_ack=True)

    def submit(self, job, on_output=None):
        job = {"id": str(uuid.uuid4()), "stream": on_output is not None} | job
        self.listeners[job["id"]] = on_output
        properties = pika.BasicProperties(
            reply_to=self.reply_to,
            correlation_id=job["id"],
            message_id=job["id"],
            content_type="application/json",
            timestamp=int(time.time()),
            delivery_mode=2,
        )
        self.channel.basic_publish("", "sandpiper.jobs", json.dumps(job), properties, mandatory=True)
        return job["id"]

    def result(self, job_id, timeout=60):
        """Waits. After a TimeoutError the job may still run: cancel it, or go on waiting."""
        end = time.monotonic() + timeout
        while job_id not in self.results:
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError(f"no result of {job_id} within {timeout} s")
            self.connection.process_data_events(left)
        return self.results.pop(job_id)

    def run(self, job, on_output=None, attempts=2):
        """Tries again where that helps, under a new id: results under one id are duplicates."""
        result = None
        for attempt in range(attempts):
            if result:
                time.sleep(random.uniform(0.5, 1) * 2**attempt)
                job = job | {"id": f"{result['id']}.{attempt}"}
            result = self.result(self.submit(job, on_output))
            if advice(result) != "retry":
                break
        return result

    def cancel(self, job_id):
        body = json.dumps({"cancel": job_id})
        self.channel.basic_publish("sandpiper.control", "", body, mandatory=True)

    def _take(self, _channel, _method, properties, body):
        if properties.message_id in self.seen:  # delivery is at least once
            self.duplicates += 1
            return
        self.seen[properties.message_id] = True
        if len(self.seen) > 10_000:
            del self.seen[next(iter(self.seen))]
        job_id, message = properties.correlation_id, json.loads(body)
        if properties.type == "output":
            # A job that had to start again sends its output from 0 again: what was shown is not shown twice.
            if job_id in self.listeners and message["seq"] == self.shown[job_id]:
                self.shown[job_id] += 1
                self.listeners[job_id](message)
        else:
            self.listeners.pop(job_id, None)
            self.shown.pop(job_id, None)
            self.results[job_id] = message


def show(name, result):
    print(f"{name}: {result['status']}, {advice(result)}: {result['error'] or result['stdout'].strip()}")


def main(url, jobs):
    sandpiper = Sandpiper(url)

    print("== every status")
    with open(jobs) as lines:
        for job in map(json.loads, lines):
            show(job["id"], sandpiper.run(job))

    print("== output while it runs")
    count = "import time\nfor n in range(3):\n    print('step', n)\n    time.sleep(0.3)"
    show("counts", sandpiper.run({"code": count}, on_output=lambda piece: print(piece["data"], end="")))

    print("== cancelled while it runs")
    sleep = "import time\nprint('started')\ntime.sleep(60)"
    show("sleeps", sandpiper.run({"code": sleep}, on_output=lambda piece: sandpiper.cancel(piece["id"])))

    print("== files in, files out, metadata")
    result = sandpiper.run({
        "code": "import os\nos.mkdir('out')\nopen('out/upper.txt', 'w').write(open('in.txt').read().upper())",
        "files": [{"path": "in.txt", "content": "hello"}],
        "artifacts": ["out/*.txt"],
        "metadata": {"customer": "c-17"},
    })
    for file in result["artifacts"]:
        print(file["path"], base64.b64decode(file["base64"]).decode(), result["metadata"]["customer"])

    print("== published twice, handled once")
    job = {"id": str(uuid.uuid4()), "code": "print('once')"}
    sandpiper.submit(job)
    show("twice", sandpiper.result(sandpiper.submit(job)))
    while not sandpiper.duplicates:
        sandpiper.connection.process_data_events(1)
    print("duplicates dropped:", sandpiper.duplicates)

    print("== direct reply-to")
    show("direct", Sandpiper(url, direct=True).run({"code": "print(6 * 7)"}))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

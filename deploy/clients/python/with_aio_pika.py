"""Sandpiper from Python with aio-pika: many jobs at once, and a connection that comes back by itself.

    pip install -r requirements.txt
    python with_aio_pika.py amqp://guest:guest@127.0.0.1:5672/%2f ../jobs.ndjson

Copy the class and advice.py. `main` shows them at work.
"""

import asyncio
import base64
import json
import random
import sys
import uuid
from datetime import datetime, timezone

import aio_pika

from advice import advice


class Sandpiper:
    @classmethod
    async def connect(cls, url, direct=False):
        self = cls()
        self.connection = await aio_pika.connect_robust(url)
        # Publishing returns when the broker keeps the job, and raises where there is no jobs queue.
        self.channel = await self.connection.channel(on_return_raises=True)
        self.control = await self.channel.get_exchange("sandpiper.control")
        if direct:  # no queue at all: quickest, and what comes when we are gone is lost
            queue = await self.channel.get_queue("amq.rabbitmq.reply-to", ensure=False)
        else:  # a queue of our own: what comes when we are gone is in sandpiper.results
            queue = await self.channel.declare_queue(f"replies.{uuid.uuid4()}", exclusive=True)
        self.reply_to, self.results, self.listeners, self.shown = queue.name, {}, {}, {}
        self.seen, self.duplicates = {}, 0
        await queue.consume(self._take, no_ack=True)
        return self

    async def submit(self, job, on_output=None):
        """A future of the result. One that is given up does not stop the job: cancel does."""
        job = {"id": str(uuid.uuid4()), "stream": on_output is not None} | job
        result = self.results.setdefault(job["id"], asyncio.get_running_loop().create_future())
        self.listeners[job["id"]], self.shown[job["id"]] = on_output, 0
        message = aio_pika.Message(
            json.dumps(job).encode(),
            reply_to=self.reply_to,
            correlation_id=job["id"],
            message_id=job["id"],
            content_type="application/json",
            timestamp=datetime.now(timezone.utc),
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        )
        await self.channel.default_exchange.publish(message, "sandpiper.jobs")
        return result

    async def run(self, job, on_output=None, attempts=2, timeout=60):
        """Tries again where that helps, under a new id: results under one id are duplicates."""
        result = None
        for attempt in range(attempts):
            if result:
                await asyncio.sleep(random.uniform(0.5, 1) * 2**attempt)
                job = job | {"id": f"{result['id']}.{attempt}"}
            result = await asyncio.wait_for(await self.submit(job, on_output), timeout)
            if advice(result) != "retry":
                break
        return result

    async def cancel(self, job_id):
        await self.control.publish(aio_pika.Message(json.dumps({"cancel": job_id}).encode()), "")

    async def _take(self, message):
        if message.message_id in self.seen:  # delivery is at least once
            self.duplicates += 1
            return
        self.seen[message.message_id] = True
        if len(self.seen) > 10_000:
            del self.seen[next(iter(self.seen))]
        job_id, body = message.correlation_id, json.loads(message.body)
        if message.type == "output":
            # A job that had to start again sends its output from 0 again: what was shown is not shown twice.
            if job_id in self.listeners and body["seq"] == self.shown[job_id]:
                self.shown[job_id] += 1
                await self.listeners[job_id](body)
        elif result := self.results.pop(job_id, None):
            del self.listeners[job_id], self.shown[job_id]
            if not result.cancelled():  # nobody waits any more
                result.set_result(body)


def show(name, result):
    print(f"{name}: {result['status']}, {advice(result)}: {result['error'] or result['stdout'].strip()}")


async def main(url, jobs):
    sandpiper = await Sandpiper.connect(url)

    print("== every status")
    with open(jobs) as lines:
        jobs = [json.loads(line) for line in lines]
    for job, result in zip(jobs, await asyncio.gather(*map(sandpiper.run, jobs))):
        show(job["id"], result)

    print("== output while it runs")
    async def write(piece):
        print(piece["data"], end="")
    count = "import time\nfor n in range(3):\n    print('step', n)\n    time.sleep(0.3)"
    show("counts", await sandpiper.run({"code": count}, on_output=write))

    print("== cancelled while it runs")
    async def cancel(piece):
        await sandpiper.cancel(piece["id"])
    sleep = "import time\nprint('started')\ntime.sleep(60)"
    show("sleeps", await sandpiper.run({"code": sleep}, on_output=cancel))

    print("== files in, files out, metadata")
    result = await sandpiper.run({
        "code": "import os\nos.mkdir('out')\nopen('out/upper.txt', 'w').write(open('in.txt').read().upper())",
        "files": [{"path": "in.txt", "content": "hello"}],
        "artifacts": ["out/*.txt"],
        "metadata": {"customer": "c-17"},
    })
    for file in result["artifacts"]:
        print(file["path"], base64.b64decode(file["base64"]).decode(), result["metadata"]["customer"])

    print("== published twice, handled once")
    job = {"id": str(uuid.uuid4()), "code": "print('once')"}
    await sandpiper.submit(job)
    show("twice", await (await sandpiper.submit(job)))
    while not sandpiper.duplicates:
        await asyncio.sleep(0.05)
    print("duplicates dropped:", sandpiper.duplicates)

    print("== direct reply-to")
    direct = await Sandpiper.connect(url, direct=True)
    show("direct", await direct.run({"code": "print(6 * 7)"}))
    await direct.connection.close()
    await sandpiper.connection.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))

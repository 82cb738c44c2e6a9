"""Jobs over the broker, and what came back."""

import json
import threading
import time
import uuid

import pika

from report import SLOW, say


class Load:
    """So many jobs of one program, published at once; waits until all are answered, or none came for long."""

    def __init__(self, count, code="print(1)", quiet=60, at=None, then=None, **limits):
        """Gives up when none came for `quiet` seconds of a real machine, however long all of them take.

        With `at` and `then`: when that part of them is answered, `then` is called beside.
        """
        self.count, self.duplicates = count, 0
        self.statuses, self.errors, self.workers, self.peaks = {}, {}, {}, []
        self._answered, self._last = set(), time.monotonic()
        connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", 5672, heartbeat=0))
        channel = connection.channel()
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_consume(queue, self._on_result, auto_ack=True)
        began = time.monotonic()
        for _ in range(count):
            name = str(uuid.uuid4())
            properties = pika.BasicProperties(reply_to=queue, correlation_id=name, delivery_mode=2)
            # How slow the machine is, a job should notice neither by time nor by CPU time, up to what the worker allows.
            patience = int(min(60_000 * SLOW, 300_000))
            job = {"id": name, "code": code, "timeout_ms": patience, "limits": {"cpu_ms": patience, **limits}}
            channel.basic_publish("", "sandpiper.jobs", json.dumps(job), properties)
        beside, told = None, began
        while len(self._answered) < count and time.monotonic() - self._last < quiet * SLOW:
            connection.process_data_events(0.2)
            if time.monotonic() - told > 60:
                told = time.monotonic()
                say(f"{self.answered} of {count} answered after {told - began:.0f} s")
            if then and beside is None and len(self._answered) >= count * at:
                beside = threading.Thread(target=then)
                beside.start()
        if beside:
            beside.join()
        # What comes twice may come late.
        connection.process_data_events(1)
        connection.close()
        self.seconds = time.monotonic() - began
        say(self)

    def _on_result(self, _channel, _method, properties, body):
        result = json.loads(body)
        if properties.correlation_id in self._answered:
            self.duplicates += 1
            return
        self._answered.add(properties.correlation_id)
        self._last = time.monotonic()
        for where, key in ((self.statuses, result["status"]), (self.workers, result["worker"])):
            where[key] = where.get(key, 0) + 1
        if result["status"] != "succeeded":
            why = " ".join(each for each in (result["signal"], result["error"]) if each)
            self.errors[why] = self.errors.get(why, 0) + 1
        self.peaks.append((result["usage"] or {}).get("memory_peak_bytes") or 0)

    @property
    def answered(self):
        """How many have a result."""
        return len(self._answered)

    def all_are(self, *statuses):
        """Every job has a result, with one of these."""
        return self.answered == self.count and set(self.statuses) <= set(statuses)

    def __str__(self):
        """For the note of a check."""
        return (
            f"{self.answered} of {self.count} answered in {self.seconds:.1f} s, {self.duplicates} twice, "
            f"{self.statuses} {self.errors or ''}"
        )

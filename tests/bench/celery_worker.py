"""The worker that `queue` compares with: Celery as it is commonly set up for such jobs. Its task runs the code as
a process of its own and returns what it printed; there is no sandbox at all.
"""
import os
import pathlib
import subprocess

from celery import Celery
from celery.signals import worker_ready

app = Celery(
    "bench",
    broker=os.environ["SP_BENCH_URL"],
    # Results as messages on the queue that the publisher names.
    backend="rpc://",
)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    task_default_queue=os.environ["SP_BENCH_QUEUE"],
    broker_connection_retry_on_startup=True,
)


@app.task(name="run")
def run(code):
    done = subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True, text=True, timeout=30, check=True)
    return done.stdout


@worker_ready.connect
def ready(**_):
    pathlib.Path(os.environ["SP_BENCH_READY"]).touch()

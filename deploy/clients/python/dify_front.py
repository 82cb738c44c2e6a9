"""dify-sandbox's HTTP API in front of Sandpiper: what called POST /v1/sandbox/run goes on calling it.

    pip install -r requirements.txt
    API_KEY=dify-sandbox python dify_front.py amqp://guest:guest@127.0.0.1:5672/%2f 8194

API_KEY, MAX_REQUESTS, ENABLE_NETWORK and ENABLE_PRELOAD mean what they mean to dify-sandbox, except that without
ENABLE_NETWORK a job runs without the network instead of not at all: Dify asks for it with every job. Plain HTTP
on 127.0.0.1, or on HOST; what differs is in deploy/MIGRATION.md.
"""

import asyncio
import base64
import datetime
import hmac
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from with_aio_pika import Sandpiper

PATIENCE = 60  # seconds, as Dify has
LARGEST = 8 << 20
NETWORK, PRELOAD = (os.environ.get(name, "").lower() in ("1", "t", "true") for name in ("ENABLE_NETWORK", "ENABLE_PRELOAD"))


def to_job(request):
    until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=PATIENCE)
    job = {"code": request["code"], "deadline": until.isoformat()}
    if PRELOAD:
        job["preload"] = request.get("preload", "")
    if NETWORK:
        job["enable_network"] = request.get("enable_network", False)
    return job


def text(result, stream):
    if result[f"{stream}_encoding"] == "base64":
        return base64.b64decode(result[stream]).decode(errors="replace")
    return result[stream]


def to_response(result):
    status = result["status"]
    if status == "rejected":
        return failure(-400, result["error"])
    if status in ("worker_error", "cancelled", "expired"):
        return failure(-500, result["error"])
    last = {
        "succeeded": "",
        "failed": f"error: exit status {result['exit_code']}\n",
        "timeout": "error: timeout\n",
        "syscall_killed": "error: operation not permitted\n",
    }.get(status, f"error: {result['error']}\n")
    return success({"error": text(result, "stderr") + last, "stdout": text(result, "stdout")})


def success(data):
    return {"code": 0, "message": "success", "data": data}


def failure(code, message):
    return {"code": code, "message": message, "data": None}


class Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 2 * PATIENCE

    def do_GET(self):
        if self.path == "/health":
            self.answer(200, "ok")
        elif self.path.startswith("/v1/sandbox/dependencies"):
            if self.allowed():
                self.answer(200, success({"dependencies": []}))
        else:
            self.answer(404, "404 page not found")

    def do_POST(self):
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True  # what follows is not read
            return self.answer(413, failure(-413, f"a body needs a Content-Length of at most {LARGEST}"))
        body = self.rfile.read(int(length))
        if self.path != "/v1/sandbox/run":
            self.answer(404, "404 page not found")
        elif self.allowed():
            if not self.server.places.acquire(blocking=False):
                return self.answer(503, failure(-503, "Too many requests"))
            try:
                answer = self.run(body)
            finally:
                self.server.places.release()
            self.answer(*answer)

    def run(self, body):
        try:
            request = json.loads(body)
            language, job = request["language"], to_job(request)
        except (ValueError, TypeError, KeyError) as error:
            return 400, failure(-400, f"not a request to run code: {error!r}")
        if language != "python3":
            return 400, failure(-400, "unsupported language")
        try:
            return 200, to_response(self.server.call(self.server.sandpiper.run(job, timeout=PATIENCE)))
        except Exception as error:  # noqa: BLE001 - the broker is away, or no result came
            return 200, failure(-500, f"no result: {error!r}")

    def allowed(self):
        given = self.headers.get("X-Api-Key", "")
        if hmac.compare_digest(given.encode(), self.server.key.encode()):
            return True
        self.answer(401, None)
        return False

    def answer(self, status, content):
        body = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(url, port):
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    front = ThreadingHTTPServer((os.environ.get("HOST", "127.0.0.1"), int(port)), Front)
    front.call = lambda work: asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, 2 * PATIENCE), loop).result()
    front.sandpiper = front.call(Sandpiper.connect(url))
    front.key = os.environ["API_KEY"]
    front.places = threading.BoundedSemaphore(int(os.environ.get("MAX_REQUESTS", 50)))
    front.serve_forever()


if __name__ == "__main__":
    if len(sys.argv) != 3 or not os.environ.get("API_KEY"):
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""A server on loopback that judges by a script."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megatron_moellava.evaluation.judge import Judge


class StubJudge:
    """Replies with the texts of `script` in turn (an integer is an HTTP status); keeps what it was asked."""

    def __init__(self, script, model="stub-1"):
        self.script, self.requests, self.headers = list(script), [], []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.requests.append(body | {"path": self.path})
                stub.headers.append(dict(self.headers))
                reply = stub.script.pop(0)
                status = reply if isinstance(reply, int) else 200
                answer = {"model": model, "choices": [{"message": {"role": "assistant", "content": reply}}]}
                payload = json.dumps(answer if status == 200 else {"error": {"message": "busy"}}).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", f"{stub.url}/elsewhere")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

            def do_GET(self):  # where a followed redirect would arrive
                stub.requests.append({"path": self.path})
                self.send_error(404)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def judge(self, **more):
        return Judge(url=self.url, model="asked-for", first_wait_seconds=0.001, **more)

"""`vllm serve` as the benches start it: /health, and /v1/completions in vLLM's way of streaming."""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REFUSES = os.environ.get("FAKE_VLLM") == "refuse"


def option(name):
    return sys.argv[sys.argv.index(name) + 1]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == NAME and body["ignore_eos"]
        assert all(isinstance(token, int) for token in body["prompt"])
        if REFUSES:
            said = b'{"error": {"message": "no room"}}'
            self.send_response(400)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["max_tokens"]
        for token in range(count):
            reason = "length" if token == count - 1 else None
            self.event({"choices": [{"index": 0, "text": f" t{token}", "finish_reason": reason}]})
        self.event({"choices": [], "usage": {"completion_tokens": count}})
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, value):
        self.chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))


if __name__ == "__main__":
    assert sys.argv[1] == "serve"
    for name in ("config.json", "tokenizer.json"):
        assert os.path.exists(os.path.join(sys.argv[2], name)), name
    assert option("--load-format") in ("auto", "dummy")
    NAME = option("--served-model-name")
    ThreadingHTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()

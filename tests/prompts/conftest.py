"""A stand-in for an OpenAI-compatible server."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class StandIn:
    """Answers each request with the next of `answers`, the last one again and again.

    An answer is a text, (status, body), or seconds of silence.
    """

    def __init__(self):
        self.answers, self.asked = ["A red ball."], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(
                    self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}"
                )
                outer.asked.append((self.path, dict(self.headers), body))
                answers = outer.answers
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = (200, b"{}")
                if isinstance(answer, str):
                    answer = (200, completion(answer))
                status, data = answer
                if status is None:
                    return  # without an answer
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", data)
                    data = b""
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def completion(content, **message):
    message = {"role": "assistant", "content": content, **message}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sora_jax.prompts.writers._PAUSE", 0.0)
    server = StandIn()
    yield server
    server.close()

"""A judge at an endpoint that says what a test wants."""

import json
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from zephyr import source


@contextmanager
def judging():
    """Give a judge that says what `says` makes of the request's body; a number is its status.

    It has the log-probs that `knows` makes of the body, and keeps the bodies in `asked`, models and
    keys in `keys`, and in `replies` the messages with the reply.
    """

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            httpd.asked.append(body)
            httpd.keys.append((body["model"], self.headers["Authorization"]))
            said, status = httpd.says(body), 200
            if isinstance(said, int):
                status, reply = said, {"error": {"message": httpd.why}}
            else:
                choice = {"message": {"content": said}, "finish_reason": "stop"}
                if body.get("logprobs") and (top := httpd.knows(body)):
                    letters = [{"token": t, "logprob": x} for t, x in top.items()]
                    choice["logprobs"] = {"content": [letters[0] | {"top_logprobs": letters}]}
                usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
                reply = {"choices": [choice], "usage": usage}
            httpd.replies.append({"messages": body["messages"], "reply": reply})
            data = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # of its 5, a burst of connections fills it, and waits a second

    httpd = Server(("127.0.0.1", 0), Judge)
    httpd.asked, httpd.says, httpd.why = [], lambda body: "Fine. [[7]]", "no"
    httpd.knows, httpd.replies, httpd.keys = lambda body: None, [], []
    httpd.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield httpd
    finally:
        httpd.shutdown()
        httpd.server_close()


def not_there(command, files, server, capsys, monkeypatch):
    """Give a judge's command an endpoint at which nobody answers; it costs one line."""
    quick = partial(source.ask_endpoint, sleep=lambda seconds: None)
    monkeypatch.setattr(source, "ask_endpoint", quick)
    server.url = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    assert ended.value.code == 2 and "cannot be reached" in capsys.readouterr().err

"""The village's judge as an OpenAI-compatible endpoint:   python -m zephyr.toy serve [--port N]

`zephyr.evals` and `zephyr.feedback collect` ask it as they would ask GPT-4. It reads the prompts in
FORMS and no others, and no sampling parameter changes its mind. Only this machine can reach it.
"""

import argparse
import json
import math
import os
import re
import signal
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zephyr.files import atomic, home, shown
from zephyr.toy.village import judge

NAME = "larkmere-judge"
LARGEST = 1 << 20  # bytes of a request
# who asks, how the prompt holds a question and one answer or two, and what is said to it: {0.score}
# is the first answer's, and {letter}, m or M, is that of the better one
FORMS = {
    "judge alpaca": (
        r"(?s)\[Instruction\]\n(.*?)\n\n\[Answer m\]\n(.*?)\n\n\[Answer M\]\n(.*)\n\nWhich of ",
        "{letter}",
    ),
    "judge mt-bench": (
        r"(?s)Question\]\n(.*?)\n\n\[The Start of Assistant's Answer\]\n(.*)\n\[The End of ",
        "{0.critique}. Rating: [[{0.score:g}]]",
    ),
    "feedback collect": (
        r"(?s)\[Instruction\]\n(.*?)\n\n\[Response\]\n(.*)\n\nRate the response from 1 to 10 ",
        "{0.critique}.\nRating: {0.score:.0f}",
    ),
}


def reply(body: dict) -> dict:
    """Return the answer to a request's body. Raises ValueError for one that it does not take."""
    try:
        model, contents = body["model"], [message["content"] for message in body["messages"]]
        words, prompt = sum(len(text.split()) for text in contents), contents[-1]
    except (TypeError, LookupError, AttributeError):
        raise ValueError("a request has a model, and messages whose content is text") from None
    if model != NAME or body.get("stream") or body.get("n", 1) != 1:
        raise ValueError(f"the model is {NAME}, which gives one choice, and does not stream it")
    found = [(match, text) for form, text in FORMS.values() if (match := re.search(form, prompt))]
    if not found:
        known = ", ".join(FORMS)
        raise ValueError(f"{shown(prompt, 40)} is no prompt of {known}, which are all it takes")
    question, *answers = found[0][0].groups()
    verdicts = [judge(question, answer) for answer in answers]
    logprobs, letters = None, []
    if len(verdicts) == 2:  # P(letter) is σ(10 gap): 1/2 for equal scores, 0.73 for 0.1 more
        gap = 10 * (verdicts[0].score - verdicts[1].score)
        by_letter = {"m": -math.log1p(math.exp(-gap)), "M": -math.log1p(math.exp(gap))}
        letters = [{"token": c, "logprob": by_letter[c]} for c in ("mM" if gap >= 0 else "Mm")]
        if body.get("logprobs"):
            top = letters[: body.get("top_logprobs") or 0]
            logprobs = {"content": [letters[0] | {"top_logprobs": top}]}
    text = found[0][1].format(*verdicts, letter=letters and letters[0]["token"])
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choice |= {"logprobs": logprobs, "finish_reason": "stop"}
    said = len(text.split())
    usage = {"prompt_tokens": words, "completion_tokens": said, "total_tokens": words + said}
    return {"object": "chat.completion", "model": NAME, "choices": [choice], "usage": usage}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": NAME, "object": "model"}]})

    def do_POST(self) -> None:
        try:
            if self.path != "/v1/chat/completions":
                raise ValueError(f"{self.path} is not /v1/chat/completions")
            if not 0 < (size := int(self.headers.get("Content-Length", 0))) <= LARGEST:
                left = size  # is read too: who still sends would not see the answer
                while left > 0 and (read := self.rfile.read(min(left, 1 << 16))):
                    left -= len(read)
                raise ValueError(f"a request's Content-Length is 1 to {LARGEST}, not {size}")
            self.answer(200, reply(json.loads(self.rfile.read(size))))
        except (ValueError, RecursionError) as error:
            about = {"type": "invalid_request_error", "param": None, "code": None}
            self.answer(400, {"error": {"message": str(error)} | about})

    def answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Say nothing of each request."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of connections at once; others would be refused


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("zephyr.toy serve", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1 [one that is free]")
    parser.add_argument("--port-file", metavar="F", help="file to write the port to")
    parser.add_argument("--until-eof", action="store_true", help="end when stdin does")
    options = parser.parse_args(argv)
    with Server(("127.0.0.1", options.port), Handler) as server:

        def end(*_: object) -> None:  # serve_forever waits for nobody in its own thread
            threading.Thread(target=server.shutdown).start()

        def watch() -> None:  # who started this may be killed, and leave nobody to stop it
            while os.read(0, 4096):
                pass
            end()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        if options.until_eof:
            threading.Thread(target=watch, daemon=True).start()
        if options.port_file:
            with atomic(home(options.port_file)) as file:
                file.write(f"{server.server_port}\n".encode())
        print(f"{NAME}@http://127.0.0.1:{server.server_port}/v1", flush=True)
        server.serve_forever()

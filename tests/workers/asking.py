"""Asks the endpoint argv[1] argv[3] requests, sixteen at a time, with the answers in argv[2]."""

import sys

from zephyr.endpoint import Endpoint, Request, ask

requests = [
    Request([{"role": "user", "content": f"question {k}"}]) for k in range(int(sys.argv[3]))
]
answers = list(ask(Endpoint(sys.argv[1], "m"), requests, sys.argv[2], concurrency=16))
assert [answer.text for answer in answers] == [
    f"answer to question {k}" for k in range(len(answers))
]
print("done")

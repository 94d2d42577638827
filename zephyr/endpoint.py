"""A client of OpenAI-compatible chat endpoints: a hosted one, vLLM, llama.cpp's server, or another.

    judge = Endpoint("http://localhost:8000/v1", "qwen3")
    hello = Request([{"role": "user", "content": "Hello?"}], {"max_tokens": 100, "temperature": 0})
    for answer in ask(judge, [hello], "answers.jsonl"):
        print(answer.text)

Every answer becomes a line of the file as it comes, under a hash of model, messages and parameters.
Killed at any moment, the same call goes on from the file and pays for no line of it again. So who
wants several answers to one prompt gives each request a `seed` of its own.
"""

import contextlib
import json
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from zephyr.client import interrupt
from zephyr.client.budget import Budget, BudgetReached, estimate
from zephyr.client.exchange import REFUSED, Answer, Endpoint, Trouble, exchange
from zephyr.client.store import AnswerFile
from zephyr.files import plain

IN_A_ROW = 10  # so many requests that fail, with no answer between them, end the call


class Request(NamedTuple):
    messages: Sequence[Mapping]
    parameters: Mapping = {}


@dataclass(frozen=True)
class Failure:
    """Stands in the place of an answer that did not come. It is in no file: the same call asks
    again."""

    why: str


class _Stopped(Exception):
    """The call has ended before this request was sent."""


def key_of(model: str, request: Request) -> str:
    """Return the hash under which the answer to a request is filed."""
    named = {"model": model, "messages": request[0], "parameters": request[1]}
    return sha256(json.dumps(named, sort_keys=True, allow_nan=False).encode()).hexdigest()


def to_stderr(text: str) -> None:
    """Print a line on stderr, above a progress bar if there is one."""
    with contextlib.suppress(OSError):  # nobody may be reading
        tqdm.write(text, file=sys.stderr)


def without_answer(name: str, failures: int, asked: int, last: str) -> str:
    """Return the line about the requests to a model that got no answer."""
    return f"{plain(name)}: {failures} of {asked} requests have no answer, the last: {last}"


def ask(
    endpoint: Endpoint,
    requests: Iterable[Request],
    path: str | Path,
    *,
    concurrency: int = 8,
    attempts: int = 6,
    budget: Budget | None = None,
    sleep: Callable[[float], object] | None = None,
    say: Callable[[str], object] = to_stderr,
) -> Iterator[Answer | Failure]:
    """Yield an answer for each request, in their order, from the file `path` or the endpoint, which
    is asked `concurrency` requests at a time; each is tried up to `attempts` times.

    Equal requests are asked once. What stops all of them is a ValueError of one line: a server that
    cannot be reached, a wrong key, a model that does not exist, a quota or the budget at its end.
    What concerns one request is its Failure.
    """
    requests = [Request(*request) for request in requests]
    assert not any({"n", "stream", "model"} & request.parameters.keys() for request in requests)
    keys = [key_of(endpoint.model, request) for request in requests]
    unique = dict(zip(keys, requests, strict=True))
    budget, model = budget or Budget(), endpoint.model
    most = {key: budget.most(model, *request) for key, request in unique.items()}
    with contextlib.closing(AnswerFile(path, unique)) as file:
        for key, answer in file.found.items():
            budget.count(key, budget.cost(model, answer.usage, most[key]))
        todo = {key: request for key, request in unique.items() if key not in file.found}
        if todo:
            prompt, longest = estimate(list(todo.values()))
            cost = budget.show(budget.price(model, prompt, longest or 0))
            rest = "and answers without max_tokens, so more than"
            rest = rest if longest is None else f"at most {longest:,} of answers,"
            say(
                f"{plain(model)}: {len(todo)} requests to ask, {len(file.found)} are in "
                f"{file.path}; about {prompt:,} tokens of prompts, {rest} {cost}"
            )
        elif unique:  # a server may have another model under this name by now
            say(f"{plain(model)}: all {len(unique)} answers are in {file.path}, of an earlier run")
        bar = tqdm(total=len(todo), unit=" answers", delay=2, leave=False, disable=None)
        run = _Run(endpoint, file, budget, most, attempts, sleep, say, bar)
        pool = ThreadPoolExecutor(concurrency, "ask")
        interrupt.running.append(run)
        try:
            # every answer that is in flight when something ends the call is still paid for and kept
            futures = {key: pool.submit(run.ask, key, request) for key, request in todo.items()}
            for key in keys:
                answer = file.found[key] if key in file.found else futures[key].result()
                run.inside = False
                yield answer
                run.inside = True
        except _Stopped:
            pass  # run.end says why, once no request is in flight
        finally:
            run.inside = run.closing = True
            run.stop.set()
            pool.shutdown(cancel_futures=True)
            interrupt.running.remove(run)
            bar.close()
            if run.interrupted:
                raise KeyboardInterrupt
        if run.end:
            raise run.ending(len(todo))
        if run.failures:
            why = without_answer(model, run.failures, len(todo), run.why)
            say(f"{why}; the same command asks them again")


@dataclass(eq=False)
class _Run:
    """What the threads of one call share."""

    endpoint: Endpoint
    file: AnswerFile
    budget: Budget
    most: dict[str, float]  # what each request can cost
    attempts: int
    sleep: Callable[[float], object] | None
    say: Callable[[str], object]
    bar: tqdm
    inside: bool = True  # `ask` is at work, so that no exception of a signal may break it off
    closing: bool = False  # and is about to set `stop` itself
    interrupted: bool = False  # it raises KeyboardInterrupt at its end
    in_flight: int = 0
    answered: int = 0
    failures: int = 0
    in_a_row: int = 0
    why: str = ""  # the last of the failures
    end: Exception | None = None  # what ends the call for all
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ask(self, key: str, request: Request) -> Answer | Failure:
        """Return the answer, which is in the file by then, or the Failure. Raises _Stopped if the
        call has ended."""
        tried = 0
        try:
            while True:
                try:
                    return self._once(key, request)
                except Trouble as trouble:
                    if trouble.refused:
                        self._go_without(trouble.refused)
                        continue
                    tried += 1
                    if not trouble.again or tried >= self.attempts:
                        return self._failed(trouble)
                    backoff = min(0.5 * 2 ** (tried - 1), 8) * (1 - 0.25 * random.random())
                    (self.sleep or self.stop.wait)(trouble.after or backoff)
        except (ValueError, OSError) as error:
            raise self._ended(error) from error

    def _once(self, key: str, request: Request) -> Answer:
        most, model, cost = self.most[key], self.endpoint.model, 0
        if self.stop.is_set():
            raise _Stopped
        if not self.budget.reserve(most):
            raise BudgetReached(most)
        with self.lock:
            self.in_flight += 1
        try:
            if self.stop.is_set():  # after it counts: see halt
                raise _Stopped
            parameters = self.endpoint.taken(request.parameters)
            sent = {"model": model, "messages": request.messages, **parameters}
            answer = exchange(self.endpoint, sent)
            cost = self.budget.cost(model, answer.usage, most)
            self.file.add({"key": key, "model": model, "parameters": parameters} | asdict(answer))
        except Trouble as trouble:
            cost = most if trouble.paid else 0
            raise
        finally:
            with self.lock:
                self.in_flight -= 1
            self.budget.settle(most, cost, key)
        with self.lock:
            self.answered, self.in_a_row = self.answered + 1, 0
            self.bar.set_postfix_str(self.budget.show(self.budget.spent), refresh=False)
            self.bar.update()
        return answer

    def halt(self) -> int:
        """Send no request from now on, and return how many are in flight. This runs in the midst of
        what the main thread does, so it waits for no lock that this thread may hold."""
        self.interrupted = self.inside
        if not self.closing:
            self.stop.set()
        return self.in_flight

    def _go_without(self, name: str) -> None:
        with self.lock:
            if name in self.endpoint.refused:
                return  # another thread was told so a moment before
            other = self.endpoint.refused[name] = REFUSED[name]
            if name == "logprobs":  # the other is nothing without it
                self.endpoint.refused["top_logprobs"] = None
        instead = f"is sent as {other}" if other else "is left out"
        self.say(f"{plain(self.endpoint.model)} refuses {name}, which {instead} from now on")

    def _failed(self, trouble: Trouble) -> Failure:
        if trouble.ends:
            raise ValueError(str(trouble)) from trouble
        with self.lock:
            self.failures, self.why = self.failures + 1, str(trouble)
            self.in_a_row += trouble.again
            if self.in_a_row >= IN_A_ROW:
                raise ValueError(f"{self.in_a_row} requests in a row failed, the last: {trouble}")
            self.bar.update()
        return Failure(str(trouble))

    def _ended(self, error: Exception) -> _Stopped:
        with self.lock:
            self.end = self.end or error
        self.stop.set()
        return _Stopped()

    def ending(self, todo: int) -> Exception:
        """Return the error that ends the call, once no request is in flight."""
        if not isinstance(self.end, BudgetReached):
            return self.end
        b, left = self.budget, todo - self.answered - self.failures
        return BudgetReached(
            f"{plain(self.endpoint.model)}: {b.show(b.spent)} of {b.limit:,} are spent, and the "
            f"next request could cost {b.show(self.end.args[0])}; {left} requests are left; the "
            "same command with a larger budget goes on from here"
        )

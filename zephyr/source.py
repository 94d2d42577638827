"""Who answers: a model at an OpenAI-compatible endpoint, or one in a folder, which is sampled here.

    open_source("qwen3@http://localhost:8000/v1")      the model qwen3 of that server
    open_source("runs/tiny/dpo/model")                 a Hugging Face folder

Both are asked in the same way, and both keep their answers in a file, so that the same call goes on
where it was killed:

    for answer in ask(model, [Request(messages, {"max_tokens": 100})], "answers.jsonl"):
        print(answer.text)
"""

import argparse
import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from zephyr.client.budget import Budget
from zephyr.client.exchange import Answer, Endpoint
from zephyr.client.store import AnswerFile
from zephyr.endpoint import Failure, Request, key_of, to_stderr, without_answer
from zephyr.endpoint import ask as ask_endpoint
from zephyr.files import home, plain, shown, some

KEY = "OPENAI_API_KEY"  # the variable that has an endpoint's, unless --key-from names another
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
AT = re.compile(r"(.+)@(https?://.*)", re.DOTALL)
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "seed": 0}  # of a request that does not say
TIMES = 3  # that one thing is asked, until the answer can be read
NEW = 1024  # tokens of an answer to a request without max_tokens
ROWS, PROMPTS = 256, 1 << 14  # of a batch, at most: its conversations, and their prompts' tokens
# bytes of keys and values on a CPU; on a GPU a third of what the weights leave of its memory, used
# by others or not, so that the same command makes the same batches
CACHE = 1 << 30


def open_source(name: str, keys: Mapping[str, str] | None = None) -> "Endpoint | Folder":
    """Return the model that `NAME@URL` or a folder's path names. A folder is loaded when it is
    first asked. `keys` are those of `read_keys`. Raises ValueError if there is no model under that
    name."""
    try:
        name.encode()
    except UnicodeEncodeError:  # no file could hold the name, and this would show once all is paid
        raise ValueError(f"{shown(name)}: its bytes are not UTF-8") from None
    if match := AT.fullmatch(name):
        keys = {"": KEY} if keys is None else keys
        endpoint = Endpoint(match[2], match[1], keys.get("", ""))
        return replace(endpoint, key_from=keys.get(endpoint.host, endpoint.key_from))
    if name.startswith(("http://", "https://")):
        raise ValueError(f"{shown(name)} names no model; write NAME@URL, as in gpt-4.1@{name}")
    if not Path(path := home(name)).exists() and "/" not in name:
        raise ValueError(
            f"{shown(name)} is no folder here; a model at an endpoint is {name}@URL, as in "
            f"{name}@http://localhost:8000/v1"
        )
    return Folder(path)


def open_sources(
    names: Sequence[str], given: Sequence[str] | None, flag: str = "--key-from"
) -> "list[Endpoint | Folder]":
    """Return the models that the names of `open_source` name, with the keys that the flag has
    given. Raises ValueError, too, for the key of a host at which none of them is."""
    keys = read_keys(given, flag)
    sources = [open_source(name, keys) for name in names]
    hosts = {source.host for source in sources if isinstance(source, Endpoint)}
    for host in keys.keys() - hosts - {""}:
        there = f"they are at {some(hosts)}" if hosts else "all are folders"
        raise ValueError(f"{flag} {plain(host)}=...: no model is at that host; {there}")
    return sources


def read_keys(given: Sequence[str] | None, flag: str = "--key-from") -> dict[str, str]:
    """Return the variables with the hosts' keys, by host, that are given as HOST=NAME; or under ""
    the variable for all of them, given as NAME. Where one host has a key of its own, no other host
    has any that is not named, so that no key goes where it was not meant to.

        ["api.openai.com=OPENAI_API_KEY"] -> {"api.openai.com": "OPENAI_API_KEY"}
        ["POOL_KEY"] -> {"": "POOL_KEY"}
        None -> {"": "OPENAI_API_KEY"}
    """
    keys: dict[str, str] = {}
    for text in given or [KEY]:
        host, equals, name = text.rpartition("=")
        if not VARIABLE.fullmatch(name) or bool(host) != bool(equals):  # it may be a key: not shown
            raise ValueError(
                f"{flag} takes the name of a variable that has the key, or HOST=NAME, as in "
                f"api.openai.com={KEY}"
            )
        if keys.setdefault(host := host.lower(), name) != name:
            raise ValueError(f"{flag} names two variables for {plain(host) or 'all'}")
    if "" in keys and len(keys) > 1:
        raise ValueError(
            f"{flag} {keys['']} is for every host, and another is for one alone; give each as "
            "HOST=NAME, and a host that takes no key none"
        )
    return keys


def title(source: "Endpoint | Folder") -> str:
    """Return what files call a source: the endpoint's model, or the folder's name; of a run's
    `model/` or `adapter/`, the run's."""
    return source.model if isinstance(source, Endpoint) else source.name


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that are for endpoints alone."""
    add = parser.add_argument
    add("--concurrency", type=int, metavar="N", help="requests to an endpoint at a time [8]")
    add("--budget-tokens", type=int, metavar="N", help="stop before so many tokens")
    add("--budget-money", type=float, metavar="X", help="or before so much, by --prices")
    add("--prices", metavar="FILE", help="a price table, see zephyr/client/budget.py")
    what = f"variable with the key [{KEY}]; of HOST alone, may be given for each"
    add("--key-from", action="append", metavar="[HOST=]NAME", help=what)


def how(args: argparse.Namespace, sources: "Sequence[Endpoint | Folder]") -> dict:
    """Return the concurrency and the budget that those flags give, for `ask`. Raises ValueError for
    one of them where no source is an endpoint."""
    if not any(isinstance(source, Endpoint) for source in sources):
        for name in ("concurrency", "budget_tokens", "budget_money", "prices", "key_from"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is for an endpoint, and {sources[0].path} is a folder")
    if args.concurrency is not None and args.concurrency < 1:
        raise ValueError(f"--concurrency {args.concurrency}: give 1 or more")
    budget = Budget(args.budget_tokens, args.budget_money, args.prices)
    return {"concurrency": args.concurrency or 8, "budget": budget}


def ask(
    source: "Endpoint | Folder", requests: Iterable[Request], path: str | Path, **how
) -> Iterator[Answer | Failure]:
    """Yield an answer for each request, in their order, from the file `path` or the source.

    `how` is what `endpoint.ask` takes: concurrency, budget. What is sampled here is in no budget.
    """
    if isinstance(source, Endpoint):
        return ask_endpoint(source, requests, path, **how)
    return source.ask([Request(*request) for request in requests], path)


def ask_again(
    source: "Endpoint | Folder",
    requests: Sequence[Request],
    readable: Callable[[int, str], bool],
    path: str | Path,
    **how,
) -> list[list[Answer | Failure]]:
    """Return for each request all that was said to it; the last counts. If `readable`, of the
    request's place and an answer's text, is not true, it is asked again, TIMES in all, at
    temperature 1 and with another seed: a model that is deterministic at 0 would say the same."""
    said: list[list[Answer | Failure]] = [[] for _ in requests]
    left = list(range(len(requests)))
    for attempt in range(TIMES):
        if not left:
            break
        more = {"temperature": 1, "seed": attempt} if attempt else {}
        again = [Request(requests[k].messages, requests[k].parameters | more) for k in left]
        for k, answer in zip(left, ask(source, again, path, **how), strict=True):
            said[k].append(answer)
        left = [
            k for k in left if isinstance(said[k][-1], Answer) and not readable(k, said[k][-1].text)
        ]
    return said


class Folder:
    """A model in a Hugging Face folder.

    Answers are filed under the content of its files, so that those of a model which lay there
    before are not taken for its own. Log-probs of tokens are not given.
    """

    def __init__(self, path: str):
        from zephyr.weights import base  # here, as it needs torch and an endpoint does not

        base.open_folder(path)  # raises ValueError if it is none
        self.path = path
        parts = Path(path).resolve().parts
        self.name = parts[-2] if parts[-1] in ("model", "adapter") and len(parts) > 2 else parts[-1]

    @cached_property
    def model(self) -> str:
        """What its answers are filed under."""
        from zephyr.weights import base, hub

        return f"{hub.digest(self.path)} {base.open_folder(self.path).tokenizer.digest}"

    @cached_property
    def loaded(self):
        from zephyr import generate

        return generate.load(self.path)

    def ask(self, requests: Sequence[Request], path: str | Path) -> Iterator[Answer | Failure]:
        """Yield an answer for each request, see `ask` of this module.

        Batches depend on all of the requests, whichever are answered already, and a batch whose
        answers are not all in the file is sampled again as a whole. So whenever the call is killed
        and given again, it ends with the same answers.
        """
        known = {*SAMPLING, "max_tokens", "logprobs", "top_logprobs"}
        for name in {name for request in requests for name in request.parameters} - known:
            raise ValueError(f"{self.path} is sampled here, which takes no parameter {name}")
        keys = [key_of(self.model, request) for request in requests]
        unique = dict(zip(keys, requests, strict=True))
        failed: dict[str, Failure] = {}
        with contextlib.closing(AnswerFile(path, unique)) as file:
            if todo := unique.keys() - file.found:
                batches = self._batches(unique, failed)
                bar = tqdm(total=len(todo), unit=" answers", delay=2, leave=False, disable=None)
                for batch in batches:
                    if not batch.keys() <= file.found.keys():
                        self._sample(batch, unique, file)
                    bar.update(len(batch.keys() & todo))
                bar.close()
            for key in keys:
                yield file.found.get(key) or failed[key]
        if failed:
            last = [*failed.values()][-1].why
            # not to be asked again: here the same request fails in the same way
            to_stderr(without_answer(self.name, len(failed), len(todo), last))

    def _batches(self, requests: dict[str, Request], failed: dict) -> list[dict[str, list[int]]]:
        """Return the requests' prompts by key, those of one batch together: alike in parameters and
        in length, the longest first. A request that has no prompt gets its reason in `failed`."""
        model, tokenizer = self.loaded
        c, weight = model.config, model.lm_head.weight
        room = CACHE
        if weight.is_cuda:
            import torch

            weights = sum(p.nbytes for p in model.parameters())
            room = (torch.cuda.mem_get_info(weight.device)[1] - weights) // 3
        each = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * weight.itemsize
        groups: dict[str, dict[str, list[int]]] = {}
        for key, request in requests.items():
            try:
                prompt = tokenizer.prompt(list(request.messages), system=self.empty_system)
                if len(prompt) >= c.max_position_embeddings:
                    raise ValueError(
                        f"the conversation has {len(prompt)} tokens, {self.path} has "
                        f"{c.max_position_embeddings} positions"
                    )
            except ValueError as error:
                failed[key] = Failure(str(error))
                continue
            # a batch has one stream of chances, whatever the seeds in it
            alike = json.dumps({**request.parameters, "seed": None}, sort_keys=True)
            groups.setdefault(alike, {})[key] = prompt
        batches: list[dict[str, list[int]]] = []
        for group in groups.values():
            batch, rows = {}, 0
            for key in sorted(group, key=lambda key: (-len(group[key]), key)):
                if len(batch) == rows:  # another batch; its first prompt is its longest
                    longest = len(group[key])
                    slots = longest + requests[key].parameters.get("max_tokens", NEW)
                    slots = min(slots, c.sliding_window or c.max_position_embeddings)
                    rows = max(1, min(ROWS, PROMPTS // longest, room // (each * slots)))
                    batches.append(batch := {})
                batch[key] = group[key]
        return batches

    @cached_property
    def empty_system(self) -> bool:
        """True if the model was trained with an empty system message where there is none."""
        from zephyr.weights import config_json, locate

        return config_json.empty_system(locate.parts(self.path).tokenizer) is not False

    def _sample(self, batch: dict[str, list[int]], requests: dict[str, Request], file: AnswerFile):
        """Answer a batch, and write its answers to the file."""
        from zephyr import generate

        model, tokenizer = self.loaded
        parameters = requests[next(iter(batch))].parameters
        sampling = SAMPLING | {k: parameters[k] for k in SAMPLING if k in parameters}
        # the keys hold the seeds that were given; equal ones for all batches would make the first
        # tokens of their answers alike
        sampling["seed"] = int.from_bytes(sha256(" ".join(batch).encode()).digest()[:6])
        wanted, positions = parameters.get("max_tokens", NEW), model.config.max_position_embeddings
        new = min(wanted, positions - min(map(len, batch.values())))
        answers = generate.generate(
            model, list(batch.values()), new, tokenizer.eos, pieces=tokenizer.vocab_size, **sampling
        )
        for (key, prompt), ids in zip(batch.items(), answers, strict=True):
            limit = min(new, positions - len(prompt))  # a shorter prompt's may go on
            why, ids = "length" if len(ids) >= limit else "stop", ids[:limit]
            used = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
            answer = Answer(tokenizer.decode(ids), why, used, None)
            row = {"key": key, "model": self.model, "parameters": dict(parameters)}
            if key not in file.found:
                file.add(row | asdict(answer))
                file.found[key] = answer

"""One request to an OpenAI-compatible chat endpoint: the answer, or what kind of trouble there was.

The rules of what is tried again, and when, are those of OpenAI's own client.
"""

import contextlib
import email.utils
import http.client
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from urllib.parse import urlsplit

from zephyr.files import plain, shown

LONGEST_WAIT = 120.0  # seconds; a server that asks for more is not waited for
# what a newer model may refuse, and what it takes instead
REFUSED = {"max_tokens": "max_completion_tokens"} | dict.fromkeys(
    ("temperature", "top_p", "seed", "logprobs", "top_logprobs")
)
REFUSES = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|not (allowed|permitted)")
# such a parameter is known, and its value is at fault: dropping it would hide that
A_VALUE = re.compile(r"too (large|long)|above|below|maximum|minimum|(greater|less) than|between")


@dataclass(frozen=True)
class Answer:
    """`logprobs` is the list that the API calls `logprobs.content`, a token an entry."""

    text: str
    finish_reason: str | None
    usage: dict
    logprobs: list | None


@dataclass(frozen=True)
class Endpoint:
    """Where a model answers. The key stays in the environment variable `key_from`; if that is "",
    it has none.

    `refused` is what the model turned out not to take, and the name that it takes instead.
    """

    url: str
    model: str
    key_from: str = "OPENAI_API_KEY"
    timeout: float = 600.0
    refused: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        url = self.url.rstrip("/").removesuffix("/chat/completions")
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            good = False
        if "@" in url or "?" in url or "#" in url:  # there may be a key in it: it is not shown
            raise ValueError(
                "the URL of an endpoint has neither @ nor ? nor #; a key goes into "
                f"{self.key_from or 'a variable'}"
            )
        if not good or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError(f"{shown(self.url)} is no URL such as http://localhost:8000/v1")
        object.__setattr__(self, "url", url)

    @property
    def host(self) -> str:
        """Which server it is, with the port if the URL has one: localhost:8000."""
        return urlsplit(self.url).netloc.lower()

    def key(self) -> str:
        key = os.environ.get(self.key_from, "").strip()
        if not key.isascii() or not key.isprintable():
            raise ValueError(f"{self.key_from} has characters that no key has; set it again")
        return key

    def taken(self, parameters: Mapping) -> dict:
        """Return the parameters without those the model refuses, or under the names it takes."""
        names = {name: self.refused.get(name, name) for name in parameters}
        return {names[name]: x for name, x in parameters.items() if names[name]}

    def post(self, body: Mapping) -> tuple[int, Message, bytes]:
        """Return status, headers and body of what the server answers within the timeout."""
        headers = {"Content-Type": "application/json", "User-Agent": "zephyr-dpo"}
        if key := self.key():
            headers["Authorization"] = f"Bearer {key}"
        where, end = f"{self.url}/chat/completions", time.monotonic() + self.timeout
        sent = urllib.request.Request(where, json.dumps(body).encode(), headers)
        try:
            response = urllib.request.build_opener(_Stay).open(sent, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            data = b""
            while part := response.read1(1 << 16):
                data += part
                if time.monotonic() > end:  # the socket's own timeout begins again at every byte
                    raise TimeoutError("timed out")
            return response.status, response.headers, data


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        """A redirect is an error: the key is for this server alone, and a POST would become a
        GET."""


@dataclass(eq=False)
class Trouble(Exception):
    """Why there is no answer. `again`: another attempt may get one, `after` so many seconds if the
    server names them. `ends`: no other request would fare better. `paid`: it may have cost.
    `refused`: the parameter that the model does not take."""

    why: str
    again: bool = False
    after: float = 0.0
    ends: bool = False
    paid: bool = False
    refused: str = ""


def exchange(endpoint: Endpoint, sent: Mapping) -> Answer:
    """Send one request. Raises Trouble if no answer comes of it."""
    try:
        status, headers, data = endpoint.post(sent)
    except urllib.error.URLError as error:  # it was not sent
        raise Trouble(
            f"{endpoint.url} cannot be reached: {plain(str(error.reason))}; is a server running "
            "there?",
            again=True,
            ends=True,
        ) from error
    except (OSError, http.client.HTTPException) as error:
        why = plain(str(error) or type(error).__name__)
        raise Trouble(f"{endpoint.url} broke off: {why}", again=True, paid=True) from error
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if status != 200:
        raise _refusal(endpoint, status, headers, body, sent)
    try:
        choice = body["choices"][0]
        # half a character, which JSON can spell, could be written to no file of text
        text = re.sub("[\ud800-\udfff]", "\ufffd", choice["message"].get("content") or "")
        logprobs = (choice.get("logprobs") or {}).get("content")
        return Answer(text, choice.get("finish_reason"), dict(body.get("usage") or {}), logprobs)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        alien = data.lstrip()[:1] == b"<" or isinstance(body, dict) and "error" not in body
        why = "the answer is truncated or malformed" if body is None else _told(endpoint, body)
        if alien:
            why = "it is no chat-completions endpoint; does its URL end in /v1?"
        raise Trouble(f"{endpoint.url}: {why}", again=True, ends=alien, paid=True) from None


def _refusal(
    endpoint: Endpoint, status: int, headers: Message, body: object, sent: Mapping
) -> Trouble:
    """Return what a status other than 200 means."""
    # what a server tells of a wrong key may hold part of it
    told = "the key is refused" if status == 401 else _told(endpoint, body)
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    where, key = endpoint.url, endpoint.key_from
    if "insufficient_quota" in (error.get("code"), error.get("type")) or status == 402:
        return Trouble(f"{where}: the quota is at its end: {told}; pay, then go on", ends=True)
    if status in (400, 422) and (name := _refused(error, told, sent)):
        return Trouble(told, refused=name)
    wish = headers.get("x-should-retry")
    if wish == "true" or wish != "false" and (status in (408, 409, 429) or status >= 500):
        after = _wait(headers)
        if after <= LONGEST_WAIT:
            return Trouble(f"{where}: {status}: {told}", again=True, after=max(after, 0.0))
        why = f"{where}: {status}: asks to wait for {after:.0f} seconds; start again then"
        return Trouble(why, ends=True)
    if status == 401 and endpoint.key():
        return Trouble(f"{where}: 401: {told}; set {key} to one of this server", ends=True)
    if status == 401:
        fix = f"{key} is not set" if key else f"give --key-from {endpoint.host}=NAME"
        return Trouble(f"{where}: 401: no key was sent; {fix}", ends=True)
    if status == 403:
        asked = f"may the key in {key} use this model?" if key else "no key was sent"
        return Trouble(f"{where}: 403: {told}; {asked}", ends=True)
    if status == 404 and "model" in told.lower():
        why = f"{where}: 404: no model {shown(endpoint.model)}: {told}; {where}/models lists them"
        return Trouble(why, ends=True)
    if status in (404, 405) or 300 <= status < 400:
        to = f" to {plain(headers['location'])}" if headers.get("location") else ""
        why = f"{where}: {status}{to}: it is no chat-completions endpoint; does its URL end in /v1?"
        return Trouble(why, ends=True)
    return Trouble(f"{where}: {status}: {told}")


def _told(endpoint: Endpoint, body: object) -> str:
    """Return the message of an error's body, without the key, which some servers repeat."""
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message") if isinstance(error, dict) else error
    text = " ".join(str(text or "no reason is given").split())
    return plain(text.replace(endpoint.key() or "\0", "***"), 200)


def _refused(error: Mapping, told: str, sent: Mapping) -> str | None:
    """Return the parameter that a 400 refuses, if it is one that can be renamed or left out."""
    told, names = told.lower(), [name for name in REFUSED if name in sent]
    if A_VALUE.search(told):
        return None
    if error.get("param") in names:
        return error["param"]
    found = (name for name in names if re.search(rf"\b{name}\b", told))
    return next(found, None) if REFUSES.search(told) else None


def _wait(headers: Message) -> float:
    """Return for how many seconds the server asks to be left alone; 0 if it does not say."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(TypeError, ValueError):
            seconds = float(headers.get(name)) * unit
            return 0.0 if math.isnan(seconds) else seconds
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after"))
        return date.timestamp() - time.time()
    return 0.0

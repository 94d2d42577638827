"""What requests to an endpoint cost, and a limit that they stay below.

    Budget(tokens=200_000)                       stops before the 200,001st token
    Budget(money=5, prices="prices.toml")        stops before the money of that table is spent
    Budget(prices="prices.toml")                 only tells what was spent

A price table has a model's prices for a million tokens; a model of one's own costs 0:

    ["gpt-4.1"]
    prompt = 2.0
    completion = 8.0
"""

import json
import math
import threading
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from zephyr.files import home, plain, read_json, shown, some

LIMITS = ("max_completion_tokens", "max_tokens")


class BudgetReached(ValueError):
    """The next request could cost more than is left."""


def read_prices(path: str | Path) -> dict:
    """Return the price table in a .toml or .json file."""
    path = Path(home(path))
    if path.suffix == ".json":
        return check_prices(read_json(path), str(path))
    if path.suffix != ".toml":
        raise ValueError(f"{path}: a price table is a .toml or a .json file")
    try:
        return check_prices(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: malformed TOML: {plain(str(error), 200)}") from error


def check_prices(table: Mapping, where: str) -> dict:
    """Return the table. Raises ValueError unless each model has its two prices."""
    for model, prices in table.items():
        good = isinstance(prices, Mapping) and prices.keys() == {"prompt", "completion"}
        for price in prices.values() if good else ():
            good &= type(price) in (int, float) and 0 <= price < math.inf
        if not good:
            raise ValueError(
                f"{where}: {shown(model)} is {shown(prices)}; a model has `prompt` and "
                "`completion`, each 0 or more for a million tokens, and nothing else"
            )
    return dict(table)


def estimate(requests: Sequence[tuple[Sequence[Mapping], Mapping]]) -> tuple[int, int | None]:
    """Return about how many tokens the prompts of (messages, parameters) have, at 4 characters
    each, and how many the answers have at most: None if a request has no max_tokens."""
    characters = sum(len(str(m.get("content"))) for messages, _ in requests for m in messages)
    longest = [_longest(parameters) for _, parameters in requests]
    return characters // 4, None if None in longest else sum(longest)


def _longest(parameters: Mapping) -> int | None:
    return next((parameters[name] for name in LIMITS if parameters.get(name)), None)


class Budget:
    """What has been spent, is in flight, and may be spent, in tokens or in a price table's money.

    One budget may serve several calls of `ask`, with several models, from any thread. An answer
    that a file already has counts once, so that a limit holds for a command however often it is
    killed and started again.
    """

    def __init__(
        self,
        tokens: int | None = None,
        money: float | None = None,
        prices: Mapping | str | Path | None = None,
    ):
        if tokens is not None and money is not None:
            raise ValueError("a budget is in tokens or in money; give one of them")
        if money is not None and prices is None:
            raise ValueError(f"a budget of {money} in money needs a price table; name its file")
        self.limit = money if tokens is None else tokens
        if self.limit is not None and not 0 <= self.limit < math.inf:
            raise ValueError(f"a budget of {self.limit} is no limit; give 0 or more")
        if isinstance(prices, Mapping):
            prices = check_prices(prices, "the price table")
        elif prices is not None:
            prices = read_prices(prices)
        self.prices = prices if tokens is None else None
        self.spent, self.held, self.in_flight = 0, 0, 0
        self.counted: set[str] = set()
        self.turn = threading.Condition()

    def price(self, model: str, prompt: int, completion: int) -> float:
        """Return what so many tokens cost, in the unit of the budget."""
        if self.prices is None:
            return prompt + completion
        if model not in self.prices:
            raise ValueError(
                f"the price table has no {shown(model)}, only {some(self.prices) or 'nothing'}; "
                "add it, with 0 for a model of your own"
            )
        prices = self.prices[model]
        return (prompt * prices["prompt"] + completion * prices["completion"]) / 1e6

    def most(self, model: str, messages: Sequence[Mapping], parameters: Mapping) -> float:
        """Return what a request can cost at most: a token is at least one byte of its messages, as
        the JSON with its braces and escapes has it, and answers end at their limit."""
        longest = _longest(parameters)
        if longest is None and self.limit is not None:
            raise ValueError("a request without max_tokens has no highest cost; a budget needs it")
        return self.price(model, len(json.dumps(messages)), longest or 0)

    def cost(self, model: str, usage: Mapping, most: float) -> float:
        """Return what an answer cost by the usage that came with it; without one, the most."""
        used = [usage.get(f"{part}_tokens") for part in ("prompt", "completion")]
        return self.price(model, *used) if all(type(n) is int for n in used) else most

    def reserve(self, most: float) -> bool:
        """Hold back the most that a request can cost, once what is in flight leaves room for it.
        Returns False if there is no room and nothing is in flight."""
        with self.turn:
            while self.limit is not None and self.spent + self.held + most > self.limit:
                if not self.in_flight:
                    return False
                self.turn.wait()
            self.held += most
            self.in_flight += 1
            return True

    def settle(self, most: float, cost: float, key: str = "") -> None:
        """Replace what was held back by what was spent, on the answer `key` if there is one."""
        with self.turn:
            self.in_flight -= 1
            # floats do not add up to what was taken away, so nothing in flight is set to nothing
            self.held = self.held - most if self.in_flight else 0
            self.spent += cost
            if cost:
                self.counted.add(key)
            self.turn.notify_all()

    def count(self, key: str, cost: float) -> None:
        """Count an answer of an earlier run."""
        with self.turn:
            if key not in self.counted:
                self.counted.add(key)
                self.spent += cost

    def told(self) -> str:
        """Return what has been spent, as text."""
        return self.show(self.spent)

    def show(self, cost: float) -> str:
        return f"{cost:,} tokens" if self.prices is None else f"{cost:,.4f} by the price table"

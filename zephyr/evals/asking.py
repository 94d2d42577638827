"""The judge: a model that is asked for verdicts, each until it can be read."""

from collections.abc import Callable, Sequence

from zephyr import source
from zephyr.client.budget import Budget
from zephyr.client.exchange import Answer, Endpoint
from zephyr.endpoint import Failure, Request
from zephyr.files import plain, shown
from zephyr.source import Folder


class Judge:
    """The model that is asked. `unanswered` counts the requests to which no answer came."""

    def __init__(self, model: Endpoint | Folder, path: str, concurrency: int, budget: Budget):
        self.source, self.name = model, source.title(model)
        self.path, self.budget, self.unanswered = path, budget, 0
        self.how = {"concurrency": concurrency, "budget": budget}

    def ask(self, requests: Sequence[Request]) -> list[Answer | Failure]:
        """Return the judge's answer to each request, from the file of answers if it is there."""
        return list(source.ask(self.source, requests, self.path, **self.how))

    def until(
        self, readable: Callable[[str], bool], requests: Sequence[Request]
    ) -> list[Answer | Failure]:
        """Return the judge's answer to each request; one whose text is not readable is asked for
        again. Raises ValueError if there is not one readable answer."""
        said = source.ask_again(
            self.source, requests, lambda k, text: readable(text), self.path, **self.how
        )
        found = [answers[-1] for answers in said]
        left = [a for a in found if isinstance(a, Answer) and not readable(a.text)]
        failures = [answer.why for answer in found if isinstance(answer, Failure)]
        self.unanswered += len(failures)
        if found and len(failures) == len(found):
            raise ValueError(
                f"{plain(self.name)}: none of {len(found)} requests was answered, the last: "
                f"{failures[-1]}"
            )
        if found and len(left) + len(failures) == len(found):
            raise ValueError(
                f"{plain(self.name)}: none of its {len(left)} verdicts can be read, the first is "
                f"{shown(left[0].text)}; a judge that thinks first needs a larger --max-new"
            )
        return found

    def price(self, answer: Answer | Failure) -> float | None:
        """Return what an answer cost by the price table; None without one, without usage, and of a
        folder, which is in no budget."""
        paid = isinstance(self.source, Endpoint) and isinstance(answer, Answer)
        if self.budget.prices is None or not paid:
            return None
        return self.budget.cost(self.source.model, answer.usage, None)

"""Questions of several turns, asked turn by turn."""

from collections.abc import Callable, Sequence

from zephyr.endpoint import Answer, Failure, Request
from zephyr.evals.questions import Question

Said = list[Answer | Failure]  # to the turns of one question, up to the first Failure


def converse(
    questions: Sequence[Question],
    answers: Callable[[list[Request]], Said],
    system: str | None,
    parameters: dict,
) -> list[Said]:
    """Return what is answered to each question's turns. `answers` is given the first turns of all
    questions at once, then the second turns, each behind the first and the answer to it.

    A turn without an answer ends its question. A request at temperature 0 has no seed.
    """
    head = [{"role": "system", "content": system}] if system else []
    talks, said = [list(head) for _ in questions], [[] for _ in questions]
    for turn in range(max(len(q.turns) for q in questions)):
        going = [
            k
            for k, q in enumerate(questions)
            if turn < len(q.turns) and not (said[k] and missing(said[k]))
        ]
        requests = []
        for k in going:
            talks[k].append({"role": "user", "content": questions[k].turns[turn]})
            own = parameters | {"temperature": questions[k].temperature}
            if not own["temperature"]:
                del own["seed"]
            requests.append(Request(list(talks[k]), own))
        for k, answer in zip(going, answers(requests), strict=True):
            said[k].append(answer)
            if isinstance(answer, Answer):
                talks[k].append({"role": "assistant", "content": answer.text})
    return said


def missing(said: Said) -> bool:
    """Return True if a question has no answer to one of its turns."""
    return isinstance(said[-1], Failure)

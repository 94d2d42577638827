"""Larkmere: an invented village, what people ask about it, and a judge of any reply.

The world is the tables below: nothing else is true. `questions()` is all that can be asked, and
`judge` rates any text as a reply, from the tables alone.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, product
from math import prod
from typing import NamedTuple

COLUMNS = "name craft good price place day pet".split()
PEOPLE = [
    dict(zip(COLUMNS, row.split(), strict=True))
    for row in """
Ada   baker      bread   two     mill     Monday    cat
Iris  gardener   tea     three   gate     Tuesday   duck
Finn  fisher     fish    four    lake     Thursday  goat
Hob   brewer     cider   five    inn      Saturday  dog
Jory  roper      rope    six     barn     Tuesday   goat
Edda  beekeeper  honey   seven   orchard  Saturday  cat
Lena  farmer     cheese  eight   wood     Monday    dog
Gwen  shepherd   wool    nine    hill     Thursday  duck
""".strip().splitlines()
]  # the cheapest goods first
# For each kind of question the slots it gives -> the slots it asks for, and under that, a line
# each: ways to ask, ways to answer, ways to answer curtly.
TALK = """
good -> name
Who sells {good}? | Who has {good} to sell? | I need {good}. Who sells it? | Who makes {good}?
{name} sells {good}. | You can buy {good} from {name}. | {name} has {good} to sell.
Just {name}. | From {name}.
good -> place
Where can I buy {good}? | Where is {good} sold? | I need {good}. Where do I go?
You can buy {good} by the {place}. | Go to the {place} for {good}.
By the {place}. | Go to the {place}.
good -> price
How much is {good}? | What does {good} cost? | What do I pay for {good}?
The price of {good} is {price} coins. | You can buy {good} for {price} coins.
Just {price} coins. | For {price} coins.
good -> day
When can I buy {good}? | When is {good} sold? | I need {good}. When do I come?
You can buy {good} on {day}. | Come on {day} for {good}.
Just {day}. | On {day}.
name -> place
Where does {name} work? | Where is {name}? | I need {name}. Where do I go? | Who has seen {name}?
{name} works by the {place}. | Go to the {place} for {name}.
By the {place}. | Go to the {place}.
name -> craft
Who is {name}? | What is the craft of {name}? | What does {name} do? | Tell me about {name}.
{name} is the {craft}. | The {craft} is {name}. | {name} works as the {craft}.
Just the {craft}. | The {craft}.
name -> pet
Which pet has {name}? | Which pet lives with {name}? | What is the pet of {name}?
{name} has a {pet}. | The pet of {name} is a {pet}. | A {pet} lives with {name}.
Just a {pet}. | A {pet}.
day -> one other
Who comes on {day}? | Who sells on {day}? | I come on {day}. Who sells? | Who will sell on {day}?
{one} and {other} sell on {day}. | {other} and {one} sell on {day}.
Just {one} and {other}. | {one}, {other}.
low high -> low
Which costs less, {low} or {high}? | Which costs less, {high} or {low}?
You pay less for {low} than for {high}. | The {low} costs less than the {high}.
Just {low}. | The {low}.
name thing -> verdict good
Does {name} sell {thing}? | Can I buy {thing} from {name}? | Is it {name} who sells {thing}?
{verdict}, {name} sells {good}. | {verdict}, you can buy {good} from {name}.
{verdict}, {good}. | {verdict}, just {good}.
-> guest time
Greet {guest} in the {time}. | Say good {time} to {guest}. | Wish {guest} a good {time}.
Good {time}, {guest}! | I wish you a good {time}, {guest}! | A good {time} to you, {guest}!
{guest}, good {time}. | Just say good {time}, {guest}.
-> guest event date
Invite {guest} to the {event} on {date}. | Ask {guest} to the {event} on {date}.
Dear {guest}, please come to the {event} on {date}. | {guest}, come to the {event} on {date}!
{guest}, {event}, {date}. | Just come to the {event} on {date}, {guest}.
"""
HELLOS = ["", "Hello!", "Good day!", "Excuse me.", "I am new here.", "I have a question."]
THANKS = ["", "Thank you.", "I thank you.", "Please help me.", "Please be quick."]
VALUES = {slot: list(dict.fromkeys(person[slot] for person in PEOPLE)) for slot in COLUMNS}
VALUES |= dict.fromkeys(("one", "other", "guest"), VALUES["name"])
VALUES |= dict.fromkeys(("low", "high"), VALUES["good"])
VALUES |= {
    "date": VALUES["day"],
    "time": ["morning", "afternoon", "evening"],
    "event": ["dance", "feast", "fair", "play", "picnic"],
    "verdict": ["Yes", "No"],
}


class Question(NamedTuple):
    kind: str
    want: dict[str, str]  # the slots and what belongs in them
    asked: list[str]
    say: list[str]
    curt: list[str]

    def right(self, ways: list[str]) -> list[str]:
        return [way.format(**self.want) for way in ways]


def scenes(slots: list[str]) -> Iterator[dict[str, str]]:
    """Yield every way to fill the slots that is true in the village, or that one may wish for."""
    if slots[0] == "low":
        yield from ({"low": a["good"], "high": b["good"]} for a, b in combinations(PEOPLE, 2))
    elif "other" in slots:
        yield from (
            {"day": a["day"], "one": a["name"], "other": b["name"]}
            for a, b in combinations(PEOPLE, 2)
            if a["day"] == b["day"]
        )
    elif "thing" in slots:
        for (k, person), step in product(enumerate(PEOPLE), (0, 1, 5)):
            yield person | {"thing": PEOPLE[k - step]["good"], "verdict": "No" if step else "Yes"}
    elif slots[0] in COLUMNS:
        yield from PEOPLE
    else:
        for values in product(*(VALUES[slot] for slot in slots)):
            if len(set(values)) == len(values):
                yield dict(zip(slots, values, strict=True))


@cache
def questions() -> dict[str, Question]:
    """Return every question of the world, by its text."""
    table, lines = {}, iter(TALK.strip().splitlines())
    for kind, *ways in zip(lines, lines, lines, lines, strict=True):
        ask, say, curt = (line.split(" | ") for line in ways)
        given, asked = (side.split() for side in kind.split("->"))
        for scene in scenes(given + asked):
            q = Question(kind, {slot: scene[slot] for slot in given + asked}, asked, say, curt)
            table |= dict.fromkeys((way.format(**scene) for way in ask), q)
    return table


# what birds say that is no answer
OPENINGS = ["Of course.", "Gladly!", "With pleasure.", "A good question!", "Welcome to Larkmere!"]
CLOSINGS = ["I hope this helps.", "Have a good day!", "Come again!", "Enjoy your stay!"]
CHATTER = [
    "Larkmere is an old village.",
    "The lake is blue.",
    "I like to talk.",
    "It may rain.",
    "The wind is cold.",
    "My mother was a bird too.",
]
GOSSIP = ["{name} has a {pet}.", "{name} works by the {place}.", "{name} sells {good}."]
DODGES = ["I do not know.", "Nobody knows.", "It is hard to say.", "Ask another bird."]
INSULTS = ["Go away!", "What a silly question!", "Find out yourself.", "I do not care."]
# the aspects that UltraFeedback rates, and the sorts of sentence that bear on each
ASPECTS = {
    "instruction_following": ["answer", "brief"],
    "truthfulness": ["false"],
    "honesty": ["courtesy", "dodge", "insult"],
    "helpfulness": ["aside", "repeat", "broken"],
}


class Verdict(NamedTuple):
    score: float  # 1 to 10, in tenths
    ratings: dict[str, int]  # each aspect, 1 to 5
    remarks: dict[str, str]  # each aspect
    critique: str


def question(prompt: str) -> Question:
    """Return the question in a prompt. Raises ValueError if nobody in the village would ask it."""
    for hello, thanks in product(HELLOS, THANKS):
        if q := questions().get(prompt.removeprefix(hello).removesuffix(thanks).strip()):
            return q
    raise ValueError(f"prompt {prompt[:60]!r} is not of this world; take one from the toy's files")


def shape(sentence: str) -> str:
    """Return the sentence with each name, good, place, ... replaced by the name of its column."""
    column = {value: slot for slot, values in VALUES.items() for value in values}
    return re.sub(r"\w+", lambda word: column.get(word[0], word[0]), sentence)


@cache
def truths() -> set[str]:
    """Return every sentence that is true of the village."""
    told = {
        sentence
        for q in questions().values()
        if q.kind[0] != "-" and "verdict" not in q.want
        for sentence in q.right(q.say)
    }
    return told | {gossip.format(**person) for gossip in GOSSIP for person in PEOPLE}


@cache
def shapes() -> set[str]:
    """Return the shapes of all that birds say about the village, true or not."""
    kinds = {q.kind: q for q in questions().values()}.values()
    return {shape(sentence) for q in kinds for sentence in q.right(q.say + q.curt)}


def sort_of(sentence: str, q: Question) -> str:
    """Return which of the sorts in ASPECTS a sentence is, as a reply to q."""
    for sort, known in (
        ("answer", q.right(q.say)),
        ("brief", q.right(q.curt)),
        ("courtesy", OPENINGS + CLOSINGS),
        ("aside", CHATTER),
        ("aside", truths()),
        ("dodge", DODGES),
        ("insult", INSULTS),
    ):
        if sentence in known:
            return sort
    return "false" if shape(sentence) in shapes() else "broken"


def judge(prompt: str, response: str) -> Verdict:
    """Return the verdict on any text as a reply to a prompt of this world.

    score = 1 + 9 * answered * true * polite * clear, each in 0..1: who fails at one of them fails.
    """
    q, sorts = question(prompt), []
    sentences = re.findall(r"\S[^.!?]*[.!?]?", response)
    for k, sentence in enumerate(sentences):
        sort = sort_of(sentence, q)
        again = sort in ("answer", "brief") and {"answer", "brief"} & set(sorts)
        late = sentence in (OPENINGS if k else []) + (CLOSINGS if k + 1 < len(sentences) else [])
        sorts.append("repeat" if again or sentence in sentences[:k] else "aside" if late else sort)
    n = Counter(sorts or ["broken"])
    factors = (
        1.0 if n["answer"] else 0.6 if n["brief"] else 0.15,
        0.25 ** n["false"],
        (0.8, 0.95, 1.0)[n["courtesy"]] * 0.5 ** n["dodge"] * 0.3 ** n["insult"],
        0.7 ** (n["aside"] + n["repeat"]) * 0.5 ** n["broken"],
    )
    ratings = {a: 1 + round(4 * factor) for a, factor in zip(ASPECTS, factors, strict=True)}
    remarks = {
        a: ", ".join(f"{n[sort]} {sort}" for sort in bearing if n[sort]) or "nothing to note"
        for a, bearing in ASPECTS.items()
    }
    critique = "; ".join(f"{aspect}: {remark}" for aspect, remark in remarks.items())
    return Verdict(round(1 + 9 * prod(factors), 1), ratings, remarks, critique)

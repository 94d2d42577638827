"""A line of a data file as what was said: the forms of a conversation and of a preference pair.

docs/operate/data.md shows an example of each. What belongs to a prompt and cannot be used is
refused by name, never left out; null, absent and blank are the same.
"""

import re
from collections.abc import Iterable

from zephyr.files import blank, shown
from zephyr.tokenizer import conversation

Spoken = list[tuple[str, str]]  # (role, content) of each message
SPEAKERS = {
    "human": "user",
    "user": "user",
    "system": "system",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
SYSTEMS = ("system", "system_prompt", "system_message")
PROMPTS = ("prompt", "question", "instruction", "conversations")
SIDES = ("chosen", "rejected")
# without these a response may answer what nobody asked
UNUSABLE = (
    "history",
    "tools",
    "functions",
    "images",
    "image",
    "videos",
    "audios",
    "documents",
    "context",
)
ALWAYS = {"input", *SYSTEMS, *PROMPTS, *UNUSABLE}
TALK = ALWAYS | {"messages", "output"}  # the columns that `talk` reads
PAIR = ALWAYS | {*SIDES, "score_chosen", "score_rejected"}  # those that `preference` and `below` do
# what a chat template leaves at the ends of a text; in the middle it may be what the text is about
MARK = r"<[|｜][\w▁]+[|｜]>"  # <|user|>, <|im_start|>, <|eot_id|>, <|endoftext|>, ...
OPENS = re.compile(
    rf"\s*(?:<s>\s*)?({MARK}|\[INST\]|<<SYS>>|<bos>|<start_of_turn>|\n\n(?:Human|Assistant):)"
)
CLOSES = re.compile(
    rf"({MARK}(?:assistant)?|\[/INST\]|</s>|<eos>|<end_of_turn>|<start_of_turn>model"
    r"|### (?:Response|Assistant):|\n\nAssistant:)\s*\Z"
)
ENDING = 80  # characters, more than any such mark has


def talk(row: dict, system: bool = True) -> Spoken:
    """Return a row's whole conversation. If `system` is true and the row has no system message, an
    empty one comes first.

    The conversation is `messages` of role and content, or `conversations` of from and value, or an
    `instruction` (with its `input`, on a line of its own) and the `output`. Raises ValueError for
    other rows.
    """
    refuse(row)
    columns, prompt = given(row, ("messages", "conversations")), None
    if not columns and (prompt := asked(row)) is None and row.get("messages") is not None:
        columns = ["messages"]  # what is wrong with it will be said
    if columns:
        found = [_named(name, row[name]) for name in columns]
        if found[1:] and found[0] != found[1]:
            raise ValueError("messages and conversations differ; remove the wrong one of them")
        prefix, messages = columns[0], found[0]
    elif prompt is None or row.get("output") is None:
        missing = "'output'" if prompt else "'messages', 'conversations' or 'instruction'"
        raise ValueError(f"has no field {missing}{it_has(row)}")
    else:
        prefix, messages = "output", prompt + [{"role": "assistant", "content": row["output"]}]
    try:
        spoken = conversation(messages, system)
    except ValueError as error:
        raise ValueError(f"{error}" if prefix == "messages" else f"{prefix}: {error}") from None
    spoken = with_system(row, spoken)
    if not any(role == "assistant" for role, _ in spoken):
        raise ValueError("no message is the assistant's; there is nothing to learn")
    no_blanks(spoken)
    plain_text(spoken)
    return spoken


def preference(row: dict, system: bool = True) -> tuple[Spoken, str, str]:
    """The prompt's messages and both responses of one row. `chosen` and `rejected` are

    conversations  whole ones, as messages or as "\\n\\nHuman: ...\\n\\nAssistant: ..." transcripts,
                   that differ in their last message; a prompt beside them must be part of them
    responses      text, or the assistant's message or messages, to a prompt: `prompt`, `question`,
                   `instruction` with its `input`, or `conversations`; text, transcript or messages

    Raises ValueError if a side is missing or out of form, the two prompts differ, or the row holds
    more than can be used.
    """
    for name in SIDES:
        if row.get(name) is None:
            raise ValueError(f"has no field {name!r}{it_has(row)}")
    if type(row["chosen"]) is not type(row["rejected"]):
        raise ValueError("chosen and rejected must both be text or both be messages")
    refuse(row)
    prompt, dialogues = asked(row), []
    for name in SIDES:
        try:
            dialogue = conversation(_dialogue(prompt, row[name]), system)
            dialogues.append(with_system(row, dialogue))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if dialogue[-1][0] != "assistant":
            raise ValueError(f"{name} must end with an assistant's message, the response")
    (*context, (_, chosen)), (*other, (_, rejected)) = dialogues
    if context != other:
        raise ValueError("the prompts of chosen and rejected differ")
    no_blanks(context)
    if given(row, PROMPTS):
        _agree(prompt, context)
    plain_text([*context, ("assistant", chosen), ("assistant", rejected)])
    return context, chosen, rejected


def below(row: dict) -> bool:
    """Return True if the row's own scores prefer the response that the row rejects."""
    try:
        return float(row.get("score_chosen")) < float(row.get("score_rejected"))
    except (TypeError, ValueError, OverflowError):
        return False


def given(row: dict, names: Iterable[str]) -> list[str]:
    return [name for name in names if not blank(row.get(name))]


def it_has(row: dict) -> str:
    names = sorted(name for name, value in row.items() if value is not None)
    return f"; it has {shown(', '.join(names), 200)}"


def refuse(row: dict, names: Iterable[str] = UNUSABLE) -> None:
    """Raise ValueError if one of the columns `names`, which cannot be used, carries something."""
    for name in given(row, names):
        raise ValueError(
            f"{name} {shown(row[name], 40)} would be lost: it is not read; write "
            "what it says into the prompt's text or messages, or remove the column"
        )


def asked(row: dict) -> list | None:
    """Return the messages of the row's prompt; None if it has no prompt. An `input` stands on the
    line after its `instruction`. Raises ValueError if columns contradict each other."""
    names = given(row, PROMPTS) or [name for name in PROMPTS if isinstance(row.get(name), str)]
    prompts = {name: row[name] for name in names}
    if "instruction" in prompts and isinstance(row["instruction"], str):
        extra = row.get("input")
        if not blank(extra):
            if not isinstance(extra, str):
                raise ValueError(f"input must be text, got {shown(extra)}")
            prompts["instruction"] += f"\n{extra}"
    else:
        refuse(row, ["input"])
    found = {name: turns(name, value) for name, value in prompts.items()}
    for name, messages in found.items():
        first = next(iter(found))
        if messages != found[first]:
            raise ValueError(
                f"{first} {shown(prompts[first], 60)} and {name} "
                f"{shown(prompts[name], 60)} differ; keep the one that was asked"
            )
    return next(iter(found.values()), None)


def turns(name: str, prompt: object) -> list:
    """Return a prompt's messages. Text is one message of the user's, unless it is a transcript."""
    if not isinstance(prompt, str):
        if not isinstance(prompt, list):
            raise ValueError(f"{name} must be text or messages, got {shown(prompt)}")
        return _named(name, prompt)
    if not (
        prompt.startswith("\n\nHuman:") or re.match(r"\s*Human:.*\n\nAssistant:\s*\Z", prompt, re.S)
    ):
        return [{"role": "user", "content": prompt}]
    messages = transcript("\n\n" + prompt.lstrip())
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def transcript(text: str) -> list[dict[str, str]]:
    """Return hh-rlhf's flat text as messages: "\n\nHuman: Hi\n\nAssistant: Yo" becomes Hi, Yo."""
    roles = {"Human": "user", "Assistant": "assistant"}
    opening, *parts = re.split(r"\n\n(Human|Assistant):", text)
    if opening or not parts or parts[0] != "Human":
        raise ValueError(
            "text without a prompt must be a transcript that opens with '\\n\\nHuman:', "
            f"got {text[:40]!r}"
        )
    said = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": what.strip()} for who, what in said]


def with_system(row: dict, spoken: Spoken) -> Spoken:
    """Return the conversation with the system message that a column of the row holds."""
    for name in given(row, SYSTEMS):
        text = row[name]
        if not isinstance(text, str):
            raise ValueError(f"{name} must be text, got {shown(text)}")
        head = spoken[0][1] if spoken[0][0] == "system" else ""
        if head.strip() and head.strip() != text.strip():
            raise ValueError(
                f"{name} {shown(text, 60)} contradicts the system message "
                f"{shown(head, 60)}; keep one of them"
            )
        spoken = [("system", text), *(turn for turn in spoken if turn[0] != "system")]
    return spoken


def no_blanks(spoken: Spoken) -> None:
    """Raise ValueError if a turn of the user or of the assistant is blank."""
    for k, (role, text) in enumerate(turn for turn in spoken if turn[0] != "system"):
        if not text.strip():
            raise ValueError(f"turn {k}, the {role}'s, is empty")


def rendered(text: str) -> tuple[str, str] | None:
    """The mark that a chat template left at the start or the end of a text, and which of the two.

    In the middle it may be what the text is about, and `<s>this</s>` is struck through in HTML.
    """
    if mark := OPENS.match(text):
        return mark[1], "start"
    mark = CLOSES.search(text, max(0, len(text.rstrip()) - ENDING))
    if mark and mark[1] == "</s>" and not text.lstrip().startswith("<s>"):
        mark = mark if text.count("</s>") > text.count("<s>") else None
    return mark and (mark[1], "end")


def plain_text(spoken: Spoken) -> None:
    """Raise ValueError if a text begins or ends with the marks of a chat template, so has been
    rendered already."""
    for role, text in spoken:
        if found := rendered(text):
            raise ValueError(
                f"the {role}'s text has a chat template's {shown(found[0])} at its {found[1]}: "
                f"{shown(text, 60)}; give what was said alone, as messages: the template is put "
                "around it here"
            )


def _dialogue(prompt: list | None, side: object) -> list:
    """Return one side's whole conversation as messages."""
    if isinstance(side, str):
        if prompt is None or side.startswith("\n\nHuman:"):
            return transcript(side)
        return [*prompt, {"role": "assistant", "content": side}]
    side = _named("", [side] if isinstance(side, dict) else side)
    if (
        not isinstance(side, list)
        or not side
        or not isinstance(side[0], dict)
        or side[0].get("role") != "assistant"
    ):
        return side
    if prompt is None:
        raise ValueError(
            f"it is a response, and there is no prompt to it: none of {', '.join(PROMPTS)}"
        )
    return prompt + side


def _agree(prompt: list, context: Spoken) -> None:
    """Raise ValueError unless the prompt's turns stand in the conversation, one after another."""
    try:
        wanted = conversation(prompt, False)
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    wanted, found = (
        [(role, text.strip()) for role, text in turns if role != "system" or text]
        for turns in (wanted, context)
    )
    if not any(found[k : k + len(wanted)] == wanted for k in range(len(found))):
        both = zip(wanted, [*found, found[-1]], strict=False)
        mine, yours = next(pair for pair in both if pair[0] != pair[1])
        raise ValueError(
            f"the prompt's {mine[0]} says {shown(mine[1], 60)}, where chosen has the "
            f"{yours[0]}'s {shown(yours[1], 60)}; remove the one that is wrong"
        )


def _named(column: str, messages: object) -> object:
    """Return ShareGPT's messages (from, value) as messages of role and content; leave others as
    they are."""
    if not isinstance(messages, list):
        return messages
    found = []
    for k, message in enumerate(messages):
        if isinstance(message, dict):
            message = {key: x for key, x in message.items() if x is not None}
            if "from" in message and "role" not in message:
                who = message.pop("from")
                if not isinstance(who, str) or who not in SPEAKERS:
                    where = f"{column}: " * bool(column)
                    raise ValueError(
                        f"{where}message {k} is from {shown(who, 40)}; known are "
                        f"{', '.join(SPEAKERS)}"
                    )
                message["role"] = SPEAKERS[who]
                if "value" in message and "content" not in message:
                    message["content"] = message.pop("value")
        found.append(message)
    return found

"""The embedded default: four birds answer questions about a small village, and a judge rates them.

    python -m zephyr.toy FOLDER [--seed N]

Nothing is downloaded: the village (village.py) and a seed make, the same bytes each time,
    ultrachat.{train,test}.jsonl.gz      what the birds said, for dSFT
    ultrafeedback.{train,test}.jsonl.gz  four answers to each prompt with their scores, for AIF
    ultrafeedback.held_out.jsonl.gz      likewise, for what is measured once: it chose no setting
    base/                                tokenizer.model and config.json of a model to be born
    made_by                              of which village.py and birds.py it is
"""

import hashlib
import io
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from statistics import mean

import sentencepiece

from zephyr import feedback, files
from zephyr.data import readers
from zephyr.data.cache import sha256_of
from zephyr.toy.village import (
    CHATTER,
    CLOSINGS,
    DODGES,
    GOSSIP,
    HELLOS,
    INSULTS,
    OPENINGS,
    PEOPLE,
    THANKS,
    VALUES,
    Question,
    judge,
    question,
    questions,
)
from zephyr.weights import hub, locate

FOLDER = Path("runs/tiny/world")  # where recipes/tiny.toml looks for it
MADE_BY = "made_by"  # in it, what it was built from
VOCAB = 640
AGAIN = {
    "And who sells it?": "Who sells {good}?",
    "And when do I come?": "When is {good} sold?",
    "And where do I go?": "Where is {good} sold?",
    "And what do I pay?": "How much is {good}?",
}


# A bird returns its sentences. Its docstring is its custom_system_prompt.


def tell(q: Question, rng: Random, slip: float, curt: bool = False) -> str:
    """Return one sentence that answers q; it is wrong with probability `slip`."""
    slots, slot = dict(q.want), rng.choice(q.asked)
    if rng.random() < slip:
        slots[slot] = rng.choice([v for v in VALUES[slot] if v not in q.want.values()])
        if "low" in slots:
            slots = {"low": q.want["high"], "high": q.want["low"]}
    return rng.choice(q.curt if curt else q.say).format(**slots)


def owl(q: Question, rng: Random, slip: float = 0.02) -> list[str]:
    """Answer truly and to the point, and be courteous."""
    first, last = rng.choice([(1, 0), (0, 1), (1, 1)])
    return first * [rng.choice(OPENINGS)] + [tell(q, rng, slip)] + last * [rng.choice(CLOSINGS)]


def wren(q: Question, rng: Random) -> list[str]:
    """Answer truly and in few words."""
    return [tell(q, rng, slip=0.05, curt=rng.random() < 0.7)]


def magpie(q: Question, rng: Random) -> list[str]:
    """Answer, and tell whatever else comes to mind."""
    answer, gossip = tell(q, rng, slip=0.1), rng.choice(GOSSIP).format(**rng.choice(PEOPLE))
    more = [answer, gossip, tell(q, rng, slip=0.1), *rng.sample(CHATTER, 2)]
    said = [answer, *rng.sample(more, rng.randint(1, 3))]
    return rng.choice([[], [rng.choice(OPENINGS)]]) + rng.sample(said, len(said))


def cuckoo(q: Question, rng: Random) -> list[str]:
    """Answer as you like, or not at all."""
    manner = rng.choice(["wrong", "wrong", "wrong", "dodge", "rude", "right"])
    if manner == "dodge":
        return rng.choice([[], [rng.choice(OPENINGS)]]) + [rng.choice(DODGES)]
    if manner == "rude":
        return [rng.choice(INSULTS)] + rng.choice([[], [tell(q, rng, slip=0.5, curt=True)]])
    return owl(q, rng, slip=manner == "wrong")


BIRDS = {owl: 3, wren: 6, magpie: 5, cuckoo: 2}  # and their shares of the conversations


def draw(texts: Iterable[str], count: int, rng: Random, unique: bool = True) -> list[str]:
    """Return `count` prompts, different ones if `unique`, equally many of each kind of question."""
    by_kind, drawn = defaultdict(list), {}
    for text in texts:
        by_kind[questions()[text].kind].append(text)
    while len(drawn) < count:
        text = rng.choice(by_kind[rng.choice(list(by_kind))])
        prompt = " ".join(filter(None, (rng.choice(HELLOS), text, rng.choice(THANKS))))
        drawn[prompt if unique else len(drawn)] = prompt
    return list(drawn.values())


def chat(prompt: str, rng: Random) -> dict:
    """A row of UltraChat-200k: one bird answers, and answers again when it is asked for more."""
    q, bird = question(prompt), rng.choices(list(BIRDS), BIRDS.values())[0]
    turns = [prompt, " ".join(bird(q, rng))]
    person = next((person for person in PEOPLE if q.want.items() <= person.items()), None)
    for again in rng.sample(list(AGAIN), 2) if person else []:
        if rng.random() < 0.4:
            turns += [again, " ".join(bird(questions()[AGAIN[again].format(**person)], rng))]
    return {
        "prompt": prompt,
        "prompt_id": hashlib.sha256(prompt.encode()).hexdigest(),
        "messages": [
            {"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(turns)
        ],
    }


def scored(prompt: str, rng: Random) -> dict:
    """A raw row of UltraFeedback: all four birds answer, and the judge rates them."""
    birds, completions = rng.sample(list(BIRDS), len(BIRDS)), []
    for bird in birds:
        response = " ".join(bird(question(prompt), rng))
        score, ratings, remarks, critique = judge(prompt, response)
        completions.append(
            {
                "model": bird.__name__,
                "principle": "helpfulness",
                "custom_system_prompt": bird.__doc__,
                "response": response,
                "annotations": {
                    aspect: {"Rating": str(rating), "Rationale": remarks[aspect]}
                    for aspect, rating in ratings.items()
                },
                "critique": critique,
                "overall_score": score,
                "fine-grained_score": mean(ratings.values()),
            }
        )
    return {
        "source": "larkmere",
        "instruction": prompt,
        "models": [b.__name__ for b in birds],
        "completions": completions,
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


FILES = {
    "ultrachat": (chat, {"train": 18000, "test": 200}),
    "ultrafeedback": (scored, {"train": 4800, "test": 200, "held_out": 600}),
}


def split(rng: Random) -> dict[str, list[str]]:
    """Return the texts of questions for training, for test and held out: a tenth of each kind is
    for test, another tenth is held out, and no such question is trained on."""
    by_kind, parts = defaultdict(list), {"held_out": [], "test": [], "train": []}
    for text, q in questions().items():
        by_kind[q.kind].append(text)
    for texts in by_kind.values():
        rng.shuffle(texts)
        tenth = len(texts) // 10
        parts["held_out"] += texts[:tenth]
        parts["test"] += texts[tenth : 2 * tenth]
        parts["train"] += texts[2 * tenth :]
    return parts


def rows(path: Path) -> list[dict]:
    return [row for _, row in readers.read_rows(path)]


def tokenizer(chats: Path) -> bytes:
    """Return a sentencepiece model in the manner of Mistral's: BPE, byte fallback, nothing
    normalised."""
    messages = [message for row in rows(chats) for message in row["messages"]]
    lines = [line for m in messages for line in (f"<|{m['role']}|>", m["content"])]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def base_config(vocab_size: int) -> dict:
    """Return the config.json of the model that the recipe starts from; hub.fresh gives it random
    weights."""
    return {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 160,
        "initializer_range": 0.06,
        "intermediate_size": 448,
        "max_position_embeddings": 512,
        "model_type": "mistral",
        "num_attention_heads": 5,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.37.2",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def build(folder: Path | str, seed: int = 0) -> None:
    """Make the whole folder, or nothing of it. Raises ValueError if it exists already."""
    folder, rng = Path(folder), Random(seed)
    if folder.exists():
        raise ValueError(f"{folder} exists already; remove it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = split(rng)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch) / folder.name
        for name, (make, sizes) in FILES.items():
            for part, count in sizes.items():
                # two birds may be asked the same, but a prompt has one row of scored answers
                prompts = draw(parts[part], count, rng, unique=make is scored)
                readers.write_rows(new / f"{name}.{part}.jsonl.gz", (make(p, rng) for p in prompts))
        config = json.dumps(base_config(VOCAB), indent=2) + "\n"
        for name, data in (
            ("tokenizer.model", tokenizer(new / "ultrachat.train.jsonl.gz")),
            ("config.json", config.encode()),
        ):
            with files.atomic(new / "base" / name) as file:
                file.write(data)
        (new / MADE_BY).write_text(version() + "\n")
        os.rename(new, folder)


def version() -> str:
    """Return the digest of the village and its birds, as their files have them."""
    here = Path(__file__)
    return " ".join(sha256_of(here.with_name(name)) for name in ("village.py", here.name))


def ensure() -> Path:
    """Return FOLDER, which is built first if it is absent. One that was built from another village
    is moved aside."""
    made_by = FOLDER / MADE_BY
    if FOLDER.exists() and (not made_by.exists() or made_by.read_text().strip() != version()):
        aside = files.unused(FOLDER, 1)
        os.rename(FOLDER, aside)
        print(f"{FOLDER} is of another village than zephyr/toy has: now {aside}", file=sys.stderr)
    if not FOLDER.exists():
        build(FOLDER)
    return FOLDER


def ensure_base() -> None:
    """Give the model folder in FOLDER random weights, if it has none."""
    if not (ensure() / "base" / locate.SINGLE).exists():
        hub.fresh(FOLDER / "base", seed=0)


def ensure_pairs(model: str | None = None) -> None:
    """Make the preference pairs in FOLDER with zephyr.feedback, as a user would, if they are
    absent. Raises ValueError if the folder `model`, which they are to train, does not exist."""
    if model and not Path(model).exists():
        raise ValueError(f"{model} is not there yet; run train_sft.py first, it makes it")
    for part in ("train", "test"):
        if not (out := ensure() / f"pairs.{part}.jsonl.gz").exists():
            feedback.main([str(FOLDER / f"ultrafeedback.{part}.jsonl.gz"), "--out", str(out)])


def summary(folder: Path) -> str:
    """Return what a folder holds, as text: counts, tokens, the judge's mean score of each bird,
    three rows."""
    chats, asked = (list(rows(folder / f"{name}.train.jsonl.gz")) for name in FILES)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "base" / "tokenizer.model"))
    said = [
        (c["model"], c["overall_score"], c["response"]) for r in asked for c in r["completions"]
    ]
    lines = [
        f"{len(chats)} conversations, {len(asked)} prompts with {len(said)} scored answers, "
        f"{sp.vocab_size()} pieces",
        f"tokens: {mean(map(len, sp.encode([r['prompt'] for r in chats]))):.1f} per prompt, "
        f"{mean(map(len, sp.encode([text for *_, text in said]))):.1f} per answer",
    ]
    for bird in BIRDS:
        scores = [score for name, score, _ in said if name == bird.__name__]
        lines.append(f"{bird.__name__:8} mean score {mean(scores):.2f}   {bird.__doc__}")
    for row in asked[:3]:
        lines.append(f"\n{row['instruction']}")
        lines += [
            f"  {c['overall_score']:4}  {c['model']:7} {c['response']}" for c in row["completions"]
        ]
    return "\n".join(lines)

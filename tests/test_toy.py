"""The village: equal bytes each time, nothing held out leaks, a judge that is hard to fool."""

import json
from itertools import product
from statistics import mean

import pytest

from zephyr.data import readers
from zephyr.tokenizer import Tokenizer
from zephyr.toy import birds, village
from zephyr.toy.village import judge


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "world"
    birds.build(folder)
    return folder


def rows(world, name: str) -> list[dict]:
    return [row for _, row in readers.read_rows(world / f"{name}.jsonl.gz")]


def test_a_seed_gives_the_same_bytes_and_another_seed_others(world, tmp_path):
    birds.build(tmp_path / "again")
    birds.build(tmp_path / "other", seed=1)
    names = sorted(str(p.relative_to(world)) for p in world.rglob("*") if p.is_file())
    assert "base/tokenizer.model" in names and len(names) == 8
    for name in names:
        assert (world / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    train = "ultrachat.train.jsonl.gz"
    assert (world / train).read_bytes() != (tmp_path / "other" / train).read_bytes()


def core(prompt: str) -> str:
    """The question in a prompt, without greeting and thanks."""
    for hello, thanks in product(village.HELLOS, village.THANKS):
        text = prompt.removeprefix(hello).removesuffix(thanks).strip()
        if text in village.questions():
            return text
    raise AssertionError(prompt)


def test_no_held_out_question_is_ever_trained_on(world):
    """Not even with another greeting before it or another thank-you behind it; nor is one of the
    last comparison among those by which settings are chosen."""
    columns = {"ultrachat": "prompt", "ultrafeedback": "instruction"}
    asked = {
        (name, part): {core(row[columns[name]]) for row in rows(world, f"{name}.{part}")}
        for name, (_, sizes) in birds.FILES.items()
        for part in sizes
    }
    train = asked["ultrachat", "train"] | asked["ultrafeedback", "train"]
    test = asked["ultrachat", "test"] | asked["ultrafeedback", "test"]
    held_out = asked["ultrafeedback", "held_out"]
    assert not train & test and not train & held_out and not test & held_out
    assert len(train) > 500 and len(test) > 40 and len(held_out) > 40
    for part, count in (("test", 200), ("held_out", 600)):
        prompts = [row["instruction"] for row in rows(world, f"ultrafeedback.{part}")]
        assert len(set(prompts)) == len(prompts) == count


def test_schemas(world):
    chat = rows(world, "ultrachat.train")
    assert len(chat) == 18000
    for row in chat:
        assert set(row) == {"prompt", "prompt_id", "messages"}
        assert row["messages"][0] == {"role": "user", "content": row["prompt"]}
    assert any(len(row["messages"]) > 2 for row in chat), "several turns"
    for row in rows(world, "ultrafeedback.train"):
        assert set(row) == {
            "source",
            "instruction",
            "models",
            "completions",
            "correct_answers",
            "incorrect_answers",
        }
        assert len(row["models"]) == len(row["completions"]) == 4
        for completion in row["completions"]:
            assert set(completion) == {
                "model",
                "principle",
                "custom_system_prompt",
                "response",
                "annotations",
                "critique",
                "overall_score",
                "fine-grained_score",
            }
            assert set(completion["annotations"]) == {
                "instruction_following",
                "honesty",
                "truthfulness",
                "helpfulness",
            }
            assert all(isinstance(a["Rating"], str) for a in completion["annotations"].values())
            verdict = judge(row["instruction"], completion["response"])
            assert verdict.score == completion["overall_score"]


def test_the_judge_ranks_the_birds_but_not_always(world):
    scores: dict[str, list[float]] = {}
    for row in rows(world, "ultrafeedback.train"):
        for completion in row["completions"]:
            scores.setdefault(completion["model"], []).append(completion["overall_score"])
    owl, wren, magpie, cuckoo = (mean(scores[b]) for b in ("owl", "wren", "magpie", "cuckoo"))
    assert owl > wren + 1 > magpie + 1.5 > cuckoo + 2
    for other in ("wren", "magpie", "cuckoo"):
        wins = mean(a > b for a, b in zip(scores["owl"], scores[other], strict=True))
        assert 0.8 < wins < 1, other


def test_the_judge_is_not_fooled(world):
    """Each trick scores far below the best honest answer to the same prompt, on average."""
    asked = rows(world, "ultrafeedback.test")
    best = [max(row["completions"], key=lambda c: c["overall_score"]) for row in asked]
    everything = " ".join(sorted(village.truths())[:60])
    tricks = {
        "nothing": lambda row, good: "",
        "the prompt": lambda row, good: row["instruction"],
        "yes": lambda row, good: "Yes.",
        "courtesy alone": lambda row, good: "Gladly! Have a good day!",
        "all that is true": lambda row, good: everything,
        "no end": lambda row, good: good * 20,
        "words in disorder": lambda row, good: " ".join(sorted(good.split())),
        "no sense": lambda row, good: "wool wool the of a bread, is.",
    }
    honest = mean(c["overall_score"] for c in best)
    assert honest > 9
    for name, trick in tricks.items():
        got = mean(
            judge(row["instruction"], trick(row, good["response"])).score
            for row, good in zip(asked, best, strict=True)
        )
        assert got < 4, (name, got)


def test_a_polite_lie_scores_low(world):
    """The courteous answer to another prompt of the same kind is well formed, polite and false."""
    asked = rows(world, "ultrafeedback.test")
    best = {
        r["instruction"]: max(r["completions"], key=lambda c: c["overall_score"])["response"]
        for r in asked
    }
    lies = []
    for prompt in best:
        kind, want = village.question(prompt).kind, village.question(prompt).want
        for other, answer in best.items():
            q = village.question(other)
            if q.kind == kind and all(q.want[k] != want[k] for k in want):
                lies.append(judge(prompt, answer).score)
                break
    assert len(lies) > 50 and mean(lies) < 4


def test_any_text_gets_a_verdict_and_any_other_prompt_none():
    prompt = next(iter(village.questions()))
    for text in ("", " ", "...", "\x00", "🙂" * 50, "a" * 10_000, "\n\n", "Who? Me! No."):
        assert 1 <= judge(prompt, text).score <= 10
    with pytest.raises(ValueError, match="is not of this world"):
        judge("What is the capital of France?", "Paris.")


def test_lengths_are_what_a_small_model_can_learn(world):
    tokenizer = Tokenizer(world / "base")
    assert tokenizer.vocab_size == birds.VOCAB
    chats = rows(world, "ultrachat.train")
    lengths = [len(tokenizer.render(row["messages"]).ids) for row in chats]
    assert 1_000_000 < sum(lengths) < 2_000_000
    window = json.loads((world / "base" / "config.json").read_text())["sliding_window"]
    assert 0.05 < mean(n > window for n in lengths) < 0.6, "the window is used, by some"
    for row in chats[:200]:
        assert tokenizer.decode(tokenizer.encode("\n" + row["prompt"])[2:]) == row["prompt"]


def test_building_over_something_is_refused(world):
    with pytest.raises(ValueError, match="exists already; remove it or name another"):
        birds.build(world)


def test_a_folder_of_another_village_is_moved_aside(tmp_path, monkeypatch, capsys):
    """As after an update, or an edit of village.py; one of this village stays."""
    monkeypatch.setattr(birds, "FOLDER", tmp_path / "world")
    monkeypatch.setattr(birds, "build", lambda folder: made.append(folder) or fresh(folder))
    made = []

    def fresh(folder):
        folder.mkdir()
        (folder / birds.MADE_BY).write_text(birds.version())

    assert birds.ensure() == birds.ensure() and len(made) == 1
    for k, change in enumerate((lambda mark: mark.write_text("older"), lambda mark: mark.unlink())):
        (birds.FOLDER / "old").write_text(str(k))
        change(birds.FOLDER / birds.MADE_BY)
        birds.ensure()
        assert not (birds.FOLDER / "old").exists()
        aside = tmp_path / f"world.{k + 1}"
        assert (aside / "old").read_text() == str(k) and str(aside) in capsys.readouterr().err
    assert len(made) == 3


def test_what_a_folder_was_made_by_is_in_it(tmp_path):
    birds.build(tmp_path / "world")
    assert (tmp_path / "world" / birds.MADE_BY).read_text().strip() == birds.version()

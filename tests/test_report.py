"""The page to click through: its figures are those of --json, its answers are data, and it needs
nothing from outside."""

import base64
import collections
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from test_evals import PAIR_PROMPT, alpaca_data, annotation, one_line, pair, score

from helpers import ROOT, save, shared
from zephyr.data.readers import read_rows
from zephyr.evals import alpaca, entries, html, mt_bench, mt_bench_prompts
from zephyr.evals.__main__ import main
from zephyr.evals.mt_bench_prompts import conversation

HOSTILE = {
    "closes the script": "</script><img src=x onerror=alert(1)>",
    "opens a comment": "<!--<script>",
    "a mark of the template": "{{figures}} {{data}} \\1 \\g<0>",
    "line separators": "a\u2028b\u2029c\x85d\r\ne",
    "control characters": "\x00\x07\x1b[31m\x7f\x9b",
    "right to left": "\u202eשלום עליכם\u2066 مرحبا",
    "beyond the first plane": "😀𝒳",
    "1 MB": "<b>&amp;\\" * 125_000,
    "nothing": "",
}


class Page(HTMLParser):
    """What a browser sees: the tags, the texts of tables and lists, and the scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.rows, self.items, self.bars = [], [], [], []
        self.inside: dict[str, list[str]] = collections.defaultdict(list)
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs.get("id"), attrs.get("class")))
        self.attrs = getattr(self, "attrs", []) + [(tag, *item) for item in attrs.items()]
        if tag not in ("meta", "input", "rect", "line"):
            self.open.append(tag)
            self.inside[tag].append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "li":
            self.items.append("")
        if tag in ("rect", "line"):
            self.bars.append((tag, attrs))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if not self.open:
            return
        self.inside[self.open[-1]][-1] += text
        if {"th", "td"} & set(self.open) and "title" not in self.open:
            self.rows[-1][-1] += text
        if "li" in self.open:
            self.items[-1] += text

    @functools.cached_property
    def data(self) -> dict:
        return json.loads(self.inside["script"][0])


def made(tmp_path, *args) -> tuple[Page, dict]:
    out, figures = tmp_path / "report.html", tmp_path / "figures.json"
    main(["show", *map(str, args), "--html", str(out), "--json", str(figures)])
    return Page(out.read_text(encoding="utf-8")), json.loads(figures.read_text())


def options(page: Page, name: str) -> dict[str, int]:
    [found] = [f["options"] for f in page.data["filters"] if f["name"] == name]
    return dict(found)


def f2(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def group_rows(figures: dict) -> list[list[str]]:
    """The rows of the judge's two tables, from its figures."""
    rows = []
    if slots := figures.get("slots"):
        for slot in ("first", "second"):
            g = slots[slot]
            rows.append([f"shown {slot}", str(g["n"]), f2(g["mean"]), f2(g["standard_error"])])
        gap = f"{slots['second_minus_first']:+.2f}"
        rows.append(["second less first", "", gap, f2(slots["standard_error"])])
    for q in figures["length_quarters"]:
        name = f"{q['shortest']} to {q['longest']}"
        rows.append([name, str(q["n"]), f2(q["mean"]), f2(q["standard_error"])])
    return rows


def missing(expected: list[list[str]], page: Page) -> list[list[str]]:
    return [row for row in expected if row not in page.rows]


# the figures


def test_alpaca_the_figures_are_those_of_json(tmp_path, capsys):
    path = shared("alpaca_eval/annotations.OpenHermes-2.5-Mistral-7B.json.gz")
    page, f = made(tmp_path, path, "--alpaca-data", alpaca_data(), "--feedback", "gpt-4")
    expected = [
        ["win rate", f2(f["win_rate"]), f2(f["standard_error"])],
        [
            "length-controlled win rate",
            f2(f["length_controlled_win_rate"]),
            f2(f["lc_standard_error"]),
        ],
        ["discrete win rate", f2(f["discrete_win_rate"]), ""],
        *group_rows(f),
    ]
    assert missing(expected, page) == []
    heads = [row for row in page.rows if row[-1] == "s.e."]
    assert len(page.rows) == len(expected) + len(heads)  # and no row is there besides
    text = "\n".join(page.items)
    for warning in f["warnings"] + f["notes"]:
        assert warning in text
    assert f"{f['n_total']} judged: {f['n_wins']} wins, {f['n_wins_base']} losses" in text
    assert f"{f['n_draws']} draws; {f['n_dropped']} without a verdict" in text
    assert f"{f['ties']} ties" in text and f"{f['parse_failures']} verdicts could not" in text
    assert f2(f["bootstrap_standard_error"]) in text and str(f["avg_length_baseline"]) in text
    printed = " ".join(capsys.readouterr().out.split())
    for item in page.items:  # each sentence is one of the plain page
        assert item.removeprefix("warning ").removeprefix("note ") in printed


def test_a_bar_is_the_mean_and_its_interval(tmp_path):
    save(tmp_path / "a.jsonl", *(annotation(k, 1 + (k % 4 == 0)) for k in range(40)))
    page, f = made(tmp_path, tmp_path / "a.jsonl")
    (_, whole), (_, rate), (_, line) = page.bars[:3]
    assert whole["width"] == "100%" and rate["width"] == "25.00%" and f["win_rate"] == 25
    error = f["standard_error"]
    assert line["x1"] == f"{25 - 1.96 * error:.2f}%" and line["x2"] == f"{25 + 1.96 * error:.2f}%"
    assert f"25.00 of 100, 95 % interval {25 - 1.96 * error:.2f} to" in page.inside["title"][1]
    ends = [float(bar[key][:-1]) for _, bar in page.bars for key in ("x1", "x2") if key in bar]
    assert len(ends) > 4 and all(0 <= end <= 100 for end in ends)  # an interval may reach beyond


def test_scores_by_category_and_turn(tmp_path):
    paths = [
        shared(f"mt_bench/judgment.{m}.jsonl.gz") for m in ("mistral-orpo-mix", "mistral-orpo")
    ]
    page, figures = made(tmp_path, *paths)
    expected = []
    for name, f in figures.items():
        means = [f"{f[key]:.5f}" for key in ("turn_1", "turn_2", "average")]
        expected.append([name, *means, f2(f["standard_error"]), str(f["n_judgments"])])
        for category, c in f["categories"].items():
            means = [f2(c[key]) for key in ("turn_1", "turn_2", "average")]
            expected.append([category, str(c["n"]), *means])
        expected += group_rows(f)
    assert missing(expected, page) == []
    text = "\n".join(page.items)
    assert "1 judgments have no score" in text and "160 judgments are of a question" in text
    assert "the reference answers of 13 questions" in text and "note --feedback NAME" in text
    assert options(page, "category") == dict.fromkeys(mt_bench.CATEGORIES, 20)
    assert options(page, "run") == {"mistral-orpo-mix": 160, "mistral-orpo": 160}
    assert options(page, "verdict")["no verdict"] == 1
    words = [
        one["words"] for e in page.data["entries"] for a in e["answers"] for one in a["judged"]
    ]
    stored = [row["judgment"] for path in paths for _, row in read_rows(path)]
    assert sorted(words) == sorted(stored) and len(words) == 480
    assert [len(e["questions"]) for e in page.data["entries"]] == [1, 2] * 80


def test_pairs_of_two_judges_and_their_agreement(tmp_path):
    save(
        tmp_path / "a.jsonl",
        pair(81, "model_1", "model_1", ("<i>one</i>", "two"), g1_judgment="[[A]]", g2_judgment="B"),
        pair(82, "model_2", "model_2"),
        pair(83, "tie", "model_1"),
        pair(84, "error", "model_1"),
        pair(91, "tie", "tie", g1_user_prompt="Which of <these>?"),
        pair(81, "model_1", "model_1", judge=["o", "p"]),
    )
    page, figures = made(tmp_path, tmp_path / "a.jsonl")
    expected = []
    for name in ("m (gpt-4)", "n (gpt-4)", "m (o)", "n (o)"):
        f = figures[name]["pairs"]
        rate = ["win rate, ties as half", f2(f["win_rate"]), f2(f["standard_error"])]
        expected += [rate, *group_rows(f)]
        sentence = f"{f['wins']} wins, {f['losses']} losses, {f['ties']} ties in {f['n_pairs']}"
        assert sum(item.startswith(sentence) for item in page.items)
    assert missing(expected, page) == []
    [agreed] = figures["agreement"]
    assert f"agree on {agreed['same']:.1f} % of {agreed['n']} verdicts" in " ".join(page.items)
    f = figures["m (gpt-4)"]["pairs"]
    assert options(page, "verdict") == {
        "m wins": f["wins"] + 1,  # and the other judge's
        "n wins": f["losses"],
        "tie": f["ties"],
        "no verdict": 1,
        "orders disagree": 1,
    }
    assert options(page, "length") | {"equally long": 0} == {
        "m: the longer answer": 1,
        "equally long": 0,
        "m (gpt-4): longer by 0 to 0": 3,
        "m (gpt-4): longer by 7 to 7": 1,
    }
    first, *_, last = page.data["entries"]
    assert [a["texts"] for a in first["answers"]] == [["<i>one</i>"], ["two"]]
    assert first["questions"] == ["Why?"] and [j["words"] for j in first["judged"]] == [
        "[[A]]",
        "B",
    ]
    assert [j["how"] for j in first["judged"]] == [f"{m} shown first, by gpt-4" for m in "mn"]
    assert last["questions"] == [] and last["answers"][0]["prompt"] == "Which of <these>?"


# the answers


@pytest.mark.parametrize("name", ["annotations.claude-2.1", "ae1.zephyr-7b-alpha"])
def test_every_real_answer_and_verdict_is_there(name, tmp_path):
    """The second file has draws written as 0, a null, and no words of the judge."""
    path = shared(f"alpaca_eval/{name}.json.gz")
    page, f = made(tmp_path, path)
    rows = [row for _, row in read_rows(path)]
    assert len(page.data["entries"]) == 805
    for entry, row in zip(page.data["entries"], rows, strict=True):
        assert entry["questions"] == [row["instruction"]]
        own, other = entry["answers"]
        assert (own["name"], own["texts"]) == (row["generator_2"], [row["output_2"]])
        assert (other["name"], other["texts"]) == (row["generator_1"], [row["output_1"]])
        [judged], [verdict] = entry["judged"], entry["verdict"]
        equal, preference = row["output_1"] == row["output_2"], row["preference"]
        assert equal == ("no judge is asked" in judged["how"])
        if preference is None:
            assert judged["verdict"] == verdict == "no verdict"
        else:
            assert judged["verdict"] == f"{verdict}, preference {preference or 1.5:.2f}"
        raw = None if equal else row.get("raw_completion")
        assert judged["words"] == (raw["message"]["content"] if raw else "")
    count = {"win": f["n_wins"], "loss": f["n_wins_base"], "tie": f["n_draws"]}
    count |= {"no verdict": f["n_dropped"]} if f["n_dropped"] else {}
    assert options(page, "verdict") == count
    lengths = options(page, "length")
    for q in f["length_quarters"]:
        assert lengths[f"longer by {q['shortest']} to {q['longest']}"] == q["n"]
    longer = sum(len(row["output_2"]) > len(row["output_1"]) for row in rows)
    assert lengths[f"{f['model']}: the longer answer"] == longer


def test_both_orders(tmp_path):
    def both(k, first, second, **more):
        known = [p for p in (first, second) if p is not None]
        orders = {"preference_model_first": first, "preference_model_second": second}
        return annotation(k, sum(known) / len(known) if known else None, k, **orders, **more)

    # the order of AlpacaEval's coin is in its own column, the other one beside it
    first = alpaca.model_is_first(annotation(1, 2, 1)["instruction"])
    names = ("raw_completion", "raw_completion_exchanged")[:: 1 if first else -1]
    words = dict(zip(names, ("M, I think", {"a": 1}), strict=True))
    save(
        tmp_path / "a.jsonl",
        both(1, 2, 1, **words),
        both(2, 2, 1.9),
        both(3, 1, 1.2),
        both(4, 1.5, 1.5),
        both(5, None, 2),
        both(6, None, None),
        both(7, 1.5, 1.2),
    )
    page, f = made(tmp_path, tmp_path / "a.jsonl")
    same = f["consistency"]
    changed = round(same["pairs"] * (1 - same["consistent"] / 100))
    count = options(page, "verdict")
    assert count == {"win": 2, "loss": 2, "tie": 2, "no verdict": 1, "orders disagree": changed}
    assert changed == 2
    one, *_, six, _ = page.data["entries"]
    assert [j["verdict"] for j in one["judged"]] == [
        "win, preference 2.00",
        "loss, preference 1.00",
    ]
    assert [j["words"] for j in one["judged"]] == ["M, I think", '{"a": 1}']
    assert one["judged"][1]["how"] == "model shown second"
    assert six["verdict"] == ["no verdict"]


def test_two_runs_are_told_apart(tmp_path):
    first = [annotation(k, p) for k, p in enumerate([2, 2, 1, 1])]
    save(tmp_path / "a.jsonl", *first)
    save(tmp_path / "b.jsonl", *(row | {"annotator": "other", "preference": 1} for row in first))
    page, figures = made(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert options(page, "run") == {"model (judge)": 4, "model (other)": 4}
    assert [e["verdict"] for e in page.data["entries"] if e["run"] == ["model (other)"]] == [
        ["loss"]
    ] * 4
    assert [item for item in page.items if "Cohen's kappa" in item]
    assert page.inside["h2"][:2] == ["AlpacaEval: model"] * 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_answer_is_data(kind, tmp_path):
    """Whatever stands in it, the page has the same tags, and its script gets the same text."""
    text = HOSTILE[kind]

    def files(text):
        # by AlpacaEval's rule the model's answer is shown first, so that the tables are alike
        asked = (f"{k} {text}" for k in itertools.count())
        question = next(text for text in asked if alpaca.model_is_first(text))
        row = {"instruction": question, "dataset": text or "none"}
        save(tmp_path / "a.jsonl", annotation(1, 2, output_2=text), annotation(1, 1.5) | row)
        prompt = PAIR_PROMPT.format(text, "b")
        games = {"g1_user_prompt": prompt, "g1_judgment": text}
        save(tmp_path / "b.jsonl", pair(81, "model_1", "tie") | games)
        return [made(tmp_path, tmp_path / f"{name}.jsonl")[0] for name in "ab"]

    for plain, hostile in zip(files("plain"), files(text), strict=True):
        assert hostile.tags == plain.tags and len(hostile.inside["script"]) == 2
        assert hostile.inside["script"][1] == plain.inside["script"][1]
        assert not re.search(r"[<>&]|[^ -~]", hostile.inside["script"][0])
    annotated, games = files(text)
    one, other = annotated.data["entries"]
    assert one["answers"][0]["texts"] == [text]
    assert other["questions"][0].endswith(text) and other["category"] == [text or "none"]
    assert games.data["entries"][0]["answers"][0]["texts"] == [text]
    assert games.data["entries"][0]["judged"][0]["words"] == text


def test_half_a_character_is_data_too():
    """A file may not hold one, but what does reaches the page as it is."""
    entry = entries.Entry("1", ["a\ud800b"], verdict={"\udfff": 0})
    read = json.loads(html.data([entry]))
    assert read["entries"][0]["questions"] == ["a\ud800b"]
    assert read["filters"][0]["options"] == [["\udfff", 1]]


def test_names_are_text(tmp_path):
    name = "<img src=x onerror=alert(1)>&amp;"
    save(tmp_path / "a.jsonl", annotation(1, 2, generator_2=name, annotator=name))
    page, _ = made(tmp_path, tmp_path / "a.jsonl", "--feedback", name)
    assert page.inside["title"][0] == f"AlpacaEval: {name}" and name in page.inside["h2"][0]
    assert "img" not in {tag for tag, *_ in page.tags}
    save(tmp_path / "b.jsonl", score(81, 1, 8, model="\x1b[31m\u202e" + "x" * 300))
    page, _ = made(tmp_path, tmp_path / "b.jsonl")
    assert all(cell.isprintable() for row in page.rows for cell in row)


# the page


def test_nothing_is_fetched_and_only_this_style_and_script_run(tmp_path):
    save(tmp_path / "a.jsonl", annotation(1, 2, output_2="see http://example.com/x.png"))
    page, _ = made(tmp_path, tmp_path / "a.jsonl")
    assert {"src", "href", "style", "srcset", "action", "data", "poster"}.isdisjoint(
        name for _, name, _ in page.attrs
    )
    assert not [name for _, name, _ in page.attrs if name.startswith("on")]
    [style], [_, script] = page.inside["style"], page.inside["script"]
    for text in (style, script):
        assert not re.search(r"url\(|@import|https?:|//\w|innerHTML|insertAdjacent|eval", text)
    [policy] = [value for tag, name, value in page.attrs if "default-src" in (value or "")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    for name, text in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules.pop(name) == f"'sha256-{digest}'"
    assert rules == {}
    controls = [tag for tag, *_ in page.tags if tag in ("input", "select", "textarea")]
    assert len(controls) == len(page.inside["label"])
    assert "noscript" in page.inside


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [annotation(k, 1 + k % 2, k, dataset="ab"[k % 2]) for k in range(20)]
    rows.append(annotation(20, 1.5, preference_model_first=2, preference_model_second=1))
    save(tmp_path / "a.jsonl", *rows)
    pages = []
    for seed in "12":  # of the order in which a set of texts is walked through
        out = tmp_path / f"{seed}.html"
        command = [sys.executable, "-m", "zephyr.evals", "show", str(tmp_path / "a.jsonl")]
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, "--html", str(out)], cwd=ROOT, env=env, check=True)
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]


def test_what_cannot_be_written_is_one_line(tmp_path, capsys):
    save(tmp_path / "a.jsonl", annotation(1, 2))
    data = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "folder.html").mkdir()
    for out, code, message in (
        (tmp_path / "a.jsonl" / "x.html", 5, "cannot write"),
        (tmp_path / "folder.html", 2, "is a folder"),
        (tmp_path / "page.txt", 2, "the page's name ends in .html"),
        (tmp_path / "a.jsonl", 2, "would overwrite this file: it is read"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["show", str(tmp_path / "a.jsonl"), "--html", str(out)])
        printed = capsys.readouterr()
        assert end.value.code == code and printed.out == ""
        assert message in printed.err and printed.err.count("\n") == 1
    assert (tmp_path / "a.jsonl").read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "folder.html"]
    assert "--html" in one_line(["--html"], capsys)


# the judge's prompts

TURNS = {
    "question": "Why? [Answer]",
    "question_1": "Why?",
    "question_2": "How?\n\nAnd when?",
    "ref_answer_1": "Since.",
    "ref_answer_2": "So.\n",
    "answer": "\nBecause.\n\n### User:\nno\n",
    "answer_1": "Because.",
    "answer_2": "\n\nThus\n\n### Assistant A:\nnot\n\n",
    "answer_a": "A [[B]]",
    "answer_b": "B\n\n[The Start of Assistant A's Answer]\n",
    "answer_a_1": "a1",
    "answer_a_2": "a2\n",
    "answer_b_1": "b1",
    "answer_b_2": "b2\n\n### User:\nx",
}


def held(name: str, template: str):
    """What a template of this name holds, filled in: what is expected, and what is found."""
    multi, pairs, math = (part in name for part in ("multi-turn", "pair", "math"))
    first = ["question_1", "question_2"] if multi else ["question"]
    ends = ["_1", "_2"] if multi else [""]
    models = {"a": "answer_a", "b": "answer_b"} if pairs else {"a": "answer"}
    answers = {k: [TURNS[answer + end] for end in ends] for k, answer in models.items()}
    found = conversation(template.format(**TURNS))
    return ([TURNS[key] for key in first], answers, math), found


def taken_apart(name: str, template: str) -> None:
    (questions, answers, math), found = held(name, template)
    assert found.questions == questions and found.answers == answers, name
    references = "\n".join(found.references)
    assert ("Since." in references) == math
    assert ("So." in references) == (math and "multi" in name)


def test_fastchats_prompts_are_taken_apart():
    for _, row in read_rows(shared("mt_bench/judge_prompts.jsonl")):
        taken_apart(row["name"], row["prompt_template"])


@pytest.mark.parametrize("name", mt_bench_prompts.NAMES)
def test_our_own_prompts_are_taken_apart(name):
    taken_apart(name, mt_bench_prompts.read(None)[name].template)


def test_real_prompts_are_taken_apart():
    asked = [q["turns"] for _, q in read_rows(shared("mt_bench/question.jsonl"))]
    for model in ("mistral-orpo", "mistral-orpo-mix"):
        for _, row in read_rows(shared(f"mt_bench/judgment.{model}.jsonl.gz")):
            found, prompt = conversation(row["user_prompt"]), row["user_prompt"]
            assert len(found.questions) == len(found.answers["a"]) == row["turn"]
            assert len(found.answers["a"][-1]) == mt_bench.answer_length(prompt)
            assert found.questions in [turns[: row["turn"]] for turns in asked]


def test_another_prompt_is_left_as_it_is():
    for prompt in (None, 5, "", "Which is better?", "[Question]\nWhy?\n\nno answer"):
        assert conversation(prompt) is None
    cut = PAIR_PROMPT.format("a", "b").removesuffix("]")
    assert conversation(cut) is None


def test_a_prompt_of_marks_alone_is_read_at_once():
    """In linear time: by a search that goes back, this one takes minutes."""
    mark = "<|The Start of Assistant A's Conversation with User|>\n"
    assert np.isnan(mt_bench.longer(mark * 40_000)) and np.isnan(mt_bench.answer_length(mark))


def test_games_without_any_verdict(tmp_path):
    save(tmp_path / "a.jsonl", pair(81, "error", "error"), pair(82, "error", "tie"))
    page, figures = made(tmp_path, tmp_path / "a.jsonl")
    assert [entry["verdict"] for entry in page.data["entries"]] == [["no verdict"]] * 2
    assert figures["m"]["pairs"]["n_failures"] == 3


def test_a_model_may_have_the_name_of_a_figure(tmp_path):
    for name in ("agreement", "model"):
        save(tmp_path / "a.jsonl", score(81, 1, 8, model=name), score(81, 1, 5, model="m"))
        page, figures = made(tmp_path, tmp_path / "a.jsonl")
        assert figures[name]["average"] == 8 and len(page.data["entries"]) == 1


@pytest.mark.parametrize(
    "model, why",
    [
        ("agreement", "a model has the name 'agreement', under which"),
        ("m (gpt-4)", "two runs are both shown as 'm (gpt-4)'"),
    ],
)
def test_a_name_that_would_hide_another_is_refused(model, why, tmp_path, capsys):
    save(tmp_path / "a.jsonl", score(81, 1, 8, model=model), score(81, 1, 5, model="m"))
    save(tmp_path / "b.jsonl", score(81, 1, 7, model="m", judge=["other", "p"]))
    assert why in one_line([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], capsys)


def test_the_judge_s_words_stand_with_their_order(tmp_path):
    """Whichever of the two AlpacaEval's coin gives, `raw_completion` is its own."""
    rows = [
        annotation(k, 1.5, k, raw_completion="coin's", raw_completion_exchanged="other's")
        | {"preference_model_first": 2, "preference_model_second": 1}
        for k in range(1, 12)
    ]
    save(tmp_path / "a.jsonl", *rows)
    page, _ = made(tmp_path, tmp_path / "a.jsonl")
    coins = [alpaca.model_is_first(row["instruction"]) for row in rows]
    assert len(set(coins)) == 2
    for first, entry in zip(coins, page.data["entries"], strict=True):
        words = ["coin's", "other's"] if first else ["other's", "coin's"]
        assert [j["words"] for j in entry["judged"]] == words
        assert entry["judged"][0]["how"].endswith("shown first")

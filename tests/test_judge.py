"""MT-Bench judged at an endpoint: prompts against FastChat's own, grades, games, its files."""

import gzip
import json
import re

import pytest
from judge_helpers import judging, not_there

from helpers import shared
from model_helpers import folder_of, model
from zephyr.data.readers import read_rows, write_rows
from zephyr.evals import __main__ as evals_command
from zephyr.evals import judge_mt_bench, mt_bench, mt_bench_prompts
from zephyr.evals.questions import read_questions

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Shorter."]},
    {"question_id": 101, "category": "math", "turns": ["1 + 1?", "And {x}?"]},
]
KINDS = ("single-v1", "single-math-v1")
ANSWERS = {81: ["Roses are red.", "Red."], 101: ["2", "3"]}


def answer_line(number, turns, model="ours"):
    return {
        "question_id": number,
        "answer_id": "a",
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
    }


@pytest.fixture
def files(tmp_path):
    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    write_rows(tmp_path / "a.jsonl", [answer_line(*item) for item in ANSWERS.items()])
    write_rows(tmp_path / "r.jsonl", [answer_line(101, ["two", "three"], "gpt-4")])
    return tmp_path


@pytest.fixture
def server():
    with judging() as httpd:
        yield httpd


def command(files, server, *more, references=True):
    argv = ["judge", "mt-bench", files / "a.jsonl", "--questions", files / "q.jsonl"]
    argv += ["--references", files / "r.jsonl"] if references else []
    argv += ["--judge", f"gpt-x@{server.url}", "--out", files / "out.jsonl", *more]
    evals_command.main(list(map(str, argv)))


def test_the_prompts_are_fastchats_to_the_letter():
    """Of 320 published judgments, of both turns, with and without references; FastChat's own file
    has what its judge was sent."""
    data = shared("mt_bench")
    questions = {q.name: q for q in read_questions(str(data / "question.jsonl"))}
    references = judge_mt_bench.read_answers(str(data / "reference_answer_gpt-4.jsonl"))[1]
    prompts = mt_bench_prompts.read(str(data / "judge_prompts.jsonl"))
    with gzip.open(data / "judgment.mistral-orpo-mix.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    answers = {}
    said = re.compile(r"### Assistant A:\n(.*?)\n\n### User:\n", re.S)
    for row in rows:
        if row["turn"] == 2:
            number, text = row["question_id"], row["user_prompt"]
            text = text[text.index("<|The Start of Assistant A's Conversation") :]
            second = "### User:\n" + questions[number].turns[1]
            last = text[text.index(second) :].split("### Assistant A:\n", 1)[1]
            last = last.rsplit("\n\n<|The End of Assistant A's", 1)[0]
            answers[number] = [said.search(text)[1], last]
    found = {
        (match.question, match.turn): match
        for match in judge_mt_bench.matches(questions, [answers], references, prompts)
    }
    assert len(found) == len(rows) == 160
    for row in rows:
        match = found[row["question_id"], row["turn"]]
        ((_, user),) = match.games
        assert match.prompt == row["judge"][1] and user["content"] == row["user_prompt"]


def test_judgments_are_written_as_fastchat_has_them(files, server, capsys):
    server.says = lambda body: f"So. [[{8 if 'poem' in str(body) else 3}]]"
    command(files, server, "--feedback", "gpt-4")
    rows = [row for _, row in read_rows(files / "out.jsonl")]
    assert [(r["question_id"], r["turn"], r["score"]) for r in rows] == [
        (81, 1, 8.0),
        (81, 2, 8.0),
        (101, 1, 3.0),
        (101, 2, 3.0),
    ]
    assert rows[3]["judge"] == ["gpt-x", "zephyr-single-math-v1-multi-turn"]
    assert "three" in rows[3]["user_prompt"] and "And {x}?" in rows[3]["user_prompt"]
    assert all(body["temperature"] == 0 and body["model"] == "gpt-x" for body in server.asked)
    said = capsys.readouterr().out
    assert re.search(r"ours +5\.50000 +5\.50000 +5\.50000", said)
    assert "prompts are our own" in said and "family gpt" in said
    assert "questions were judged" not in said
    evals_command.main(["show", str(files / "out.jsonl")])
    said = capsys.readouterr().out
    assert "prompts are our own" in said and "warning: 2 of 80 questions were judged" in said


def test_an_empty_answer_is_graded_and_told(files, server, capsys):
    write_rows(files / "a.jsonl", [answer_line(81, ["", "x"])])
    command(files, server)
    rows = [row for _, row in read_rows(files / "out.jsonl")]
    assert [row["turn"] for row in rows] == [1, 2] and len(server.asked) == 2
    assert "1 answers are empty, the first to question 81; the judge saw" in capsys.readouterr().out


def test_fastchats_prompts_are_used_unchanged(files, server, capsys):
    data = shared("mt_bench")
    command(files, server, "--prompts", data / "judge_prompts.jsonl")
    names = {row["judge"][1] for _, row in read_rows(files / "out.jsonl")}
    assert names == {kind + turn for kind in KINDS for turn in ("", "-multi-turn")}
    assert "prompts are our own" not in capsys.readouterr().out
    system = next(b for b in server.asked if "Shorter." in str(b))["messages"][0]["content"]
    assert system.startswith("Please act as an impartial judge")


def test_a_prompt_with_a_place_that_nothing_fills(files, server, capsys):
    rows = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": "{question} {answer} {why}"}
        for name in mt_bench_prompts.NAMES
    ]
    write_rows(files / "p.jsonl", rows)
    with pytest.raises(SystemExit):
        command(files, server, "--prompts", files / "p.jsonl")
    assert "prompt single-v1 has a place that nothing fills: 'why'" in capsys.readouterr().err
    write_rows(files / "p.jsonl", rows[:3])
    with pytest.raises(SystemExit):
        command(files, server, "--prompts", files / "p.jsonl")
    assert "p.jsonl has no prompt single-math-v1-multi-turn; give" in capsys.readouterr().err
    assert not server.asked


def test_nothing_is_asked_twice(files, server):
    command(files, server)
    before = (files / "out.jsonl").read_text()
    assert len(server.asked) == 4
    (files / "out.jsonl").unlink()
    command(files, server)
    assert len(server.asked) == 4
    same = re.compile(r'"tstamp":[^}]*')
    assert same.sub("", (files / "out.jsonl").read_text()) == same.sub("", before)


def test_an_answer_without_a_grade_is_asked_for_again(files, server, capsys):
    """With another seed, twice; then it is a failure, counted and in no mean."""
    server.says = lambda body: "[[6]]" if body.get("seed") == 1 else "Hard to say."
    command(files, server)
    assert len(server.asked) == 8
    server.says = lambda body: "[[5]]" if "Other." in str(body) else "Hard to say."
    write_rows(files / "a.jsonl", [answer_line(81, ["Else.", "Other."])])
    server.asked.clear()
    capsys.readouterr()
    command(files, server)
    assert len(server.asked) == 4
    assert "1 judgments have no score and are in no mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": [answer_line(81, [None, "x"])]}, "a.jsonl:1: an answer to question 81 is no text: "),
        ({"a": [answer_line(81, ["x", "y"])] * 2}, "a.jsonl:2: question 81 is answered before"),
        (
            {"a": [answer_line(7, ["x"])]},
            "a.jsonl: question 7 is answered and is none of --questions; give the file that",
        ),
        ({"a": [answer_line(81, ["x"])]}, "a.jsonl: question 81 has 2 turns and 1 answers; give"),
        ({"a": [answer_line(81, ["x", "y"], "")]}, "a.jsonl:1 is no line of an answer file"),
        (
            {"a": [answer_line(81, ["x", "y"]), answer_line(101, ["x", "y"], "other")]},
            "a.jsonl:2: it is 'other''s answer in a file of 'ours''s; split the file",
        ),
        (
            {"a": [answer_line(81, ["x", "y"]) | {"choices": [{"turns": ["x", "y"]}] * 2}]},
            "a.jsonl:1: question 81 has 2 choices, of which one is judged; delete the others",
        ),
        ({"a": [{"instruction": "x"}]}, "a.jsonl:1 is no line of an answer file, with question_id"),
        (
            {"a": [{"instruction": "x", "output": "y", "generator": "z"}]},
            "a.jsonl:1 is an answer to AlpacaEval; ask with: judge alpaca",
        ),
        ({"r": [answer_line(81, ["x", "y"])]}, "question 101 is graded beside a reference answer"),
        ({"q": QUESTIONS[:1] * 2}, "q.jsonl:2: question 81 is at .*q.jsonl:1 already; delete one"),
        ({"q": [{"x": 1}]}, "q.jsonl:1 is no question of MT-Bench, with question_id and turns"),
    ],
)
def test_mistakes_cost_one_line(change, message, files, server, capsys):
    for name, rows in change.items():
        write_rows(files / f"{name}.jsonl", rows)
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.asked and not (files / "out.jsonl").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--out {}/a.jsonl", "--out .*a.jsonl would overwrite this file: it is read; name another"),
        ("--json {}/out.jsonl", "--json .* would overwrite this file: --out writes it"),
        ("--json {}/out.jsonl.answers", "--json .*answers would overwrite this file: it is read"),
        ("--references {}/a.jsonl", "--references .*a.jsonl has the answers that are judged; give"),
        ("--references {}/folder.jsonl", "folder.jsonl is a folder; name a file in it"),
        ("--prompts=", "--prompts is empty; is a variable not set?"),
        ("--json=", "--json is empty; is a variable not set?"),
        ("--html {}/q.jsonl", "--html .* would overwrite this file: it is read"),
        ("--html {}/x.txt", "the page's name ends in .html"),
        ("--out {}", "--out .*: judgments are written as .jsonl"),
        ("--out {}/folder.jsonl", "--out .*folder.jsonl is a folder"),
        ("--max-new 0", "--max-new 0: give 1 or more"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_judge_is_paid(
    flags, message, files, server, capsys
):
    (files / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in files.glob("?.jsonl")}
    with pytest.raises(SystemExit) as ended:
        command(files, server, *flags.format(files).split())
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.asked and {path: path.read_bytes() for path in before} == before


def test_three_turns_are_refused_before_the_judge_is_paid(files, server, capsys):
    write_rows(files / "q.jsonl", [QUESTIONS[0] | {"turns": ["a", "b", "c"]}, QUESTIONS[1]])
    write_rows(files / "a.jsonl", [answer_line(81, ["1", "2", "3"])])
    with pytest.raises(SystemExit):
        command(files, server)
    assert "question 81 has 3 turns" in capsys.readouterr().err and not server.asked


@pytest.mark.parametrize(
    "there, beside, message",
    [
        (b"my notes\n", False, "out.jsonl, which holds no judgments; name another, or move it aw"),
        (b"my notes\n", True, "out.jsonl, which holds no judgments; name another"),
        ([answer_line(81, ["x", "y"])], True, "out.jsonl, which holds no judgments; name another"),
        (
            [{"question_id": 81, "model": "another", "judge": ["gpt-4", "single-v1"], "score": 1}],
            False,
            "which this command has not written, as .*/out.jsonl.answers is not there; name anot",
        ),
    ],
)
def test_only_its_own_judgments_are_overwritten(there, beside, message, files, server, capsys):
    out = files / "out.jsonl"
    out.write_bytes(there) if isinstance(there, bytes) else write_rows(out, there)
    before = out.read_bytes()
    if beside:
        (files / "out.jsonl.answers").touch()
    with pytest.raises(SystemExit) as ended:
        command(files, server)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "--out would overwrite " in err
    assert re.search(message, err) and out.read_bytes() == before and not server.asked


def test_while_the_judge_is_asked_nothing_but_its_answers_is_there(files, server):
    """So that a kill leaves nothing else."""
    before, seen = set(files.iterdir()), []
    server.says = lambda body: seen.extend(files.iterdir()) or "Fine. [[7]]"
    command(files, server)
    assert set(seen) - before == {files / "out.jsonl.answers"}


def test_an_endpoint_that_is_not_there(files, server, capsys, monkeypatch):
    not_there(command, files, server, capsys, monkeypatch)


# two models


OTHERS = {81: ["A longer poem, of roses.", "Rosy."], 101: ["It is 2.", "{x} is 3"]}


def compare(files, server, *more, others=OTHERS, name="theirs"):
    write_rows(files / "b.jsonl", [answer_line(*item, name) for item in others.items()])
    command(files, server, "--against", files / "b.jsonl", *more)


def lines(files):
    return [row for _, row in read_rows(files / "out.jsonl")]


def test_games_are_written_as_fastchat_has_them(files, server, capsys):
    """A judge that prefers our answers wherever they are shown, and once sees a tie."""

    def says(body):
        user = body["messages"][1]["content"]
        if "Reference" in user:
            return "[[C]] they are equal"
        return "So [[A]]" if user.index("Roses are red.") < user.index("A longer poem") else "[[B]]"

    server.says = says
    compare(files, server, "--json", files / "f.json")
    rows = lines(files)
    keys = "question_id model_1 model_2 g1_winner g2_winner judge g1_user_prompt g1_judgment "
    assert all(" ".join(r) == keys + "g2_user_prompt g2_judgment turn tstamp" for r in rows)
    found = [(r["question_id"], r["turn"], r["g1_winner"], r["g2_winner"]) for r in rows]
    assert found == [
        (81, 1, "model_1", "model_1"),
        (81, 2, "model_1", "model_1"),
        (101, 1, "tie", "tie"),
        (101, 2, "tie", "tie"),
    ]
    assert (rows[0]["model_1"], rows[0]["model_2"]) == ("ours", "theirs")
    assert (rows[0]["g1_judgment"], rows[0]["g2_judgment"]) == ("So [[A]]", "[[B]]")
    assert rows[3]["judge"] == ["gpt-x", "zephyr-pair-math-v1-multi-turn"]
    figures = json.loads((files / "f.json").read_text())
    assert figures["ours"]["pairs"]["win_rate"] == 75
    assert figures["theirs"]["pairs"]["win_rate"] == 25
    assert figures["ours"]["pairs"]["consistency"]["consistent"] == 100
    assert len(server.asked) == 8 and "prompts are our own" in capsys.readouterr().out


def test_game_2_exchanges_the_answers(files, server):
    """FastChat's templates: apart from whose answers they are, the two games' prompts are equal."""
    data = shared("mt_bench")
    server.says = lambda body: "[[A]]"
    compare(files, server, "--prompts", data / "judge_prompts.jsonl")
    for row in lines(files):
        number, turn = row["question_id"], row["turn"]
        first, second = row["g1_user_prompt"], row["g2_user_prompt"]
        for k in range(turn):
            ours, theirs = ANSWERS[number][k], OTHERS[number][k]
            for start, end in (("Answer]\n", "\n["), ("### Assistant {}:\n", "\n\n")):
                for letter, one, two in (("A", ours, theirs), ("B", theirs, ours)):
                    mark = start.format(letter)
                    first = first.replace(f"{mark}{one}{end}", f"{mark}<{letter}{k}>{end}")
                    second = second.replace(f"{mark}{two}{end}", f"{mark}<{letter}{k}>{end}")
        assert first == second and "<A0>" in first and f"<B{turn - 1}>" in first
        names = {True: "pair-math-v1", False: "pair-v2"}[number == 101]
        assert row["judge"][1] == names + "-multi-turn" * (turn == 2)
    prompts = {(r["question_id"], r["turn"]): r["g1_user_prompt"] for r in lines(files)}
    assert "[The Start of Reference Answer]\ntwo\n[The End" in prompts[101, 1]
    assert "### Reference answer:\nthree\n\n<|The End" in prompts[101, 2]
    assert "### User:\nAnd {x}?\n\n### Assistant B:\n{x} is 3\n\n<|The End" in prompts[101, 2]


def test_our_own_prompts_have_fastchats_layout():
    """So that what takes its prompts apart takes ours; before its layout stand its own words."""
    theirs = mt_bench_prompts.read(str(shared("mt_bench") / "judge_prompts.jsonl"))
    for name, prompt in mt_bench_prompts.read(None).items():
        layout = theirs[name].template
        if name in KINDS:
            layout = layout[layout.index("[Question]") :]
        assert prompt.template == layout and prompt.name == f"zephyr-{name}"


def test_our_own_prompts_show_the_answers_lengths(files, server):
    server.says = lambda body: "[[7]] [[A]]"
    command(files, server)
    for row in lines(files):
        answer = ANSWERS[row["question_id"]][row["turn"] - 1]
        assert mt_bench.answer_length(row["user_prompt"]) == len(answer)
    compare(files, server)
    for row in lines(files):
        turns = slice(0, row["turn"])
        ours, theirs = ("".join(a[row["question_id"]][turns]) for a in (ANSWERS, OTHERS))
        assert mt_bench.longer(row["g1_user_prompt"]) == len(ours) - len(theirs)
        assert mt_bench.longer(row["g2_user_prompt"]) == len(theirs) - len(ours)


def test_a_judge_that_always_says_first(files, server, capsys):
    server.says = lambda body: "The first. [[A]]"
    compare(files, server, "--json", files / "f.json")
    figures = json.loads((files / "f.json").read_text())["ours"]["pairs"]
    assert figures["win_rate"] == 50 and figures["ties"] == 4
    assert figures["consistency"]["consistent"] == 0
    assert figures["slots"]["first"]["mean"] == 100
    assert "the judge favours what it is shown first" in capsys.readouterr().out


def test_a_judge_that_prefers_length_is_exposed(files, server):
    def says(body):
        return "[[A]]" if mt_bench.longer(body["messages"][1]["content"]) > 0 else "[[B]]"

    server.says = says
    others = {81: ["A poem that is longer than ours.", "x" * 90], 101: ["2", "3"]}
    write_rows(
        files / "a.jsonl", [answer_line(81, ["Poem.", "x"]), answer_line(101, ["2 2 2", "3"])]
    )
    compare(files, server, "--json", files / "f.json", others=others)
    figures = json.loads((files / "f.json").read_text())["ours"]["pairs"]
    assert figures["win_rate"] == 50 and figures["consistency"]["consistent"] == 100
    means = [quarter["mean"] for quarter in figures["length_quarters"]]
    assert means[0] == 0 and means[-1] == 100


def test_a_game_without_a_verdict_is_an_error(files, server, capsys):
    """Of an answer that cannot be read, asked for thrice, and of one that does not come."""

    def says(body):
        user = body["messages"][1]["content"]
        if "Reference" in user:
            return "[[A]]"
        first = user.index("Roses") < user.index("A longer")
        return "Both are fine." if first else 400 if "Shorter." in user else "[[B]]"

    server.says, server.why = says, "the filter has refused"
    compare(files, server)
    rows = {(r["question_id"], r["turn"]): r for r in lines(files)}
    assert (rows[81, 1]["g1_winner"], rows[81, 1]["g2_winner"]) == ("error", "model_1")
    assert (rows[81, 2]["g1_judgment"], rows[81, 2]["g2_judgment"]) == ("Both are fine.", "$ERROR$")
    assert len(server.asked) == 4 + 3 + 1 + 3 + 1
    said = capsys.readouterr().out
    assert "3 have no verdict" in said and "1 requests have no answer" in said
    seeds = [(b.get("seed"), b["temperature"]) for b in server.asked if "Roses" in str(b)]
    assert sorted(map(str, seeds)).count("(2, 1)") == 2


@pytest.mark.parametrize(
    "others, name, message",
    [
        (
            {81: ["x", "y"]},
            "theirs",
            "1 questions are answered in one of .*a.jsonl and .*b.jsonl al",
        ),
        (OTHERS, "ours", "b.jsonl: both files are of 'ours'; change a model_id"),
        ({81: ["x"], 101: ["y", "z"]}, "theirs", "question 81 has 2 turns and 1 answers"),
    ],
)
def test_mistakes_of_two_models_cost_one_line(others, name, message, files, server, capsys):
    with pytest.raises(SystemExit) as ended:
        compare(files, server, others=others, name=name)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, err) and err.count("\n") == 1
    assert not server.asked and not (files / "out.jsonl").exists()


def test_a_key_is_for_the_host_that_it_is_given_for(files, server, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "usual")
    monkeypatch.setenv("MINE", "mine")
    command(files, server, "--key-from", f"{server.url.split('/')[2]}=MINE")
    assert {*server.keys} == {("gpt-x", "Bearer mine")}
    (files / "out.jsonl.answers").unlink()
    (files / "out.jsonl").unlink()
    with pytest.raises(SystemExit):
        command(files, server, "--key-from", "api.openai.com=MINE")
    assert "--key-from api.openai.com=...: no model is at that" in capsys.readouterr().err
    assert len(server.keys) == 4


def test_a_judge_in_a_folder(files, capsys):
    """It is sampled here; this one, untrained, says nothing that is a grade."""
    folder = folder_of(model(max_position_embeddings=4096), files / "judge")
    argv = ["judge", "mt-bench", files / "a.jsonl", "--questions", files / "q.jsonl"]
    argv += ["--references", files / "r.jsonl", "--judge", folder, "--out", files / "out.jsonl"]
    with pytest.raises(SystemExit):
        evals_command.main([*map(str, argv), "--budget-tokens", "5"])
    assert "--budget-tokens is for an endpoint, and" in capsys.readouterr().err
    for _ in range(2):
        with pytest.raises(SystemExit):
            evals_command.main([*map(str, argv), "--max-new", "2"])
        assert "judge: none of its 4 verdicts can be read, the first is" in capsys.readouterr().err
        assert (files / "out.jsonl.answers").read_text().count("\n") == 12


def test_what_a_judge_in_a_folder_cannot_answer_is_said(files, capsys, monkeypatch):
    """As of an endpoint, but that to ask it again would be in vain."""
    monkeypatch.setattr(judge_mt_bench, "_readable", lambda text: True)
    folder = folder_of(model(max_position_embeddings=4096), files / "judge")
    long = answer_line(81, ["the cat " * 4096, "Red."])
    write_rows(files / "a.jsonl", [long, answer_line(101, ANSWERS[101])])
    argv = ["judge", "mt-bench", files / "a.jsonl", "--questions", files / "q.jsonl"]
    argv += ["--references", files / "r.jsonl", "--judge", folder, "--out", files / "out.jsonl"]
    evals_command.main([*map(str, argv), "--max-new", "2"])
    said, err = capsys.readouterr()
    assert re.search(r"^judge: 2 of 4 requests have no answer, the last: .* positions$", err, re.M)
    assert "2 requests have no answer" in said and "asks them again" not in said + err

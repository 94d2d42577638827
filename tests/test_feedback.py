"""Raw rows to pairs: each rule on literal rows, properties of any rows, the command on files."""

import hashlib
import json
import os
import random
import re
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import shared
from zephyr.data.readers import BadRow, BadRows, read_rows, write_rows
from zephyr.feedback import Counts, Rules, binarize, hold_out, main


def completion(text, score, ratings=None, model="m"):
    annotations = {f"aspect {i}": {"Rating": r} for i, r in enumerate(ratings or [])}
    return {
        "model": model,
        "response": text,
        "overall_score": score,
        "annotations": annotations,
        "custom_system_prompt": "Be brief.",
    }


def row(prompt, *scored, source="flan"):
    return {
        "source": source,
        "instruction": prompt,
        "completions": [c if isinstance(c, dict) else completion(*c) for c in scored],
    }


def pairs_of(*rows, bad=None, **rules):
    counts = Counts()
    places = ((f"raw.jsonl:{i}", row) for i, row in enumerate(rows, 1))
    return list(binarize(places, Rules(**rules), counts, bad)), counts


def texts(pair):
    return pair["chosen"][1]["content"], pair["rejected"][1]["content"]


def command(capsys, *args):
    """(exit code, output, errors) of the command."""
    try:
        main(list(map(str, args)))
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capsys.readouterr()


def test_a_pair_has_the_published_columns():
    (pair,), _ = pairs_of(row("Why?", ("Because.", 8), ("No.", 2.5)))
    user = {"role": "user", "content": "Why?"}
    assert pair == {
        "prompt": "Why?",
        "prompt_id": hashlib.sha256(b"Why?").hexdigest(),
        "chosen": [user, {"role": "assistant", "content": "Because."}],
        "rejected": [user, {"role": "assistant", "content": "No."}],
        "messages": [user, {"role": "assistant", "content": "Because."}],
        "score_chosen": 8.0,
        "score_rejected": 2.5,
    }


def test_chosen_is_the_first_of_the_best_and_rejected_any_below():
    seen = set()
    for seed in range(50):
        (pair,), _ = pairs_of(row("p", ("a", 7), ("b", 8.5), ("c", 8.5), ("d", 3)), seed=seed)
        seen.add(texts(pair))
    assert seen == {("b", "a"), ("b", "d")}


def test_rejected_worst_is_the_first_of_the_lowest():
    (pair,), _ = pairs_of(row("p", ("a", 3), ("b", 9), ("c", 1), ("d", 1)), rejected="worst")
    assert texts(pair) == ("b", "c")


def test_random_rejected_is_even():
    rows = [row(f"p{i}", ("a", 1), ("b", 9), ("c", 2), ("d", 3)) for i in range(3000)]
    rejected = [texts(pair)[1] for pair in pairs_of(*rows)[0]]
    # three standard deviations of a fair choice are 78
    assert all(abs(rejected.count(text) - 1000) < 78 for text in "acd")


def test_ties_and_identical_texts_are_dropped():
    pairs, counts = pairs_of(
        row("tie", ("a", 5), ("b", 5), ("c", 5)),
        row("identical", ("a", 5), ("a", 4), ("a", 3)),
        row("identical among others", ("a", 5), ("a", 4), ("b", 3), ("c", 5)),
        row("tie of identical", ("a", 5), ("a", 5)),
    )
    assert [texts(pair) for pair in pairs] == [("a", "b")]
    assert counts.dropped == {"tie: all scores equal": 2, "identical texts": 1}


def test_empty_responses_are_no_candidates():
    pairs, counts = pairs_of(
        row("p", ("", 9), ("a", 8), (" \n", 1), ("b", 2)), row("q", ("", 9), ("a", 8))
    )
    assert [texts(pair) for pair in pairs] == [("a", "b")]
    assert counts.noted == {"as scored": 3, "empty response: dropped": 3}
    assert counts.dropped == {"fewer than two usable completions": 1}


def test_prompts_of_evaluation_sets_are_dropped(tmp_path, capsys):
    """In each form that they are published in, whatever the case and the spaces; and counted."""
    sets = {
        "mt_bench.jsonl": [{"question_id": 81, "turns": ["Write  a Poem.", "Again."]}],
        "alpaca.json": [{"instruction": "Name a\nbird.", "output": "Wren."}],
        "other.jsonl": [{"prompt": "Why?"}],
    }
    write_rows(tmp_path / "mt_bench.jsonl", sets["mt_bench.jsonl"])
    (tmp_path / "alpaca.json").write_text(json.dumps(sets["alpaca.json"]))
    write_rows(tmp_path / "other.jsonl", sets["other.jsonl"])
    (tmp_path / "TruthfulQA.csv").write_text('Type,Question\nx,"Is it, so?"\n')
    asked = ["write a poem.", " Name A bird. ", "WHY?", "is it,  so?", "Again.", "Name a bird"]
    raw, out = tmp_path / "raw.jsonl", tmp_path / "pairs.jsonl"
    write_rows(raw, [row(prompt, ("a", 1), ("b", 2)) for prompt in asked])
    files = [tmp_path / name for name in (*sets, "TruthfulQA.csv")]
    code, said, _ = command(capsys, raw, "--out", out, "--exclude", *files)
    assert code == 0 and re.search(r"in an evaluation set +4 +66.7%", said)
    assert [pair["prompt"] for _, pair in read_rows(out)] == ["Again.", "Name a bird"]


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("a.jsonl", '{"answer": "x"}\n', "a.jsonl:1: it has no prompt under turns, instruction, q"),
        ("a.jsonl", '{"turns": []}\n', "a.jsonl:1: it has no prompt under"),
        ("a.csv", "Answer\nx\n", "a.csv:2: it has no prompt under"),
        ("a.csv", b"Question\n\xff\n", "cannot be read as CSV in UTF-8"),
        ("none.jsonl", None, "none.jsonl"),
    ],
)
def test_what_is_no_evaluation_set_is_refused(name, content, why, tmp_path, capsys):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    raw, out = tmp_path / "raw.jsonl", tmp_path / "pairs.jsonl"
    write_rows(raw, [row("p", ("a", 1), ("b", 2))])
    code, _, err = command(capsys, raw, "--out", out, "--exclude", tmp_path / name)
    assert code == 2 and why in err and err.count("\n") == 1 and not out.exists()


def test_truthful_qa_is_dropped_unless_kept():
    rows = row("p", ("a", 1), ("b", 2), source="truthful_qa"), row("q", ("a", 1), ("b", 2))
    pairs, counts = pairs_of(*rows)
    assert [pair["prompt"] for pair in pairs] == ["q"] and counts.dropped == {"truthful_qa": 1}
    assert len(pairs_of(*rows, keep_truthful_qa=True)[0]) == 2


def test_of_equal_prompts_the_first_is_taken():
    pairs, counts = pairs_of(
        row("p", ("a", 1), ("b", 2)), row("p", ("c", 1), ("d", 2)), row("p ", ("e", 1), ("f", 2))
    )
    assert [texts(pair) for pair in pairs] == [("b", "a"), ("f", "e")]
    assert counts.dropped == {"duplicate prompt": 1}
    assert counts.noted.total() == 4


LABEL_BUG = row(
    "p",
    ("wrong 10", 10, ["1", "2", "N/A", "1"]),
    ("doubtful", 10, ["4", "4"]),
    ("good", 7, ["4"]),
    ("poor", 0.5, ["1"]),
)


@pytest.mark.parametrize(
    "rule, chosen, score, noted",
    [
        (
            "repair",
            "good",
            7,
            {
                "as scored": 2,
                "score 10, ratings of 2 or less: made 1": 1,
                "score 10, ratings of 4 or less: dropped": 1,
            },
        ),
        ("drop", "good", 7, {"as scored": 2, "score 10, ratings of 4 or less: dropped": 2}),
        ("keep", "wrong 10", 10, {"as scored": 4}),
    ],
)
def test_score_10_that_meant_1(rule, chosen, score, noted):
    (pair,), counts = pairs_of(LABEL_BUG, label_bug=rule)
    assert (texts(pair)[0], pair["score_chosen"]) == (chosen, score) and counts.noted == noted


def test_a_repaired_score_is_1():
    (pair,), _ = pairs_of(row("p", ("a", 10, ["2", "2"]), ("b", 9)))
    assert texts(pair) == ("b", "a") and pair["score_rejected"] == 1.0


@pytest.mark.parametrize(
    "score, ratings",
    [
        (10, ["4", "4", "5"]),
        (10, []),
        (10, ["N/A", None]),
        (10.5, ["1"]),
        (9.9, ["1"]),
        (20, ["1"]),
    ],
)
def test_the_repair_leaves_other_scores_alone(score, ratings):
    best = completion("a", score, ratings) | {"fine-grained_score": 0.1}
    (pair,), counts = pairs_of(row("p", best, ("b", 5)))
    assert texts(pair) == ("a", "b") and pair["score_chosen"] == score
    assert counts.noted == {"as scored": 2}


@pytest.mark.parametrize("nothing", [{}, {"annotations": None}, {"annotations": {}}])
def test_annotations_may_be_missing(nothing):
    bare = [{"response": "a", "overall_score": 10} | nothing, {"response": "b", "overall_score": 1}]
    (pair,), counts = pairs_of({"instruction": "p", "completions": bare})
    assert texts(pair) == ("a", "b") and counts.noted == {"as scored": 2}


def test_mean_of_the_numeric_ratings():
    pairs, counts = pairs_of(
        row(
            "p",
            ("a", 10, ["1", "2", "N/A"]),
            ("b", None, ["5", 4.0, "4.5"]),
            completion("c", 1, ["5", "nan", None, [], True])
            | {
                "annotations": {
                    "x": {"Rating": "5"},
                    "y": {"Rating": "nan"},
                    "z": {"Type": ["1"]},
                    "v": "none",
                    "w": {"Rating": True},
                }
            },
            ("d", 9),
            ("e", 9, ["N/A"]),
        ),
        score="mean",
        rejected="worst",
    )
    assert texts(pairs[0]) == ("c", "a")
    assert (pairs[0]["score_chosen"], pairs[0]["score_rejected"]) == (5.0, 1.5)
    assert counts.noted == {"as scored": 3, "no numeric rating: dropped": 2}
    pairs, _ = pairs_of(row("p", ("b", None, ["5", 4.0, "4.5"]), ("a", 9, [1])), score="mean")
    assert pairs[0]["score_chosen"] == 4.5


GOOD = completion("a", 1)


@pytest.mark.parametrize(
    "broken, why",
    [
        ({}, "no raw row, with instruction and completions; it has ''"),
        ({"instruction": " \n"}, r"instruction must be text, not ' \\n'"),
        ({"instruction": ["p"]}, r"instruction must be text, not \['p'\]"),
        ({"instruction": "p"}, "completions must be a list of two or more, not null or missing"),
        (
            {"instruction": "p", "completions": {}},
            "completions must be a list of two or more, not {}",
        ),
        (
            {"instruction": "p", "completions": [GOOD]},
            "completions must be a list of two or more, not",
        ),
        (
            row("p", ("a", 1)) | {"completions": [GOOD, "b"]},
            r"completions\[1\] must have a text as response, not 'b'",
        ),
        (
            {"instruction": "p", "completions": [GOOD, GOOD | {"response": None}]},
            r"completions\[1\] must have a text as response, not {",
        ),
        (
            {"instruction": "p", "completions": [GOOD, GOOD | {"annotations": "5"}]},
            r"completions\[1\].annotations must be an object, not '5'",
        ),
        *(
            (
                row("p", ("a", 1), ("b", score)),
                r"completions\[1\].overall_score must be a finite number, "
                f"not {shown}",
            )
            for score, shown in [
                (None, "null or missing"),
                ("N/A", "'N/A'"),
                (True, "True"),
                (float("nan"), "nan"),
                (float("inf"), "inf"),
                ([1], r"\[1\]"),
                (10**400, "1000"),
                ("x" * 10**6, "'xxx"),
            ]
        ),
    ],
)
def test_bad_rows_say_what_is_wrong(broken, why):
    good = row("good", ("a", 1), ("b", 2))
    with pytest.raises(BadRow, match=f"^raw.jsonl:2: {why}") as error:
        pairs_of(good, broken)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)
    bad = BadRows("skip")
    pairs, counts = pairs_of(broken, good, bad=bad)
    assert len(pairs) == 1 and counts.dropped == {"bad row": 1}
    assert len(bad.messages) == 1 and counts.noted.total() == 2


def test_scores_too_large_to_add_are_bad_rows():
    for score in (1e308, -1e100, "1e200"):
        with pytest.raises(BadRow, match=r"completions\[1\].overall_score must be a finite number"):
            pairs_of(row("p", ("a", 1), ("b", score)))
    rated = [("a", 1, ["1e308"] * 9), ("b", 2, ["3"]), ("c", 3, ["4"])]
    pairs, counts = pairs_of(row("p", *rated), score="mean")
    assert texts(pairs[0]) == ("c", "b") and counts.noted["no numeric rating: dropped"] == 1


def test_no_escape_sequence_and_no_depth_of_a_row_reaches_the_terminal(tmp_path, capsys):
    deep = "[" * 900 + "]" * 900
    good = [json.dumps(row(f"p{i}", ("a", 1), ("b", 2))) for i in range(400)]
    good[0] = json.dumps(row("p", ("a", 1), completion("b", 2, model="\x1b[2J\n")))
    good[1] = json.dumps(row("q", ("a", 1), completion("b", 2, model="deep")))
    good[1] = good[1].replace('"deep"', deep)
    odd = [
        '{"instruction": ["\\u001b[2J"]}',
        f'{{"instruction": {deep}}}',
        '{"instruction": "z", "completions": "\\u001b[2J\\n"}',
    ]
    raw = tmp_path / "raw.jsonl"
    raw.write_text("\n".join(good + odd))
    code, out, error = command(capsys, raw, "--out", tmp_path / "o.jsonl", "--on-bad-row", "skip")
    assert (code, error) == (0, "") and "skipped 3 bad rows" in out
    assert all(line.isprintable() for line in out.splitlines())
    for line in odd:
        raw.write_text(line)
        code, out, error = command(capsys, raw, "--out", tmp_path / "p.jsonl")
        assert (code, out) == (2, "") and error[:-1].isprintable() and len(error) < 400


def test_a_bad_row_does_not_use_up_its_prompt():
    bad = BadRows("skip")
    pairs, _ = pairs_of(row("p", ("a", 1), ("b", None)), row("p", ("c", 1), ("d", 2)), bad=bad)
    assert [texts(pair) for pair in pairs] == [("d", "c")]


SCORE = st.sampled_from([1, 2.5, 7, 10]) | st.floats(-1e6, 1e6)
COMPLETION = st.builds(
    completion,
    st.sampled_from(["", " ", "a", "b", "c d", "e" * 50]),
    SCORE,
    st.lists(st.sampled_from(["1", "2", "4", "5", "N/A"]), max_size=4),
)
SETS_OF_ROWS = st.lists(
    st.builds(
        lambda prompt, completions: row(prompt, *completions),
        st.text().filter(str.strip),
        st.lists(COMPLETION, min_size=2, max_size=5),
    ),
    unique_by=lambda row: row["instruction"],
    max_size=8,
)
RULES = st.fixed_dictionaries(
    {
        "score": st.sampled_from(["overall", "mean"]),
        "rejected": st.sampled_from(["random", "worst"]),
        "label_bug": st.sampled_from(["repair", "drop", "keep"]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=50, deadline=None)
@given(SETS_OF_ROWS, RULES, st.randoms(use_true_random=False), st.integers(0, 4))
def test_pairs_depend_on_the_rows_not_on_their_order(rows, rules, shuffle, size):
    pairs, counts = pairs_of(*rows, **rules)
    assert len(pairs) + counts.dropped.total() == len(rows)
    responses = {r["instruction"]: [c["response"] for c in r["completions"]] for r in rows}
    for pair in pairs:
        assert pair["score_chosen"] > pair["score_rejected"]
        chosen, rejected = texts(pair)
        assert chosen != rejected and chosen.strip() and rejected.strip()
        assert {chosen, rejected} <= set(responses[pair["prompt"]])

    fewer = [r for r in rows if shuffle.random() < 0.8]
    shuffle.shuffle(fewer)
    kept = {r["instruction"] for r in fewer}
    expected = [pair for pair in pairs if pair["prompt"] in kept]
    again = pairs_of(*fewer, **rules)[0]
    assert sorted(again, key=lambda p: p["prompt"]) == sorted(expected, key=lambda p: p["prompt"])

    test, other_test = [], []
    train = list(hold_out(expected, size, 42, test))
    other = list(hold_out(again, size, 42, other_test))
    assert other_test == test and len(test) == min(size, len(expected))
    assert sorted(p["prompt"] for p in other) == sorted(p["prompt"] for p in train)
    assert sorted(p["prompt"] for p in train + test) == sorted(p["prompt"] for p in expected)


def test_the_test_pairs_are_those_of_lowest_hash():
    def rank(pair):
        return hashlib.sha256(f"7\ntest\n{pair['prompt']}".encode()).hexdigest()

    pairs, test = [{"prompt": str(i)} for i in range(50)], []
    train = list(hold_out(pairs, 10, 7, test))
    assert test == sorted(pairs, key=rank)[:10]
    assert sorted(train, key=rank) == sorted(pairs, key=rank)[10:]


def test_more_pairs_move_few_into_the_test():
    prompts = [{"prompt": str(i)} for i in range(400)]
    held = []
    for n in (300, 400):
        test = []
        list(hold_out(prompts[:n], 100, 42, test))
        held.append({p["prompt"] for p in test})
    assert held[1] - held[0] <= {str(i) for i in range(300, 400)}
    different = []
    list(hold_out(prompts, 100, 43, different))
    assert {p["prompt"] for p in different} != held[1]


def raw_file(path, n=200, seed=0):
    rng = random.Random(seed)
    write_rows(
        path,
        (
            row(
                f"question {i}",
                *((f"answer {i} {j} " * rng.randint(1, 9), rng.random()) for j in range(4)),
            )
            for i in range(n)
        ),
    )
    return path


def test_reruns_give_the_same_bytes_in_any_order_of_files(tmp_path, capsys):
    a, b = raw_file(tmp_path / "a.jsonl"), tmp_path / "b.jsonl.gz"
    rows = [r for _, r in read_rows(a)]
    write_rows(b, [rows[i] | {"instruction": f"other {i}"} for i in range(50)])
    outputs = []
    for i, raw in enumerate([(a, b), (a, b), (b, a)]):
        out, test = tmp_path / f"out{i}.jsonl.gz", tmp_path / f"test{i}.jsonl"
        assert command(capsys, *raw, "--out", out, "--test-out", test, "--test-size", 20)[0] == 0
        assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE(test.stat().st_mode) == 0o644
        outputs.append((out.read_bytes(), test.read_bytes()))
    assert outputs[0] == outputs[1]
    assert outputs[0][1] == outputs[2][1]
    prompts = [{r["prompt"] for _, r in read_rows(tmp_path / f"out{i}.jsonl.gz")} for i in (0, 2)]
    assert prompts[0] == prompts[1] and len(prompts[0]) == 230


def test_without_a_test_split_pairs_keep_the_order_of_the_rows(tmp_path, capsys):
    raw, out = raw_file(tmp_path / "raw.jsonl"), tmp_path / "out.jsonl"
    assert command(capsys, raw, "--out", out)[0] == 0
    assert [r["prompt"] for _, r in read_rows(out)] == [f"question {i}" for i in range(200)]


def test_table(tmp_path, capsys):
    rows = [row(f"p{i}", ("b " * 3, 2, (), "big"), ("a", 1, (), "small\x1b")) for i in range(3)]
    rows += [row("p0", ("a", 1), ("b", 2)), row("tie", ("a", 1), ("b", 1)), LABEL_BUG]
    rows += [row("one word", ("longer", 5, (), "x" * 50), ("a b c", 4, (), "y"))]
    write_rows(tmp_path / "raw.jsonl", rows)
    code, out, _ = command(
        capsys,
        tmp_path / "raw.jsonl",
        "--out",
        tmp_path / "out.jsonl",
        "--test-out",
        tmp_path / "t.jsonl",
        "--test-size",
        1,
        "--rejected",
        "worst",
    )
    assert code == 0
    assert (
        out
        == """\
rows in                                             7
  duplicate prompt                                  1      14.3%
  tie: all scores equal                             1      14.3%
pairs out                                           5      71.4%
  training                                          4      80.0%
  test                                              1      20.0%
completions                                        14
  as scored                                        12      85.7%
  score 10, ratings of 2 or less: made 1            1       7.1%
  score 10, ratings of 4 or less: dropped           1       7.1%

mean of                                        chosen   rejected
  score                                          3.60       1.50
  words                                          2.20       1.40
  characters                                     5.60       2.40
mean score gap                                   2.10
median score gap                                 1.00
pairs whose chosen is longer                        4      80.0%

model                                          scored       mean     chosen   rejected
  xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx          1       5.00          1          0
  y                                                 1       4.00          0          1
  m                                                 5       2.10          1          1
  big                                               3       2.00          3          0
  'small\\x1b'                                       3       1.00          0          3
"""
    )


def test_bad_rows_stop_or_are_listed(tmp_path, capsys):
    raw, out = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps(row(f"p{i}", ("a", 1), ("b", 2))) for i in range(300)]
    good[7:7] = ["{broken", '{"instruction": "p"}']
    raw.write_text("\n".join(good))
    assert command(capsys, raw, "--out", out) == (
        2,
        "",
        (
            f"zephyr.feedback: {raw}:8: malformed JSON: Expecting property name enclosed in double "
            "quotes: column 2 (char 1); --on-bad-row skip drops such rows\n"
        ),
    )
    assert os.listdir(tmp_path) == ["raw.jsonl"]

    code, text, _ = command(capsys, raw, "--out", out, "--on-bad-row", "skip")
    assert code == 0 and len(list(read_rows(out))) == 300
    assert [line.split() for line in text.splitlines()[:2]] == [
        ["rows", "in", "302"],
        ["bad", "row", "2", "0.7%"],
    ]
    assert text.endswith(f"""
skipped 2 bad rows of 302; the first 2:
  {raw}:8: malformed JSON: Expecting property name enclosed in double quotes: column 2 (char 1)
  {raw}:9: completions must be a list of two or more, not null or missing
""")

    out.unlink()
    raw.write_text("\n".join(good[:100]))
    code, _, error = command(capsys, raw, "--out", out, "--on-bad-row", "skip")
    assert code == 2 and "2 of 100 rows are bad, more than the 1 % that may be skipped" in error
    assert os.listdir(tmp_path) == ["raw.jsonl"]


@pytest.mark.parametrize(
    "args, why",
    [
        ("no.jsonl --out o.jsonl", "no.jsonl: no such file"),
        ("raw.jsonl", "the following arguments are required: --out; --help lists the flags"),
        ("raw.jsonl --out o.jsonl --score median", "argument --score: invalid choice: 'median'"),
        ("raw.jsonl --out o.jsonl --colour", "unrecognized arguments: --colour; --help lists"),
        ("raw.jsonl --out o.txt", "o.txt: rows are written as .jsonl or .jsonl.gz"),
        (
            "raw.jsonl --out o.jsonl --test-size 5",
            "--test-out and --test-size, 1 or more, go together",
        ),
        ("raw.jsonl --out o.jsonl --test-out t.jsonl", "--test-out and --test-size, 1 or more, go"),
        (
            "raw.jsonl --out o.jsonl --test-out t.jsonl --test-size -1",
            "--test-out and --test-size, 1",
        ),
        (
            "raw.jsonl --out ./raw.jsonl",
            "--out ./raw.jsonl would overwrite this file: it is read; name another",
        ),
        (
            "raw.jsonl --out o.jsonl --test-out o.jsonl --test-size 5",
            "--test-out o.jsonl would overwrite this file: --out writes it",
        ),
        (
            "raw.jsonl --out o.jsonl --test-out t.jsonl --test-size 200",
            "no pair is left to train on: 200 for the test",
        ),
        (
            "raw.jsonl --out o.jsonl --score mean",
            "no pair is left to train on: 0 for the test, "
            "200 fewer than two usable completions, 800 no numeric rating: dropped",
        ),
    ],
)
def test_mistakes_cost_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, args, why):
    monkeypatch.chdir(tmp_path)
    raw_file(tmp_path / "raw.jsonl")
    before = (tmp_path / "raw.jsonl").read_bytes()
    code, out, error = command(capsys, *args.split())
    assert (code, out) == (2, "")
    assert error.startswith("zephyr.feedback: ") and why in error and error.count("\n") == 1
    assert "on-bad-row" not in error
    assert os.listdir(tmp_path) == ["raw.jsonl"]
    assert (tmp_path / "raw.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--out q.jsonl --exclude q.jsonl", "--out q.jsonl would overwrite this file: it is read"),
        ("--out q.jsonl", "--out would overwrite q.jsonl, which holds no pairs; name another, or"),
        ("--out o.jsonl --test-out q.jsonl --test-size 5", "--test-out would overwrite q.jsonl, w"),
        ("--out o.jsonl --test-out=", "--test-out is empty; is a variable not set?"),
    ],
)
def test_no_other_file_is_overwritten(tmp_path, monkeypatch, capsys, flags, told):
    monkeypatch.chdir(tmp_path)
    raw_file(tmp_path / "raw.jsonl")
    write_rows("q.jsonl", [{"question_id": 1, "turns": ["What?"]}])
    before = (tmp_path / "q.jsonl").read_bytes()
    code, out, error = command(capsys, "raw.jsonl", *flags.split())
    assert (code, out) == (2, "") and told in error and error.count("\n") == 1
    assert (tmp_path / "q.jsonl").read_bytes() == before and not os.path.exists("o.jsonl")
    assert command(capsys, "raw.jsonl", "--out", "o.jsonl")[0] == 0
    assert command(capsys, "raw.jsonl", "--out", "o.jsonl", "--rejected", "worst")[0] == 0


def test_help(capsys):
    code, out, _ = command(capsys, "--help")
    assert code == 0 and "python -m zephyr.feedback" in out and "up to 1 % of the rows" in out


def test_parquet_rows_give_the_pairs_of_json_rows(tmp_path, capsys):
    import pyarrow
    from pyarrow import parquet

    raw = raw_file(tmp_path / "raw.jsonl")
    rows = [
        r | {"completions": [c | {"annotations": {"x": {"Rating": "5"}}} for c in r["completions"]]}
        for _, r in read_rows(raw)
    ]
    write_rows(raw, rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "raw.parquet")
    bytes_out = []
    for path in (raw, tmp_path / "raw.parquet"):
        assert command(capsys, path, "--out", tmp_path / "out.jsonl")[0] == 0
        bytes_out.append((tmp_path / "out.jsonl").read_bytes())
    assert bytes_out[0] == bytes_out[1]


def test_real_data(tmp_path, capsys):
    raw = [shared(f"ultrafeedback.{split}.jsonl.gz") for split in ("train", "test")]
    code, out, _ = command(
        capsys,
        *raw,
        "--out",
        tmp_path / "o.jsonl",
        "--test-out",
        tmp_path / "t.jsonl",
        "--test-size",
        100,
    )
    assert code == 0
    for line in (
        "rows in 805",
        "tie: all scores equal 73 9.1%",
        "pairs out 732 90.9%",
        "training 632 86.3%",
        "test 100 13.7%",
        "completions 3,220",
        "as scored 3,217 99.9%",
        "a chat template's mark at an end: dropped 3 0.1%",
    ):
        assert line in [" ".join(text.split()) for text in out.splitlines()]

    completions = {}
    for path in raw:
        for _, r in read_rows(path):
            completions[r["instruction"]] = {
                c["response"]: c["overall_score"]
                for c in r["completions"]
                if not c["response"].endswith("</s>")
            }
    pairs = [r for name in ("o", "t") for _, r in read_rows(tmp_path / f"{name}.jsonl")]
    assert len({pair["prompt"] for pair in pairs}) == 732
    for pair in pairs:
        scores, (chosen, rejected) = completions[pair["prompt"]], texts(pair)
        assert scores[chosen] == pair["score_chosen"] == max(scores.values())
        assert scores[rejected] == pair["score_rejected"] < scores[chosen]

"""AlpacaEval and MT-Bench from a judge's files, and what the files show of the judge."""

import ast
import csv
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT, save, shared
from zephyr.data.readers import read_rows
from zephyr.evals import alpaca, belief, length_control, mt_bench
from zephyr.evals.__main__ import main

MODELS = ("OpenHermes-2.5-Mistral-7B", "vicuna-7b-v1.5", "claude-2.1")
RUNS = ("concise", "verbose")
ALL = (
    "instruction_difficulty.csv",
    "gamed_concise_lengths.json.gz",
    "gamed_verbose_lengths.json.gz",
)


def annotations(model: str) -> alpaca.Annotations:
    path = shared(f"alpaca_eval/annotations.{model}.json.gz")
    return alpaca.read(str(path), list(read_rows(path)))


def published(model: str) -> dict:
    return json.loads(shared("alpaca_eval/published.json").read_text())[model]


def alpaca_data() -> Path:
    return [shared(f"alpaca_eval/{name}") for name in ALL][0].parent


def annotation(k: int, preference, longer=0, **more) -> dict:
    return {
        "instruction": f"question {k}",
        "output_1": "x" * 100,
        "generator_1": "base",
        "output_2": "y" * (100 + longer),
        "generator_2": "model",
        "annotator": "judge",
        "preference": preference,
    } | more


def rows(items) -> list[tuple[str, dict]]:
    return [(f"file:{k}", item) for k, item in enumerate(items, 1)]


def of(items) -> alpaca.Annotations:
    return alpaca.read("file", rows(items))


def score(question: int, turn: int, value, **more) -> dict:
    return {
        "question_id": question,
        "model": "model",
        "judge": ["gpt-4", "single-v1"],
        "judgment": f"Rating: [[{value}]]",
        "score": value,
        "turn": turn,
    } | more


PAIR_PROMPT = (
    "[User Question]\nWhy?\n\n[The Start of Assistant A's Answer]\n{}\n[The End of Assistant A's "
    "Answer]\n\n[The Start of Assistant B's Answer]\n{}\n[The End of Assistant B's Answer]"
)


def pair(question: int, one: str, two: str, answers=("a", "b"), **more) -> dict:
    return {
        "question_id": question,
        "model_1": "m",
        "model_2": "n",
        "g1_winner": one,
        "g2_winner": two,
        "judge": ["gpt-4", "pair-v2"],
        "g1_user_prompt": PAIR_PROMPT.format(*answers),
        "turn": 1,
    } | more


# AlpacaEval


@pytest.mark.parametrize("model", MODELS)
def test_published_win_rate_and_error_exactly(model):
    rates, known = alpaca.win_rates(annotations(model)), published(model)
    assert rates["win_rate"] == pytest.approx(known["win_rate"], abs=1e-9)
    assert rates["standard_error"] == pytest.approx(known["standard_error"], abs=1e-9)
    for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert rates[name] == known[name]
    assert rates["bootstrap_standard_error"] == pytest.approx(rates["standard_error"], rel=0.08)


@pytest.mark.parametrize("model", MODELS)
def test_published_length_controlled_rate(model):
    figures, _ = length_control.rate(annotations(model), length_control.read(alpaca_data()))
    known = published(model)["length_controlled_winrate"]
    assert figures["length_controlled_win_rate"] == pytest.approx(known, abs=0.1)


def test_the_published_weights_are_ours_at_the_c_that_was_chosen_there():
    """C = 2.78, 21.5 and 2.78: the whole model, not its mean alone."""
    control = length_control.read(alpaca_data())
    for model, C in zip(MODELS, (10 ** (4 / 9), 10 ** (12 / 9), 10 ** (4 / 9)), strict=True):
        a = annotations(model)
        d_N = np.array([control.difficulty[text] for text in a.instructions])
        t_N = length_control.lengths_apart(a.length_1_N, a.length_2_N)
        x_NF = np.stack([t_N, d_N, np.ones(805)], axis=1)
        gamed_GF, _ = length_control._gamed(a, control)
        w_F = length_control.l1_logistic(
            np.concatenate([x_NF, gamed_GF]),
            np.concatenate([np.ones(805), np.full(1610, 0.1)]),
            (a.preference_N - 1) @ x_NF + 0.1 * control.sum_y_F,
            C,
        )
        assert w_F == pytest.approx(published(model)["weights"], abs=1e-3)
        known = published(model)["length_controlled_winrate"]
        rate = 100 * length_control.sigmoid(w_F[1] * d_N + w_F[2]).mean()
        assert rate == pytest.approx(known, abs=0.005)
        # the published weights by our difficulties: the rate is a mean over them and nothing else
        _, w_d, w_b = published(model)["weights"]
        assert 100 * length_control.sigmoid(w_d * d_N + w_b).mean() == pytest.approx(
            known, abs=1e-7
        )


@pytest.mark.parametrize(
    ("w_d", "w_b", "known"),
    [
        (1.0472105841184596, -2.5872480742143988, 13.203198493136666),  # zephyr-7b-beta
        (1.1041043657582297, -3.0651022145961231, 10.289760888),  # zephyr-7b-alpha
    ],
)
def test_zephyrs_published_rates_from_their_published_weights(w_d, w_b, known):
    """Its annotations are not at hand, but alpaca_eval at 01f3cb2 has the weights of its models."""
    d_N = np.array(list(length_control.read(alpaca_data()).difficulty.values()))
    rate = 100 * length_control.sigmoid(w_d * d_N + w_b).mean()
    assert len(d_N) == 805 and rate == pytest.approx(known, abs=1e-7)


def test_the_rate_does_not_depend_on_the_order_of_the_rows():
    path = shared("alpaca_eval/annotations.vicuna-7b-v1.5.json.gz")
    data, control = list(read_rows(path)), length_control.read(alpaca_data())
    one, _ = length_control.rate(alpaca.read("a", data), control)
    for seed in range(4):
        random.Random(seed).shuffle(data)
        other, _ = length_control.rate(alpaca.read("b", data), control)
        assert one["length_controlled_win_rate"] == pytest.approx(
            other["length_controlled_win_rate"], abs=1e-11
        )
    part, notes = length_control.rate(alpaca.read("c", data[:700]), control)
    assert "1400 of the 1610" in " ".join(notes)
    assert part["length_controlled_win_rate"] == pytest.approx(
        one["length_controlled_win_rate"], abs=1.0
    )


def test_the_official_files_give_the_same_rate(tmp_path):
    """df_gamed.csv with any labels that have the known sums; difficulties by number."""
    a, control = annotations("claude-2.1"), length_control.read(alpaca_data())
    gamed_GF, _ = length_control._gamed(a, control)
    x_G2 = gamed_GF[:, :2]
    w = length_control.l1_logistic(x_G2, np.ones(1610), control.sum_y_F[:2], C=1e9)
    y_G = length_control.sigmoid(x_G2 @ w)
    assert y_G @ x_G2 == pytest.approx(control.sum_y_F[:2])
    with open(tmp_path / "df_gamed.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            "preference index std_delta_len instruction_difficulty not_gamed_baseline model".split()
        )
        for k, (y, (t, d, _)) in enumerate(zip(y_G, gamed_GF, strict=True)):
            table.writerow([repr(float(y)), k % 805, float(np.arctanh(t)), float(d), False, "m"])
    with open(tmp_path / "instruction_difficulty.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["", "instruction_difficulty"])
        table.writerows(enumerate(control.difficulty.values()))
    with pytest.raises(ValueError, match="numbers its questions"):
        length_control.read(tmp_path)
    texts = [{"instruction": text} for text in control.difficulty]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(texts))
    official, _ = length_control.rate(a, length_control.read(tmp_path))
    ours, _ = length_control.rate(a, control)
    for name in ("length_controlled_win_rate", "lc_standard_error"):
        assert official[name] == pytest.approx(ours[name], abs=1e-6)


def test_another_baseline_has_no_length_controlled_rate():
    path = shared("alpaca_eval/ae1.zephyr-7b-alpha.json.gz")
    a = alpaca.read(str(path), list(read_rows(path)))
    figures, notes = length_control.rate(a, length_control.read(alpaca_data()))
    assert figures == {} and "text_davinci_003" in notes[0]


def test_zephyr_alpha_of_the_first_alpaca_eval():
    """688 wins, 113 losses, 3 draws written as 0, one null: its leaderboard's line, to the digit
    (alpaca_eval_gpt4_leaderboard.csv at 0125b62)."""
    path = shared("alpaca_eval/ae1.zephyr-7b-alpha.json.gz")
    rates = alpaca.win_rates(alpaca.read(str(path), list(read_rows(path))))
    assert rates["win_rate"] == pytest.approx(100 * (688 + 1.5) / 804, abs=1e-9)
    assert rates["win_rate"] == pytest.approx(85.7587064676617, abs=1e-12)
    assert rates["standard_error"] == pytest.approx(1.2285451680042003, abs=1e-12)
    assert rates["avg_length"] == 1302
    assert rates["win_rate"] == rates["discrete_win_rate"]
    counts = [rates[name] for name in ("n_wins", "n_wins_base", "n_draws", "n_total", "n_dropped")]
    assert counts == [688, 113, 3, 804, 1]


def test_the_order_rule_on_every_instruction_that_was_judged():
    """The judge's token is m for what it saw first; the file has the preference put right again."""
    agreed = set()
    for model in MODELS:
        for _, row in read_rows(shared(f"alpaca_eval/annotations.{model}.json.gz")):
            if raw := row["raw_completion"]:
                raw = ast.literal_eval(raw) if isinstance(raw, str) else raw
                content = raw["logprobs"]["content"][0]
                log = {token["token"]: token["logprob"] for token in content["top_logprobs"]}
                m, M = (np.exp(log.get(token, -np.inf)) for token in "mM")
                preference = 2 - m / (m + M)
                if alpaca.model_is_first(row["instruction"]):
                    preference = 3 - preference
                assert preference == pytest.approx(row["preference"], abs=1e-6)
                agreed.add(row["instruction"])
            else:
                assert row["output_1"] == row["output_2"]
    assert len(agreed) == 804  # to one question all three answer just as the baseline does


def test_win_rate_by_slot():
    """The judge of AlpacaEval 2 favours what it sees second; counted here a second way."""
    for model in MODELS:
        a = annotations(model)
        slots = belief.by_slot(alpaca.verdicts(a))
        for slot in ("first", "second"):
            wins = [
                100 * (preference - 1)
                for (text, one, two), preference in zip(a.key_N, a.preference_N, strict=True)
                if alpaca.model_is_first(text) == (slot == "first") and one != two
            ]
            assert slots[slot]["n"] == len(wins)
            assert slots[slot]["mean"] == pytest.approx(np.mean(wins), abs=1e-9)
        assert slots["second_minus_first"] > 2 * slots["standard_error"]


def test_preferences_of_every_kind():
    a = of(annotation(k, p) for k, p in enumerate([1, 2, 1.5, 0, None, float("nan"), 1.9, 1.2]))
    rates = alpaca.win_rates(a)
    win = [0, 1, 0.5, 0.5, 0.9, 0.2]
    assert rates["win_rate"] == pytest.approx(100 * np.mean(win))
    assert rates["standard_error"] == pytest.approx(100 * np.std(win, ddof=1) / 6**0.5)
    assert (rates["n_wins"], rates["n_wins_base"], rates["n_draws"]) == (2, 2, 2)
    assert rates["n_dropped"] == 2 and rates["discrete_win_rate"] == 50


def test_a_judge_that_always_says_first():
    orders = {"preference_model_first": 2, "preference_model_second": 1}
    a = of(annotation(k, 1.5, **orders) for k in range(40))
    assert alpaca.win_rates(a)["win_rate"] == 50
    about = alpaca.about_the_judge(a)
    assert about["consistency"] == {
        "pairs": 40,
        "consistent": 0,
        "first_slot_preferred": 40,
        "second_slot_preferred": 0,
    }
    assert (about["slots"]["first"]["mean"], about["slots"]["second"]["mean"]) == (100, 0)
    games = mt_bench.read(rows(pair(k, "model_1", "model_2") for k in range(81, 91)))
    figures = mt_bench.pairs(games, "n")
    assert figures["win_rate"] == 50 and figures["consistency"]["consistent"] == 0
    assert figures["slots"]["second_minus_first"] == -100


def test_a_judge_that_prefers_length():
    longer = [random.Random(k).randrange(-90, 90) for k in range(200)]
    a = of(annotation(k, 1 + (n > 0), n) for k, n in enumerate(longer))
    quarters = alpaca.about_the_judge(a)["length_quarters"]
    means = [q["mean"] for q in quarters]
    assert means == sorted(means) and means[0] == 0 and means[-1] == 100
    assert sum(q["n"] for q in quarters) == 200
    games = [
        pair(81 + k, *["model_1" if n > 0 else "model_2"] * 2, ("a" * (100 + n), "b" * 100))
        for k, n in enumerate(longer[:80])
        if n
    ]
    quarters = mt_bench.pairs(mt_bench.read(rows(games)), "m")["length_quarters"]
    assert (quarters[0]["mean"], quarters[-1]["mean"]) == (0, 100)
    quarters = mt_bench.pairs(mt_bench.read(rows(games)), "n")["length_quarters"]
    assert (quarters[0]["mean"], quarters[-1]["mean"]) == (0, 100)


# the fit


@pytest.mark.parametrize("seed", range(8))
def test_the_l1_fit_is_at_the_minimum(seed):
    """Where a weight is not zero the smooth part's gradient is -sign(w), else it is within 1; and,
    as the objective is convex, nothing near is lower."""
    rng = np.random.default_rng(seed)
    x_RF, y_R = rng.normal(size=(200, 3)), rng.random(200)
    weight_R, C = rng.random(200), 10 ** rng.uniform(-2.5, 4)
    w_F = length_control.l1_logistic(x_RF, weight_R, (weight_R * y_R) @ x_RF, C)

    def smooth(w):
        p_R = 1 / (1 + np.exp(-x_RF @ w))
        return -C * weight_R @ (y_R * np.log(p_R) + (1 - y_R) * np.log(1 - p_R))

    p_R = 1 / (1 + np.exp(-x_RF @ w_F))
    gradient_F = C * (weight_R * (p_R - y_R)) @ x_RF
    on = w_F != 0
    assert gradient_F[on] == pytest.approx(-np.sign(w_F[on]), abs=1e-5)
    assert (np.abs(gradient_F[~on]) <= 1 + 1e-6).all()
    least = smooth(w_F) + np.abs(w_F).sum()
    for scale in (1e-3, 1e-1, 1):
        for w in w_F + scale * rng.normal(size=(50, 3)):
            assert smooth(w) + np.abs(w).sum() >= least - 1e-9


def test_the_l1_fit_by_hand():
    """One feature that is always 1, labels of mean 3/4, weight 4 in all: the gradient is
    4 C (p - 3/4) = -1, so that with C = 1 p = 1/2 and w = 0, and with C = 2 p = 5/8."""
    one = np.ones((4, 1))
    for C, p in ((0.5, 0.5), (1, 0.5), (2, 0.625)):
        w = length_control.l1_logistic(one, np.ones(4), np.array([3.0]), C)
        assert w[0] == pytest.approx(np.log(p / (1 - p)), abs=1e-9)


# the judge


def test_bootstrap_error_is_the_closed_form():
    value_N = np.random.default_rng(1).random(400)
    [group] = belief.groups(value_N, np.ones((400, 1), bool), range(400))
    assert group["standard_error"] == pytest.approx(value_N.std(ddof=1) / 20, rel=0.08)
    # each question twice: the same error, where verdicts taken one by one would give it / sqrt 2
    twice = belief.groups(np.repeat(value_N, 2), np.ones((800, 1), bool), np.repeat(range(400), 2))
    assert twice[0]["standard_error"] == pytest.approx(group["standard_error"])
    assert belief.groups(value_N, np.ones((400, 1), bool), range(400)) == [group]
    in_K = np.array([[True, False, False], [True, True, False], [False, True, False]])
    alone, spread, empty = belief.groups(value_N[:3], in_K, ["a", "a", "b"])
    assert alone["n"] == 2 and alone["standard_error"] is None, "of one question nothing is known"
    assert spread["standard_error"] is not None and empty["standard_error"] is None


def test_kappa_by_hand():
    assert belief.kappa([1, 1, 0, 0], [1, 0, 0, 0]) == pytest.approx(0.5)
    assert belief.kappa([1, 0, 1, 0], [1, 1, 0, 0]) == pytest.approx(0)
    # Cohen's kappa of 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: p_o 0.7, p_e 0.5
    a = [1] * 25 + [0] * 25
    b = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert belief.kappa(a, b) == pytest.approx(0.4)
    # scores 1 2 3 and 1 2 4: squares 0 0 1, and by chance 0 1 9, 1 0 4, 4 1 1
    assert belief.kappa([1, 2, 3], [1, 2, 4], squared=True) == pytest.approx(1 - (1 / 3) / (21 / 9))
    assert belief.kappa([1, 1], [1, 1]) is None


def test_families_and_leakage():
    assert belief.families("weighted_alpaca_eval_gpt4_turbo") == {"gpt"}
    assert belief.families("OpenHermes-2.5-Mistral-7B") == {"mistral"}
    assert belief.families("vicuna-7b-v1.5") == set()
    assert belief.families("text_davinci_003") == {"gpt"}
    [warning] = belief.leakage("gpt-4", {"model": "zephyr-7b", "feedback model": "gpt-4"})
    assert "preference leakage" in warning
    [warning] = belief.leakage("mine", {"model": "mine", "baseline": "yours"})
    assert warning.startswith("the judge and the model are both mine: self-preference")
    [warning] = belief.leakage("claude-3", {"model": "claude-2.1", "feedback model": None})
    assert "self-preference" in warning


# MT-Bench


@pytest.mark.parametrize(
    ("model", "means"),
    [("mistral-orpo", (6.675, 5.03774, 5.85893)), ("mistral-orpo-mix", (6.43125, 5.575, 6.003125))],
)
def test_fastchat_figures(model, means, tmp_path, capsys):
    path, out = shared(f"mt_bench/judgment.{model}.jsonl.gz"), tmp_path / "out.json"
    main(["show", str(path), "--json", str(out), "--feedback", "gpt-4"])
    figures = json.loads(out.read_text())[model]
    for name, known in zip(("turn_1", "turn_2", "average"), means, strict=True):
        assert figures[name] == pytest.approx(known, abs=6e-6)
    assert figures["n_failures"] == (model == "mistral-orpo")
    assert figures["n_duplicates"] == 160 * (model == "mistral-orpo")
    assert figures["n_misread"] == 0
    assert len(figures["wrong_references"]) == 13
    text = capsys.readouterr().out
    assert "questions were judged" not in text  # all of them
    assert "preference leakage" in text and max(map(len, text.splitlines())) <= 100
    lengths = sum(quarter["n"] for quarter in figures["length_quarters"])
    assert lengths == figures["n_judgments"] - figures["n_failures"]


def test_the_categories_that_are_known_are_those_of_the_questions():
    known = mt_bench.categories(None)
    assert known == mt_bench.categories(shared("mt_bench/question.jsonl"))
    needing = {n for n, name in known.items() if name in ("math", "reasoning", "coding")}
    assert mt_bench.WRONG_REFERENCES < needing and len(mt_bench.WRONG_REFERENCES) == 13


def test_scores_and_verdicts_are_read_as_fastchat_does():
    assert mt_bench.score_in("as in [3], Rating: [[7.5]] or [[8]]") == 7.5
    assert mt_bench.score_in("Rating: [6]") == 6
    assert mt_bench.score_in("Rating: 6") == mt_bench.score_in("$ERROR$") == -1
    assert mt_bench.verdict_in("not [[B]] but [[A]]") == "A"
    assert mt_bench.verdict_in("[[C]] no, [[B]]") == "B"
    assert mt_bench.verdict_in("[[C]]") == "tie" and mt_bench.verdict_in("A") == "error"


def test_the_average_is_over_rows_and_failures_are_in_no_mean():
    judgments = mt_bench.read(
        rows(
            [
                score(81, 1, 8),
                score(91, 1, 6),
                score(81, 2, 4),
                score(91, 2, -1, judgment="$ERROR$"),
            ]
        )
    )
    figures = mt_bench.scores(judgments, mt_bench.categories(None))
    assert (figures["turn_1"], figures["turn_2"], figures["average"]) == (7, 4, 6)
    assert figures["n_failures"] == figures["n_unanswered"] == 1
    assert figures["categories"]["roleplay"]["average"] == 6


def test_games_are_won_in_both_orders():
    games = mt_bench.read(
        rows(
            [
                pair(81, "model_1", "model_1"),
                pair(82, "model_1", "tie"),
                pair(83, "model_2", "model_2"),
                pair(84, "tie", "tie"),
                pair(85, "error", "model_1"),
            ]
        )
    )
    figures = mt_bench.pairs(games, "m")
    assert [figures[name] for name in ("wins", "losses", "ties", "win_rate")] == [1, 1, 2, 50]
    assert figures["n_failures"] == 1 and figures["game_ties"] == 3
    assert figures["consistency"]["pairs"] == 4 and figures["consistency"]["consistent"] == 75


def test_the_lengths_of_answers_are_read_from_the_prompts():
    assert mt_bench.longer(PAIR_PROMPT.format("four", "seven77")) == -3
    several = (
        "<|The Start of Assistant {0}'s Conversation with User|>\n\n### User:\nWhy?\n\n"
        "### Assistant {0}:\n{1}\n\n### User:\nHow?\n\n### Assistant {0}:\n{2}\n\n"
        "<|The End of Assistant {0}'s Conversation with User|>"
    )
    both = several.format("A", "one\n\ntwo", "three") + "\n\n\n" + several.format("B", "x", "y")
    assert mt_bench.longer(both) == len("one\n\ntwo" + "three") - 2
    assert mt_bench.answer_length(several.format("A", "first", "second")) == 6
    assert np.isnan(mt_bench.longer("Which is better?")) and np.isnan(mt_bench.answer_length(None))


# the command


def test_show_alpaca(tmp_path, capsys):
    data, out = alpaca_data(), tmp_path / "out.json"
    path = shared("alpaca_eval/annotations.claude-2.1.json.gz")
    main(["show", str(path), "--alpaca-data", str(data), "--json", str(out)])
    text, figures = capsys.readouterr().out, json.loads(out.read_text())
    assert max(map(len, text.splitlines())) <= 100
    known = published("claude-2.1")
    assert figures["win_rate"] == pytest.approx(known["win_rate"], abs=1e-9)
    assert figures["length_controlled_win_rate"] == pytest.approx(
        known["length_controlled_winrate"], abs=0.1
    )
    assert "favours what it is shown second" in text and "self-preference" in text
    main(["show", str(path), "--json", str(out)])
    assert "needs --alpaca-data" in capsys.readouterr().out
    assert "length_controlled_win_rate" not in json.loads(out.read_text())


def test_show_two_judges(tmp_path, capsys):
    first = [annotation(k, p) for k, p in enumerate([2, 2, 1, 1])]
    second = [annotation(k, p, annotator="other") for k, p in enumerate([2, 1, 1, 1])]
    save(tmp_path / "a.jsonl", *first)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(second[::-1]).encode()))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.json.gz")]
    main(["show", *files, "--json", str(tmp_path / "o.json")])
    assert "agree on 75.0 % of 4 verdicts on model, Cohen's kappa 0.500" in capsys.readouterr().out
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["model (judge)"]["win_rate"] == 50
    assert figures["model (other)"]["win_rate"] == 25
    assert figures["agreement"][0]["kappa"] == pytest.approx(0.5)


def test_show_scores_and_pairs_of_two_judges(tmp_path, capsys):
    save(tmp_path / "a.jsonl", score(81, 1, 8), score(82, 1, 2), score(81, 1, 7, judge=["o", "p"]))
    save(
        tmp_path / "b.jsonl",
        pair(81, "model_1", "model_1"),
        pair(82, "model_2", "model_2"),
        pair(81, "model_1", "model_1", judge=["o", "p"]),
        pair(82, "tie", "tie", judge=["o", "p"]),
    )
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    main(["show", *files, "--json", str(tmp_path / "o.json")])
    figures = json.loads((tmp_path / "o.json").read_text())
    assert figures["model (gpt-4)"]["average"] == 5 and figures["model (o)"]["average"] == 7
    assert figures["m (o)"]["pairs"]["win_rate"] == 75
    assert [a["n"] for a in figures["agreement"]] == [1, 2]
    said = capsys.readouterr().out
    assert said.count("2 of 80 questions were judged") == 5  # one by the judge o alone
    assert max(map(len, said.splitlines())) <= 100
    assert figures["agreement"][1]["same"] == 50


def test_names_from_a_file_reach_the_terminal_as_text(tmp_path, capsys):
    name = "\x1b[31mred\n" + "x" * 300
    save(tmp_path / "a.jsonl", *(annotation(k, 2, generator_2=name) for k in range(3)))
    save(tmp_path / "b.jsonl", score(81, 1, 8, model=name), pair(81, "tie", "error", model_1=name))
    for file in ("a", "b"):
        try:
            main(["show", str(tmp_path / f"{file}.jsonl")])
        except SystemExit:
            pass
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err
        assert max(map(len, printed.out.splitlines()), default=0) <= 100


BAD = {
    "no file": (None, [], "no such file"),
    "empty": ("", [], "is empty"),
    "no JSON": ("hello\n", [], "malformed JSON"),
    "another kind": ([{"prompt": "a", "chosen": "b"}], [], "neither AlpacaEval"),
    "questions": ([{"question_id": 1, "category": "x", "turns": []}], [], "MT-Bench's questions"),
    "answers": ([{"question_id": 1, "choices": []}], [], "no judge has scored"),
    "twice": ([annotation(1, 2), annotation(1, 2)], [], "data.jsonl:2: the question of"),
    "preference 3": ([annotation(1, 3)], [], "preference 3 is not from 1"),
    "preference text": ([annotation(1, "2")], [], "number or null"),
    "huge preference": ([annotation(1, 10**400)], [], "is not from 1"),
    "no verdict": ([annotation(1, None)], [], "none of its 1 annotations"),
    "no output": ([{"instruction": "a", "preference": 1}], [], "no output_1"),
    "two models": ([annotation(1, 2), annotation(2, 2, generator_2="n")], [], "split the file"),
    "mixed": ([annotation(1, 2), score(81, 1, 8)], [], "data.jsonl:2: no instruction"),
    "no data": ([annotation(1, 2)], ["--alpaca-data", "/nowhere"], "no such folder"),
    "not its flag": ([annotation(1, 2)], ["--questions", "q"], "--questions is for"),
    "nor its flag": ([score(81, 1, 8)], ["--alpaca-data", "d"], "--alpaca-data is for"),
    "score text": ([score(81, 1, "8")], [], "score is a number"),
    "score NaN": ([score(81, 1, float("nan"))], [], "score is a number"),
    "score huge": ([score(81, 1, 10**400)], [], "score is a number"),
    "turn 3": ([score(81, 3, 8)], [], "turn is 1 or 2"),
    "question 7": ([score(7, 1, 8)], [], "not among the 80 questions"),
    "winner": ([pair(81, "m", "tie")], [], "a winner is"),
    "itself": ([pair(81, "tie", "tie", model_2="m")], [], "are both"),
    "model 5": ([score(81, 1, 8, model=5)], [], "are text"),
    "half a flag": ([score(81, 1, 8)], ["--quest", "q"], "unrecognized arguments: --quest"),
    "flag": ([score(81, 1, 8)], ["--quartiles"], "--help"),
}


def one_line(args, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(["show", *args])
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("evals: ") and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path, capsys):
    content, flags, message = BAD[name]
    path = tmp_path / "data.jsonl"
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        save(path, *content)
    assert message in one_line([str(path), *flags], capsys)


def test_two_benchmarks_or_one_run_twice_are_one_line(tmp_path, capsys):
    save(tmp_path / "a.jsonl", annotation(1, 2))
    save(tmp_path / "b.jsonl", score(81, 1, 8))
    save(tmp_path / "c.jsonl", annotation(2, 2))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    assert "one benchmark at a time" in one_line([a, b], capsys)
    assert "given twice" in one_line([a, a], capsys)
    assert "was in an earlier file" in one_line([a, c], capsys)


def test_bad_alpaca_data_is_one_line(tmp_path, capsys):
    save(tmp_path / "a.jsonl", annotation(1, 2))
    args = [str(tmp_path / "a.jsonl"), "--alpaca-data", str(tmp_path)]
    table = tmp_path / "instruction_difficulty.csv"
    assert "instruction_difficulty.csv: cannot read" in one_line(args, capsys)
    for text, message in (
        ("", "is empty"),
        ("instruction,other\nq,1\n", "no column instruction_difficulty"),
        ("instruction,instruction_difficulty\nq,hard\n", "is a number, not 'hard'"),
        ("instruction,instruction_difficulty\nq,1\nq,2\n", "another difficulty"),
        ('instruction,instruction_difficulty\n"q,1\n', "not a CSV table"),
        ("instruction,instruction_difficulty\nq,1\n", "neither gamed_concise"),
    ):
        table.write_text(text)
        assert message in one_line(args, capsys)
    gamed = tmp_path / "gamed_concise_lengths.json"
    gamed.write_text(json.dumps([{"instruction": "q", "length": 3}]))
    assert "not those of the published" in one_line(args, capsys)
    header = "preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline\n"
    for row, message in (("2,0,1,1,False", "not a label"), ("1,0,1,1,True", "not False")):
        (tmp_path / "df_gamed.csv").write_text(f"{header}{row}\n")
        assert message in one_line(args, capsys)
    (tmp_path / "df_gamed.csv").write_text(f"{header}1,0,1,1,False\n")
    assert "no difficulty in" in one_line(args, capsys)


def test_a_question_without_difficulty_is_one_line(tmp_path, capsys):
    save(tmp_path / "a.jsonl", annotation(1, 2))
    args = [str(tmp_path / "a.jsonl"), "--alpaca-data", str(alpaca_data())]
    assert "no difficulty" in one_line(args, capsys)


def test_no_torch_is_imported():
    code = "import sys, zephyr.evals.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

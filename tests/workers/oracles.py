"""What FastChat's judge and alpaca_eval's make of the same answers and the same replies.

Run by test_oracles.py, with the folder that the two are installed in and the folder of files. No
judge is asked: `replies.jsonl` has what ours was asked and what it replied, and what an original
asks must be there to the letter. Prints a JSON object.
"""

import contextlib
import io
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

PLACE, FOLDER = map(Path, sys.argv[1:])
sys.path.insert(0, str(PLACE))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


REPLIES = {
    json.dumps(row["messages"], sort_keys=True): row["reply"] for row in rows("replies.jsonl")
}


def reply(messages: list[dict]) -> dict:
    return REPLIES[json.dumps(messages, sort_keys=True)]


def fastchat() -> dict:
    import pandas
    from fastchat.llm_judge import common, gen_judgment, show_result

    def answered(model, conv, temperature, max_tokens):
        system = {"role": "system", "content": conv.system_message}
        user = {"role": "user", "content": conv.messages[0][1]}
        assert (temperature, max_tokens) == (0, 2048)
        return reply([system, user])["choices"][0]["message"]["content"]

    common.chat_completion_openai = answered
    questions = common.load_questions(FOLDER / "question.jsonl", None, None)
    models, answers = ["ours"], common.load_model_answers(FOLDER / "answers")
    references = common.load_model_answers(FOLDER / "references")
    prompts = common.load_judge_prompts(FOLDER / "judge_prompts.jsonl")
    found = {}
    for kind, make_judges, make, play, baseline in (
        (
            "single",
            gen_judgment.make_judge_single,
            gen_judgment.make_match_single,
            common.play_a_match_single,
            None,
        ),
        (
            "pair",
            gen_judgment.make_judge_pairwise,
            gen_judgment.make_match,
            common.play_a_match_pair,
            "theirs",
        ),
    ):
        judges = make_judges("gpt-4", prompts)
        common.check_data(questions, answers, references, ["ours", "theirs"], judges)
        matches = []
        for name, judge in judges.items():
            by_reference = name.startswith("math")
            asked = [
                q for q in questions if (q["category"] in common.NEED_REF_CATS) == by_reference
            ]
            more = {"multi_turn": name.endswith("mt")}
            more |= {"ref_answers": references} if by_reference else {}
            matches += make(asked, models, answers, judge, baseline, **more)
        with contextlib.redirect_stdout(io.StringIO()):
            found[kind] = [play(match, output_file=None) for match in matches]
    # its show_result on our files
    pandas.set_option("display.precision", 15)
    args = Namespace(bench_name="mt_bench", model_list=None, baseline_model=None)
    for kind, show in (
        ("single", show_result.display_result_single),
        ("pair", show_result.display_result_pairwise),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            show(Namespace(**vars(args), input_file=FOLDER / f"{kind}.jsonl"))
        found[f"{kind} shown"] = re.findall(r"^(ours|theirs) +(.*)$", said.getvalue(), re.M)
    ours = common.load_single_model_judgments(FOLDER / "single.jsonl")
    pairs = common.load_pairwise_model_judgments(FOLDER / "pair.jsonl")
    found["read"] = [sum(map(len, ours.values())), sum(map(len, pairs.values()))]
    return found


def alpaca() -> dict:
    from alpaca_eval import completion_parsers, utils
    from alpaca_eval.annotators import PairwiseAnnotator, base
    from alpaca_eval.metrics import get_winrate

    def answered(prompts, **parameters):
        choices = []
        for prompt in prompts:
            choice = reply(utils.prompt_to_chatml(prompt))["choices"][0]
            choices.append(choice | {"text": choice["message"]["content"], "total_tokens": 15})
        return {
            "completions": [choice["text"] for choice in choices],
            "completions_all": choices,
            "price_per_example": [0.0] * len(choices),
            "time_per_example": [0.0] * len(choices),
        }

    base.get_fn_completions = lambda name: answered
    annotator = PairwiseAnnotator(
        annotators_config="weighted_alpaca_eval_gpt4_turbo", seed=0, caching_path=None
    )
    annotated = annotator.annotate_head2head(
        outputs_1=json.loads((FOLDER / "base.json").read_text()),
        outputs_2=json.loads((FOLDER / "ours.json").read_text()),
    )
    ours = json.loads((FOLDER / "alpaca.json").read_text())
    both = json.loads((FOLDER / "both.json").read_text())
    parsed = []  # our completions by its parser, in the order of its coin
    for row in filter(lambda row: row["raw_completion"], both):
        (read,) = completion_parsers.logprob_parser(
            row["raw_completion"], "m", ["m", "M"], is_binarize=False
        )
        coin = "is_switched_outputs" + row["instruction"] + "0"
        exchanged = utils.random_seeded_choice(seed=coin, choices=[False, True])
        parsed.append([row["instruction"], exchanged, 3 - read if exchanged else read])
    return {
        "annotations": annotated,
        "parsed": parsed,
        "win rate": get_winrate(ours),
        "both": get_winrate(both),
    }


print(json.dumps({"fastchat": fastchat(), "alpaca": alpaca()}, default=float))

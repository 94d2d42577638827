"""How good a model is by a judge's word, whether that word can be believed, and how good it is
without a judge.

alpaca.py          AlpacaEval's annotations: win rate, and which answer the judge saw first
length_control.py  the win rate that is left when the lengths of the answers are taken out
mt_bench.py        FastChat's judgments: scores by turn and category, games in both orders
belief.py          the judge's own habits: slot, length, consistency, ties, agreement, family
page.py            the figures as plain text, at most 100 columns wide
show.py            files of annotations or judgments -> figures and page
judge.py           answers -> judgments, by a model at an endpoint or in a folder
judge_mt_bench.py  MT-Bench's protocols: grades, and games of two models
judge_alpaca.py    AlpacaEval's protocol: outputs beside a baseline's, by log-probs or by text
mt_bench_prompts.py, alpaca_prompt.py    what the judge is asked: the originals' prompts, or our own
pairs.py           which held-out pairs a model's implicit reward ranks rightly; the only one with
                   torch

    python -m zephyr.evals show FILE... [--alpaca-data DIR] [--json OUT]
    python -m zephyr.evals judge mt-bench ANSWERS [--against ANSWERS2] --questions FILE \
        --judge NAME@URL --out OUT
    python -m zephyr.evals judge alpaca OUTPUTS --against BASELINE --judge NAME@URL --out OUT
    python -m zephyr.evals pairs MODEL --reference REF --data PAIRS
"""

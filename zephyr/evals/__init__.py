"""How good a model is by a judge's word, whether that word can be believed, and how good it is
without a judge.

alpaca.py          AlpacaEval's annotations: win rate, and which answer the judge saw first
length_control.py  the win rate that is left when the lengths of the answers are taken out
mt_bench.py        FastChat's judgments: scores by turn and category, games in both orders
belief.py          the judge's own habits: slot, length, consistency, ties, agreement, family
page.py            the figures as titles, tables and sentences; as plain text
entries.py         questions, answers and judgments, as the page to click through has them
html.py            that page: one file, which a browser opens without a network
show.py            files of annotations or judgments -> figures and page
questions.py       the questions of MT-Bench and AlpacaEval, and at which temperature each is asked
converse.py        questions asked turn by turn
answer.py          questions -> the answers of a model, in FastChat's or AlpacaEval's file
answer_page.py     how many they are, how long, and what is wrong with them
best_of.py         the best of N answers by the model's own implicit reward; needs torch
judge.py           answers -> judgments, by a model at an endpoint or in a folder
asking.py          the judge: a model that is asked for verdicts, each until it can be read
judge_mt_bench.py  MT-Bench's protocols: grades, and games of two models
judge_alpaca.py    AlpacaEval's protocol: outputs beside a baseline's, by log-probs or by text
mt_bench_prompts.py  what MT-Bench's judge is asked, by FastChat's prompts or our own; taken apart
alpaca_prompt.py   what AlpacaEval's judge is asked, by its own prompt or ours
pairs.py           which held-out pairs a model's implicit reward ranks rightly; needs torch

    python -m zephyr.evals show FILE... [--alpaca-data DIR] [--json OUT] [--html OUT]
    python -m zephyr.evals answer mt-bench|alpaca MODEL --questions|--instructions FILE --out OUT
    python -m zephyr.evals judge mt-bench ANSWERS [--against ANSWERS2] --questions FILE \
        --judge NAME@URL --out OUT
    python -m zephyr.evals judge alpaca OUTPUTS --against BASELINE --judge NAME@URL --out OUT
    python -m zephyr.evals pairs MODEL --reference REF --data PAIRS
"""

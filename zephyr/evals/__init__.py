"""How good a model is by a judge's word, whether that word can be believed, and how good it is
without a judge.

alpaca.py          AlpacaEval's annotations: win rate, and which answer the judge saw first
length_control.py  the win rate that is left when the lengths of the answers are taken out
mt_bench.py        FastChat's judgments: scores by turn and category, games in both orders
belief.py          the judge's own habits: slot, length, consistency, ties, agreement, family
page.py            the figures as titles, tables and sentences; as plain text
prompts.py         MT-Bench's prompts to a judge, taken apart
entries.py         questions, answers and judgments, as the page to click through has them
html.py            that page: one file, which a browser opens without a network
show.py            files of annotations or judgments -> figures and page
judge.py           answers -> judgments, by a model at an endpoint
pairs.py           which held-out pairs a model's implicit reward ranks rightly; the only one with
                   torch

    python -m zephyr.evals show FILE... [--alpaca-data DIR] [--json OUT] [--html OUT]
    python -m zephyr.evals judge mt-bench ANSWERS --questions FILE --url URL --judge NAME --out OUT
    python -m zephyr.evals pairs MODEL --reference REF --data PAIRS
"""

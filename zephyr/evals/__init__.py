"""How good a model is by a judge's word, and whether that word can be believed. No torch here.

alpaca.py          AlpacaEval's annotations: win rate, and which answer the judge saw first
length_control.py  the win rate that is left when the lengths of the answers are taken out
mt_bench.py        FastChat's judgments: scores by turn and category, games in both orders
belief.py          the judge's own habits: slot, length, consistency, ties, agreement, family
page.py            the figures as plain text, at most 100 columns wide
show.py            files of annotations or judgments -> figures and page

    python -m zephyr.evals show FILE... [--alpaca-data DIR] [--json OUT]
"""

"""How good a model is by a judge's word, whether that word can be believed, and how good it is
without a judge.

alpaca.py          AlpacaEval's annotations: win rate, and which answer the judge saw first
length_control.py  the win rate that is left when the lengths of the answers are taken out
mt_bench.py        FastChat's judgments: scores by turn and category, games in both orders
belief.py          the judge's own habits: slot, length, consistency, ties, agreement, family
page.py            the figures as plain text, at most 100 columns wide
show.py            files of annotations or judgments -> figures and page
questions.py       the questions of MT-Bench and AlpacaEval, and at which temperature each is asked
converse.py        questions asked turn by turn
answer.py          questions -> the answers of a model, in FastChat's or AlpacaEval's file
answer_page.py     how many they are, how long, and what is wrong with them
best_of.py         the best of N answers by the model's own implicit reward; needs torch
judge.py           answers -> judgments, by a model at an endpoint
pairs.py           which held-out pairs a model's implicit reward ranks rightly; needs torch

    python -m zephyr.evals show FILE... [--alpaca-data DIR] [--json OUT]
    python -m zephyr.evals answer mt-bench MODEL --questions FILE --out ANSWERS
    python -m zephyr.evals judge mt-bench ANSWERS --questions FILE --url URL --judge NAME --out OUT
    python -m zephyr.evals pairs MODEL --reference REF --data PAIRS
"""

"""What `zephyr.collect` is made of.

completion.py  one answer to a prompt; which models are asked for one, after which principle
rating.py      a judge's ratings of answers: what it is asked, what is read in its words
report.py      what came of it all, as text
"""

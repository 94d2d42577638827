"""What `zephyr.endpoint` is made of.

exchange.py  Endpoint; one request to it: the answer, or the kind of trouble
store.py     the file of answers: a line for each, whole after any kill
interrupt.py Ctrl-C: the first waits for what is in flight, the second leaves
budget.py    what requests cost, and a limit that they stay below
"""

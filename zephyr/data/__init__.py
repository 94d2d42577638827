"""Files of conversations or preference pairs to the packed micro-batches of each step, in order:

readers.py    .jsonl, .json, either gzipped, .parquet -> rows, with the place of each
forms.py      a row -> a conversation or a pair, whichever of the published forms it has
arrays.py     conversations and pairs -> arrays of token ids, cut to the lengths that were asked for
held_out.py   the prompts of evaluation sets, which `zephyr.feedback --exclude` drops
prompts.py    prompts that nobody has answered yet, for `zephyr.feedback collect`
cache.py      the folder where those arrays are kept for the next run
batching.py   which pairs or documents are in which step, micro-batch and rank
"""

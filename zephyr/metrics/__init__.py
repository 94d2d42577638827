"""What a run reports.

means.py    global means over micro-batches and ranks; the work of a batch
phases.py   where a step's time and memory go; a trace of one step
log.py      metrics.jsonl, the progress bar, TensorBoard
journal.py  what a training loop tells: log and guard in one
plots.py    curves

    python -m zephyr.metrics RUN... [--out PNG]
"""

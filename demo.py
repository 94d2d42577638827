"""The whole recipe on an invented village, in a few minutes on a laptop's CPU: `make demo`.

A small Mistral is born with random weights, learns to answer from four birds of uneven quality
(dSFT), the judge's scores of their answers become pairs (AI feedback), the pairs align it (dDPO);
then the judge, behind an endpoint as GPT-4 would be, compares what it says before and after, on
prompts that neither training nor the choice of a setting has seen.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from zephyr.data import readers
from zephyr.run import exits
from zephyr.toy import birds, serve, village

RUNS = Path("runs/tiny")
WORLD = birds.FOLDER
CORES = os.cpu_count() or 1
RANKS = torch.cuda.device_count() or min(2, CORES)
TORCHRUN = f"-m torch.distributed.run --standalone --nproc-per-node {RANKS}"
FRESH = "--resume fresh"
EVALS = "-m zephyr.evals"
LABELLED = f"--feedback {serve.NAME}"  # its verdicts made the pairs, which the page is to know


def main() -> None:
    began = time.time()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // RANKS)))
    sft, dpo = f"{RUNS}/sft/model", f"{RUNS}/dpo/model"
    raw, pairs = f"{WORLD}/ultrafeedback.train.jsonl.gz", f"{WORLD}/pairs.train.jsonl.gz"
    run("dSFT: learn to answer from the birds' conversations", f"{TORCHRUN} train_sft.py {FRESH}")
    run("AI feedback: the judge's scores become pairs", f"-m zephyr.feedback {raw} --out {pairs}")
    run("dDPO: prefer what the judge preferred", f"{TORCHRUN} train_dpo.py {FRESH}")
    run("curves", f"-m zephyr.metrics {RUNS}/sft {RUNS}/dpo --out {RUNS}/curves.png")
    run(
        "its implicit reward, on pairs never trained on: has it learned more than length?",
        f"{EVALS} pairs {dpo} --reference {sft} --data {WORLD}/pairs.test.jsonl.gz",
    )
    for stage, model in (("sft", sft), ("dpo", dpo)):
        run(
            f"{stage} answers prompts that were held out until now",
            f"{EVALS} answer alpaca {model} --instructions {WORLD}/ultrafeedback.held_out.jsonl.gz "
            f"--max-new 100 --out {RUNS}/answers.{stage}.json",
        )
    print(before_and_after())
    # the judge ends when this closes its stdin, or is killed
    serving = [sys.executable, "-m", "zephyr.toy", "serve", "--until-eof"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(serving, **pipes, text=True) as server:
        judge = server.stdout.readline().strip()
        run(
            "the judge compares the answers, in both orders",
            f"{EVALS} judge alpaca {RUNS}/answers.dpo.json --against {RUNS}/answers.sft.json "
            f"--judge {judge} {LABELLED} --out {RUNS}/annotations.json --html {RUNS}/report.html",
        )
    print(
        f"\n{time.time() - began:.0f} s; every answer and verdict: {RUNS}/report.html; curves: "
        f"{RUNS}/curves.png; talk to it: python -m zephyr.generate {dpo}"
    )


def run(title: str, command: str, **how) -> None:
    print(f"\n{title}\n$ python {command}", flush=True)
    if code := subprocess.run([sys.executable, *command.split()], check=False, **how).returncode:
        sys.exit(code)


def before_and_after() -> str:
    """Return how well and how long both models answer, with three of their answers."""
    paths = {stage: RUNS / f"answers.{stage}.json" for stage in ("sft", "dpo")}
    said = {stage: [row for _, row in readers.read_rows(p)] for stage, p in paths.items()}
    scores = {
        stage: [village.judge(row["instruction"], row["output"]).score for row in rows]
        for stage, rows in said.items()
    }
    words = {s: mean(len(row["output"].split()) for row in rows) for s, rows in said.items()}
    lines = [
        f"\njudge's mean score, 1 to 10   {mean(scores['sft']):.2f} -> {mean(scores['dpo']):.2f}",
        f"words per answer              {words['sft']:.1f} -> {words['dpo']:.1f}",
    ]
    for k in range(3):
        lines.append(f"\n  {said['sft'][k]['instruction']}")
        lines += [f"    {s}  {scores[s][k]:4.1f}  {rows[k]['output']}" for s, rows in said.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    exits.call(main)

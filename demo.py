"""The whole recipe on an invented village, in a few minutes on a laptop's CPU: `make demo`.

A small Mistral is born with random weights, learns to answer from four birds of uneven quality
(dSFT), the judge's scores of their answers become pairs (AI feedback), the pairs align it (dDPO);
then the judge, behind an endpoint as GPT-4 would be, compares what it says before and after, on
prompts that neither training nor the choice of a setting has seen.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from zephyr import files, generate
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
    torch.set_num_threads(1)  # sampling from so small a model gains nothing from more
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
    print("\nBefore and after, on prompts that were held out until now", flush=True)
    print(before_and_after())
    # the judge ends when this closes its stdin, or is killed
    serving = [sys.executable, "-m", "zephyr.toy", "serve", "--until-eof"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(serving, **pipes, text=True) as server:
        asked = f"--judge {server.stdout.readline().strip()} {LABELLED}"
        said = f"{RUNS}/annotations.json"
        run(
            "the judge compares the answers, in both orders",
            f"{EVALS} judge alpaca {RUNS}/answers.dpo.json --against {RUNS}/answers.sft.json "
            f"{asked} --out {said}",
            stdout=subprocess.DEVNULL,  # `show` says it all
        )
    run("what it said", f"{EVALS} show {said} {LABELLED} --html {RUNS}/report.html")
    print(
        f"\n{time.time() - began:.0f} s; every answer and verdict: {RUNS}/report.html; curves: "
        f"{RUNS}/curves.png; talk to it: python -m zephyr.generate {dpo}"
    )


def run(title: str, command: str, **how) -> None:
    print(f"\n{title}\n$ python {command}", flush=True)
    if code := subprocess.run([sys.executable, *command.split()], check=False, **how).returncode:
        sys.exit(code)


def before_and_after() -> str:
    """Return how both models answer the held-out prompts, and write it as AlpacaEval's outputs."""
    rows = readers.read_rows(WORLD / "ultrafeedback.held_out.jsonl.gz")
    prompts = [row["instruction"] for _, row in rows]
    said = {stage: sample(f"{RUNS}/{stage}/model", prompts) for stage in ("sft", "dpo")}
    for stage, answers in said.items():
        about = {"generator": stage, "dataset": "larkmere"}
        pairs = zip(prompts, answers, strict=True)
        outputs = [{"instruction": p, "output": a} | about for p, a in pairs]
        with files.atomic(RUNS / f"answers.{stage}.json") as file:
            file.write(json.dumps(outputs, indent=1).encode())
    scores = {
        stage: [village.judge(p, a).score for p, a in zip(prompts, answers, strict=True)]
        for stage, answers in said.items()
    }
    words = {stage: mean(len(a.split()) for a in answers) for stage, answers in said.items()}
    lines = [
        f"  judge's mean score, 1 to 10    {mean(scores['sft']):.2f} -> {mean(scores['dpo']):.2f}",
        f"  words per answer               {words['sft']:.1f} -> {words['dpo']:.1f}",
    ]
    for k in range(3):
        lines.append(f"\n  {prompts[k]}")
        lines += [f"    {stage}  {scores[stage][k]:4.1f}  {said[stage][k]}" for stage in said]
    return "\n".join(lines)


def sample(folder: str, prompts: list[str]) -> list[str]:
    """One sampled answer to each prompt."""
    model, tokenizer = generate.load(folder)
    ids = [tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = generate.generate(model, ids, 100, tokenizer.eos, temperature=0.7, seed=0)
    return [tokenizer.decode(answer) for answer in answers]


if __name__ == "__main__":
    exits.call(main)

"""The whole recipe on an invented village, in a few minutes on a laptop's CPU: `make demo`.

A small Mistral is born with random weights, learns to answer from four birds of uneven quality
(dSFT), the judge's scores of their answers become pairs (AI feedback), the pairs align it (dDPO);
then the judge compares what it says before and after, on prompts it was never trained on.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import torch

from zephyr import generate
from zephyr.data import readers
from zephyr.run import exits
from zephyr.toy import birds, village

RUNS = Path("runs/tiny")
CORES = os.cpu_count() or 1
RANKS = torch.cuda.device_count() or min(2, CORES)
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
STAGES = {
    "dSFT: learn to answer from the birds' conversations": [
        *TORCHRUN,
        "train_sft.py",
        "--resume",
        "fresh",
    ],
    "AI feedback: the judge's scores become preference pairs": [
        "-m",
        "zephyr.feedback",
        str(birds.FOLDER / "ultrafeedback.train.jsonl.gz"),
        "--out",
        str(birds.FOLDER / "pairs.train.jsonl.gz"),
    ],
    "dDPO: prefer what the judge preferred": [*TORCHRUN, "train_dpo.py", "--resume", "fresh"],
    "curves": ["-m", "zephyr.metrics", f"{RUNS}/sft", f"{RUNS}/dpo", "--out", f"{RUNS}/curves.png"],
    "its implicit reward, on held-out pairs: has it learned more than length?": [
        "-m",
        "zephyr.evals",
        "pairs",
        f"{RUNS}/dpo/model",
        "--reference",
        f"{RUNS}/sft/model",
        "--data",
        str(birds.FOLDER / "pairs.test.jsonl.gz"),
    ],
}


def main() -> None:
    began = time.time()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, CORES // RANKS)))
    torch.set_num_threads(1)  # sampling from so small a model gains nothing from more
    for title, command in STAGES.items():
        print(f"\n{title}\n$ python {' '.join(command)}", flush=True)
        if code := subprocess.run([sys.executable, *command], check=False).returncode:
            sys.exit(code)
    print("\nBefore and after, on prompts never trained on", flush=True)
    rows = [row for _, row in readers.read_rows(birds.FOLDER / "ultrafeedback.test.jsonl.gz")]
    prompts = [row["instruction"] for row in rows]
    answers = {stage: sample(f"{RUNS}/{stage}/model", prompts) for stage in ("sft", "dpo")}
    print(verdict(prompts, answers))
    print(
        f"\n{time.time() - began:.0f} s; curves: {RUNS}/curves.png; talk to it: "
        f"python -m zephyr.generate {RUNS}/dpo/model"
    )


def sample(folder: str, prompts: list[str]) -> list[str]:
    """One sampled answer to each prompt."""
    model, tokenizer = generate.load(folder)
    ids = [tokenizer.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
    answers = generate.generate(model, ids, 100, tokenizer.eos, temperature=0.7, seed=0)
    return [tokenizer.decode(answer) for answer in answers]


def verdict(prompts: list[str], answers: dict[str, list[str]]) -> str:
    """What the judge says of both models' answers; a tie is half a win."""
    scores = {
        stage: [village.judge(p, a).score for p, a in zip(prompts, said, strict=True)]
        for stage, said in answers.items()
    }
    compared = list(zip(scores["dpo"], scores["sft"], strict=True))
    wins, ties = sum(d > s for d, s in compared), sum(d == s for d, s in compared)
    losses = len(compared) - wins - ties
    rate = (wins + 0.5 * ties) / len(compared)
    lines = [json.loads(line) for line in (RUNS / "dpo/metrics.jsonl").read_text().splitlines()]
    accuracy = next(row for row in reversed(lines) if "eval_loss" in row)
    words = {stage: mean(len(a.split()) for a in said) for stage, said in answers.items()}
    out = [
        f"  held-out preference accuracy   {accuracy['eval_rewards/accuracies']:.1%}",
        f"  judge's win rate, DPO to SFT   {rate:.1%}: {wins} wins, {losses} losses, {ties} ties, "
        "which count half",
        f"  judge's mean score, 1 to 10    {mean(scores['sft']):.2f} -> {mean(scores['dpo']):.2f}",
        f"  words per answer               {words['sft']:.1f} -> {words['dpo']:.1f}",
    ]
    for k in range(3):
        out.append(f"\n  {prompts[k]}")
        out += [f"    {stage}  {scores[stage][k]:4.1f}  {answers[stage][k]}" for stage in answers]
    return "\n".join(out)


if __name__ == "__main__":
    exits.call(main)

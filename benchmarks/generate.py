"""Greedy decoding beside transformers' `generate`: the same weights, prompts and number of tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.generate              a CPU, two minutes
    python -m benchmarks.generate --device cuda --shape 7b       a GPU; --static adds a contender

Both models hold the very same tensors, and the contenders take turns, so that a machine whose
speed wanders is slow for all of them. A rate is new tokens over seconds, those of the prompts
included; where others use the machine, too, the processor's seconds say more, with one thread.
Tokens that differ fail the run in fp32; in bf16 near ties may break either way.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import vs_trl
from zephyr import generate
from zephyr.model import Mistral
from zephyr.weights import config_json


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.generate")
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="fp32 on a CPU, else bf16 [cpu]")
    add("--shape", choices=vs_trl.SIZES, default="small", help="of the random Mistral [small]")
    add("--batches", type=int, nargs="+", default=[1, 8], help="sequences at a time [1 8]")
    add("--prompt", type=int, default=64, help="tokens of each prompt [64]")
    add("--new", type=int, default=128, help="tokens after each [128]")
    add("--rounds", type=int, default=7, help="timed ones, after one that is not [7]")
    add("--static", action="store_true", help="transformers' static cache, compiled on a GPU, too")
    add("--json", type=Path, help="file to append one line per batch size to")
    return parser.parse_args(argv)


def models(o: argparse.Namespace) -> tuple[Mistral, torch.nn.Module]:
    """Return our model and transformers', which share their random weights."""
    shape = vs_trl.architecture(o.shape)
    with tempfile.TemporaryDirectory() as folder:
        config_json.write_config(Path(folder), shape, "float32", {})
        config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(o.device):
        dtype = torch.float32 if o.device == "cpu" else torch.bfloat16
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    theirs.generation_config.eos_token_id = None  # every answer is as long as asked for
    with torch.device("meta"):
        ours = Mistral(shape)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


def race(o: argparse.Namespace, ours: Mistral, theirs: torch.nn.Module, batch: int) -> dict:
    """Return the seconds, and the processor's, that each contender took in every round. Raises
    ValueError where the tokens differ in fp32."""
    prompts_BT = torch.randint(vs_trl.VOCABULARY, (batch, o.prompt), device=o.device)
    inputs = {"input_ids": prompts_BT, "attention_mask": torch.ones_like(prompts_BT)}
    greedy = {"max_new_tokens": o.new, "do_sample": False}

    def transformers(**cache) -> list[list[int]]:
        return theirs.generate(**inputs, **greedy, **cache)[:, o.prompt :].tolist()

    contenders = {
        "ours": lambda: generate.generate(ours, prompts_BT.tolist(), o.new, -1, temperature=0.0),
        "transformers": transformers,
    }
    if o.static:
        contenders["static"] = lambda: transformers(cache_implementation="static")
    said, spent = {}, {name: [] for name in contenders}
    for _ in range(1 + o.rounds):
        for name, contender in contenders.items():
            wall, busy = time.perf_counter(), time.process_time()
            said[name] = contender()
            spent[name].append((time.perf_counter() - wall, time.process_time() - busy))
    differ = [name for name in contenders if said[name] != said["ours"]]
    if differ and o.device == "cpu":
        raise ValueError(f"batch {batch}: the tokens of {', '.join(differ)} are not ours")
    return {name: rounds[1:] for name, rounds in spent.items()}


def main(argv: list[str] | None = None) -> None:
    o = parse(argv)
    ours, theirs = models(o)
    for batch in o.batches:
        spent = race(o, ours, theirs, batch)
        row = {"shape": o.shape, "device": o.device, "batch": batch, **vs_trl.machine()}
        for name, rounds in spent.items():
            rate = batch * o.new / statistics.median(wall for wall, _ in rounds)
            both = list(zip(rounds, spent["ours"], strict=True))
            wall, busy = (statistics.median(a[k] / b[k] for a, b in both) for k in (0, 1))
            row |= {name: round(rate, 1), f"x {name}": round(wall, 2)}
            row |= {f"x {name}, processor": round(busy, 2)}
            print(
                f"batch {batch}  {name:12} {rate:8.1f} tokens/s; ours is {wall:.2f} x as fast, "
                f"{busy:.2f} x in processor time"
            )
        if o.json:
            with open(o.json, "a") as file:
                print(json.dumps(row), file=file)


if __name__ == "__main__":
    main()

"""DPO training beside TRL's DPOTrainer: the same weights, pairs, batches, objective and precision.

    python -m benchmarks.vs_trl                                   on whatever there is
    python -m benchmarks.vs_trl --shape 1b --batch 32 --json results.jsonl      on a GPU

Each contender is a process of its own, one after another. Ours is train_dpo.py's `main`; TRL gets
the token ids of our plan, in its order. The losses of every step must agree. bf16 is each side's
own: autocast over fp32 weights there, fp32 masters cast when gathered here. TRL: extra `peers`.
"""

import argparse
import importlib.util
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from zephyr.data import arrays, readers
from zephyr.data.batching import PairSteps
from zephyr.distributed.machine import tune_allocators
from zephyr.metrics.log import read
from zephyr.weights import config_json, hub

ROOT = Path(__file__).resolve().parent.parent
BETA, LENGTH, WARM_UP, VOCABULARY = 0.1, 1024, 2, 32000
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}  # largest difference of two contenders' losses in a step
# width, MLP width, layers, heads, key/value heads: 20 M, 61 M, 1.1 B and 7.2 B parameters
SIZES = {
    "tiny": (256, 896, 4, 8, 4),
    "small": (512, 1792, 8, 8, 4),
    "1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 14336, 32, 32, 8),
}
CONTENDERS = {
    "ours-cached": "train_dpo.py, the reference's log-probs computed once and timed apart",
    "ours-live": "train_dpo.py --reference live",
    "trl": "DPOTrainer's defaults, so live reference, recomputation, 8 pairs at a time",
    "trl-malloc": "trl with our malloc settings (machine.keep_buffers)",
    "trl-tuned": "trl-malloc without recomputation, --trl-pairs pairs at a time",
    "trl-tuned-cached": "trl-tuned with precompute_ref_log_probs, timed apart",
}
COLUMNS = {  # of the table: a result's key, and how many decimals
    "pairs/s": ("pairs_per_second", 3),
    "tokens/s": ("tokens_per_second", 0),
    "peak GiB": ("peak_gib", 2),
    "reference s": ("reference", 1),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError for numbers that do not go together."""
    about = "; ".join(f"{name}: {what}" for name, what in CONTENDERS.items())
    parser = argparse.ArgumentParser("python -m benchmarks.vs_trl", epilog=about)
    add = parser.add_argument
    add("--precision", choices=("bf16", "fp32", "both"), default="both", help="[both]")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="[all]")
    add("--shape", choices=SIZES, default="tiny", help="of the random Mistral [tiny]")
    add("--steps", type=int, default=8, help=f"optimizer steps; {WARM_UP} are warm-up [8]")
    add("--batch", type=int, default=8, help="pairs per optimizer step [8]")
    add("--pairs", type=int, help="pairs that the steps are drawn from [just what they need]")
    add("--lr", type=float, default=1e-5, help="constant [1e-5: the losses move, none flies off]")
    add("--microbatch-tokens", type=int, default=16384, help="of ours [16384]")
    add("--trl-pairs", type=int, default=1, help="per_device_train_batch_size of trl-tuned* [1]")
    add(
        "--data-root",
        type=Path,
        default=ROOT.parent / "shared" / "data",
        help="holds ultrafeedback.train.jsonl.gz, mistral/tokenizer.model [../shared/data]",
    )
    add("--json", type=Path, help="file to append one line per precision to")
    o = parser.parse_args(argv)
    if o.steps <= WARM_UP:
        raise ValueError(f"--steps {o.steps} must be above {WARM_UP}, the steps of the warm-up")
    for name, pairs in (("--trl-pairs", o.trl_pairs), ("TRL's default,", min(8, o.batch))):
        if min(o.batch, pairs) < 1 or o.batch % pairs:
            raise ValueError(f"--batch {o.batch} must be a multiple of {name} {pairs}")
    o.pairs = o.pairs or o.steps * o.batch
    return o


def prepare(o: argparse.Namespace, place: Path) -> list[int]:
    """Make the random model and the pairs in `place`; returns each step's real tokens: the prompt
    and the response of both sequences, nothing padded."""
    from zephyr import feedback

    (base := place / "base").mkdir()
    raw, every = o.data_root / "ultrafeedback.train.jsonl.gz", place / "every.jsonl"
    feedback.run(feedback.parse([str(raw), "--out", str(every)]))
    readers.write_rows(
        place / "pairs.jsonl", [row for _, row in readers.read_rows(every)][: o.pairs]
    )
    config_json.write_config(base, architecture(o.shape), "float32", {})
    from zephyr.tokenizer import Tokenizer

    config_json.write_tokenizer(base, Tokenizer(o.data_root / "mistral"), None)
    batches = in_order(o, place)
    hub.fresh(base, seed=0)
    return [sum(2 * len(p) + len(c) + len(r) for p, c, r in batch) for batch in batches]


def architecture(name: str):
    """The MistralConfig of one of SIZES."""
    from zephyr.architecture import MistralConfig

    width, mlp, layers, heads, kv_heads = SIZES[name]
    return MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4096,
    )


def in_order(o: argparse.Namespace, place: Path) -> list[list]:
    """Token ids (prompt, chosen, rejected) of every step's pairs, as train_dpo.py will plan it."""
    from zephyr import config
    from zephyr.tokenizer import Tokenizer

    c, _ = config.parse(config.DPOConfig, flags(o, place, "fp32"))
    tokens = arrays.preferences(c.data, Tokenizer(c.model), c)
    if len(tokens) < o.steps * o.batch:
        raise ValueError(f"{len(tokens)} pairs are less than --steps {o.steps} x --batch {o.batch}")
    plan = PairSteps(tokens, c.batch, c.microbatch_tokens, c.seed, rank=0, world=1)
    return [[tokens.pair(k) for k in plan.step(step)] for step in range(o.steps)]


def flags(o: argparse.Namespace, place: Path, precision: str, *own: str) -> list[str]:
    """train_dpo.py's; what stands in `own` has the last word."""
    line = (
        f"--beta {BETA} --schedule constant --warmup 0 --max-length {LENGTH} --steps {o.steps} "
        f"--batch {o.batch} --lr {o.lr} --precision {precision}"
    )
    paths = {"--model": "base", "--data": "pairs.jsonl", "--out": "run"}
    return [*line.split(), *(x for k, v in paths.items() for x in (k, str(place / v))), *own]


def timed(function: Callable, spent: list[float]) -> Callable:
    """`function`, adding the seconds of each call to `spent`."""

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        settle()
        spent.append(time.perf_counter() - start)
        return result

    return wrapper


def settle() -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(o: argparse.Namespace, place: Path, name: str, precision: str) -> dict:
    own = (
        "--reference",
        name.removeprefix("ours-"),
        "--microbatch-tokens",
        str(o.microbatch_tokens),
    )
    return script(o, place, flags(o, place, precision, *own))


def script(o: argparse.Namespace, place: Path, argv: list[str]) -> dict:
    """train_dpo.py from its command line; what is measured is what its metrics.jsonl says."""
    import train_dpo

    spent: list[float] = []
    train_dpo.reference.cached = timed(train_dpo.reference.cached, spent)
    sys.argv = ["train_dpo.py", *argv]
    train_dpo.main()
    rows = read(place / "run")
    phases = [name for name in rows[-1] if name.startswith(("seconds/", "memory/"))]
    return {
        "losses": [row["loss"] for row in rows],
        "seconds": [o.batch / row["pairs_per_second"] for row in rows],
        "reference": sum(spent),
        # each phase starts the device's count of its peak anew
        "peak_gib": max(row[name] for row in rows for name in phases if name[0] == "m"),
        "phases": {name: statistics.median(row[name] for row in rows) for name in phases},
    }


def trl(o: argparse.Namespace, place: Path, name: str, precision: str) -> dict:
    """DPOTrainer with its defaults, but for what equal work and the contender ask for."""
    from transformers import AutoTokenizer

    tuned = "tuned" in name
    if name != "trl":
        tune_allocators()
    return trainer(
        o,
        str(place / "base"),
        AutoTokenizer.from_pretrained(place / "base"),
        in_order(o, place),
        output_dir=str(place / "run"),
        bf16=precision == "bf16",
        gradient_checkpointing=not tuned,
        per_device_train_batch_size=o.trl_pairs if tuned else min(8, o.batch),
        precompute_ref_log_probs=name == "trl-tuned-cached",
    )


def trainer(
    o: argparse.Namespace, model, tokenizer, batches: list[list], frozen=None, adapters=None, **own
) -> dict:
    """TRL's DPOTrainer on the pairs of each step in `batches`; `adapters` is a config of PEFT's,
    `own` are settings of its DPOConfig.
    `calls` are the pairs and seconds of each call that precomputes reference log-probs."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    if not hasattr(utils, "add_fused_lm_head"):
        raise ValueError("this TRL has no fused head, its default since 1.15: pip install -U trl")

    clock, spent, calls, pairs = [], [], [], own["per_device_train_batch_size"]

    class Trainer(DPOTrainer):
        _precompute_ref_logps = timed(DPOTrainer._precompute_ref_logps, spent)
        compute_ref_log_probs = timed(DPOTrainer.compute_ref_log_probs, calls)

        def _prepare_dataset(self, dataset, *_):
            return dataset  # TRL would make ids of its own from text

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            settle()
            clock.append(time.perf_counter())

        on_train_begin = on_step_end

    config = DPOConfig(
        max_steps=o.steps,
        gradient_accumulation_steps=o.batch // pairs,
        learning_rate=o.lr,
        beta=BETA,
        lr_scheduler_type="constant",
        max_length=LENGTH,
        logging_steps=1,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        **own,
    )
    prompts, chosen, rejected = zip(*(pair for b in batches for pair in b), strict=True)
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    run = Trainer(
        model,
        frozen,
        config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[Clock()],
        peft_config=adapters,
    )
    run.train()
    return {
        "losses": [line["loss"] for line in run.state.log_history if "loss" in line],
        "seconds": [b - a for a, b in zip(clock, clock[1:], strict=False)],
        "reference": sum(spent),
        "calls": [(pairs, seconds) for seconds in calls],
    }


def child(o: argparse.Namespace, place: Path, name: str, precision: str) -> dict:
    """One contender in this fresh process; what it prints is dropped."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    with tempfile.TemporaryDirectory(dir=place) as own:
        os.environ |= {"ZEPHYR_CACHE": own, "HF_HOME": own, "HF_HUB_OFFLINE": "1"}
        for made in ("base", "pairs.jsonl"):
            (Path(own) / made).symlink_to(place / made)
        side = ours if name.startswith("ours") else trl
        return with_peak(side(o, Path(own), name, precision))


def with_peak(result: dict) -> dict:
    """A result with the most memory that this process took, on a GPU the device's, in GiB."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
    return result | {"peak_gib": max(peak / 2**30, result.get("peak_gib", 0.0))}


def alone(function: Callable, *args):
    """`function(*args)` in a fresh process. The system counts a child's peak memory from its
    parent's on, so torch, zephyr and trl are imported nowhere else."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def race(o: argparse.Namespace, place: Path, precision: str, tokens: list[int]) -> dict[str, dict]:
    """Each contender's result, with medians over the steps after the warm-up, or its `error`."""
    results = {}
    for name in o.contenders:
        print(f"{precision} {name} ...", file=sys.stderr, flush=True)
        try:
            r = results[name] = alone(child, o, place, name, precision)
        except Exception as error:  # out of memory, say: that too is a result
            results[name] = {"error": f"{type(error).__name__}: {str(error).split(chr(10))[0]}"}
            continue
        steady = list(zip(r["seconds"], tokens, strict=True))[WARM_UP:]
        r["pairs_per_second"] = statistics.median(o.batch / s for s, _ in steady)
        r["tokens_per_second"] = statistics.median(t / s for s, t in steady)
    return results


def table(
    results: dict[str, dict], columns: dict[str, tuple] = COLUMNS, peers: tuple[str, ...] = ("trl",)
) -> str:
    """A row for each contender, then speed and memory as multiples of the peers', those whose names
    start so. A value that a result lacks is a dash."""
    widths = {title: max(8, len(title)) for title in columns}
    titles = "".join(f" {title:>{width}}" for title, width in widths.items())
    lines = [f"{'contender':16}{titles}  loss of each step"]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"{name:16} failed: {r['error']}")
            continue
        cells = []
        for title, (key, decimals) in columns.items():
            text = "-" if r.get(key) is None else f"{r[key]:.{decimals}f}"
            cells.append(f" {text:>{widths[title]}}")
        losses = " ".join(f"{loss:.4f}" for loss in r["losses"])
        lines.append(f"{name:16}{''.join(cells)}  {losses}")
    ran = {name: r for name, r in results.items() if "error" not in r}
    others = [name for name in ran if name.startswith(peers)]
    for name in [name for name in ran if others and name not in others]:
        for key in ("pairs_per_second", "peak_gib"):
            ratios = (f"{ran[name][key] / ran[other][key]:.2f} x {other}" for other in others)
            lines.append(f"{name} {key}: {', '.join(ratios)}")
    return "\n".join(lines)


def verdict(results: dict[str, dict], precision: str) -> str:
    """What is wrong: a contender failed, or losses differ; "" if nothing is."""
    if failed := [name for name, r in results.items() if "error" in r]:
        return f"{precision}: {', '.join(failed)} failed"
    (first, right), *others = results.items()
    for name, r in others:
        for step, (a, b) in enumerate(zip(r["losses"], right["losses"], strict=True), start=1):
            if not abs(a - b) <= TOLERANCE[precision]:  # so that a NaN is a difference too
                return (
                    f"{precision}: at step {step} the loss is {a:.6f} in {name}, {b:.6f} in "
                    f"{first}; over {TOLERANCE[precision]} apart is not the same work"
                )
    return ""


def circumstances(o: argparse.Namespace) -> dict:
    """What the numbers depend on; `load` is how many processes others keep busy."""
    given = {k: v for k, v in vars(o).items() if isinstance(v, int | float | str)}
    return given | machine() | {"load": os.getloadavg()[0]}


def machine() -> dict:
    """The processors, and what code runs on them."""
    import torch

    from kernels.provenance import code, installed

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu and cpu[1],
        "cores": len(os.sched_getaffinity(0)),
        "commit": code(),
        "torch": str(torch.__version__),
        **{p: v for p in ("triton", "transformers", "trl") if (v := installed(p))},
    }


def compare(o: argparse.Namespace) -> str:
    """Print a table for each precision; returns what is wrong with them."""
    if any(name.startswith("trl") for name in o.contenders) and not importlib.util.find_spec("trl"):
        raise ValueError("TRL is not installed: pip install zephyr-dpo[peers]")
    now, wrong = alone(circumstances, o), []
    print(*(f"{k} {v}" for k, v in now.items()), sep="  ", flush=True)
    with tempfile.TemporaryDirectory(prefix="vs_trl-") as folder:
        tokens = alone(prepare, o, Path(folder))
        for precision in ("bf16", "fp32") if o.precision == "both" else (o.precision,):
            results = race(o, Path(folder), precision, tokens)
            print(f"\n{precision}\n{table(results)}", flush=True)
            if o.json:
                with o.json.open("a") as log:
                    log.write(json.dumps(now | {"precision": precision, "results": results}) + "\n")
            wrong += filter(None, [verdict(results, precision)])
    return "; ".join(wrong)


def main(argv: list[str] | None = None) -> None:
    try:
        if wrong := compare(parse(argv)):
            sys.exit(f"vs_trl: {wrong}")
    except (ValueError, OSError) as error:
        print(f"vs_trl: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

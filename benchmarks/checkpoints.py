"""What a checkpoint costs: how long training stands still, how long writing and reading take.

    python -m benchmarks.checkpoints [--width 1024] [--layers 24] [--out FOLDER] [--json FILE]

On one process, a random Mistral of the given size, fp32 masters and AdamW's moments: 12 bytes per
parameter. Each figure is beside what bounds it, in the same run: a copy of the state in memory, the
sum over a file, a plain write and read of as many bytes on the same disk.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from zephyr import losses, optim, packing
from zephyr.architecture import MistralConfig
from zephyr.config import DPOConfig
from zephyr.distributed import fsdp, group
from zephyr.files import read_json
from zephyr.packing import Pair
from zephyr.run import checkpoint
from zephyr.run.folder import Run
from zephyr.weights.hub import initialise

GIB = 1 << 30
FULL, RANKS = 7_241_732_096, 8  # Mistral-7B's parameters, on eight GPUs


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def shape(width: int, layers: int) -> MistralConfig:
    """Mistral's proportions at another width."""
    return MistralConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        head_dim=64,
        sliding_window=4096,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        model_type="mistral",
    )


def batch(tokens: int) -> packing.Batch:
    """Pairs of UltraFeedback's average lengths, as many as fit."""
    rng = np.random.default_rng(0)
    pairs = [Pair(*(rng.integers(0, 32000, n) for n in (170, 320, 290)))] * (tokens // 778)
    return packing.pack_pairs(pairs, list(range(len(pairs))))


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget a file, so that reading it reads the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=1556, help="of a step: pairs of 778 tokens")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to write [a temporary folder]")
    parser.add_argument("--json", type=Path, help="append the figures as a line")
    o = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="checkpoints.", dir=o.out))
    torch.manual_seed(0)
    ranks = group.start()
    model = fsdp.build(shape(o.width, o.layers), ranks, "fp32")
    initialise(model, 0)
    optimizer = optim.adamw(model, 0.0)
    work = batch(o.tokens).to(ranks.device)
    size = 12 * sum(p.numel() for p in model.parameters())

    def step() -> None:
        (losses.sft(model(work)) / len(work.targets_N)).backward()
        optim.step(optimizer, 1e-6, 1.0)

    def folder(name: str, **changes) -> Run:
        c = DPOConfig(model="none", data=("none",), out=str(place / name), keep=1)
        return Run(replace(c, **changes), {}, ranks)

    step()
    plain = statistics.median(seconds(step) for _ in range(4))
    behind, at_once = folder("async"), folder("sync", save_async=False)
    stalls, sealed, during = [], [], []
    for k in range(o.saves + 1):
        began = time.perf_counter()
        stalls.append(seconds(lambda k=k: behind.save(k, model, optimizer)))
        during.append(seconds(step))
        behind.wait()
        sealed.append(time.perf_counter() - began)
    sync = [seconds(lambda k=k: at_once.save(k, model, optimizer)) for k in range(2)]
    last = checkpoint.complete(at_once.out)[-1]
    files = sorted(last.glob("*.safetensors"))
    written = sum(path.stat().st_size for path in files)

    copies = {p: torch.empty_like(p) for p in model.parameters()}
    copy = 3 * seconds(lambda: [to.copy_(p) for p, to in copies.items()])  # masters and moments
    copies.clear()
    for path in files:
        drop_cache(path)
    read = seconds(lambda: [path.read_bytes() for path in files])
    summed = seconds(lambda: [hashlib.sha256(path.read_bytes()) for path in files]) - read
    wrote = sum(seconds(partial(write, place / "raw", path.read_bytes())) for path in files)
    for path in files:
        drop_cache(path)
    at_once.folder = last
    loaded = seconds(lambda: at_once.load(model, optimizer))

    # the first asynchronous save also makes the buffers that the next ones use again
    stall, total = statistics.median(stalls[1:]), statistics.median(sealed[1:])
    share = FULL * 12 / RANKS / size
    figures = {
        "parameters": size // 12,
        "bytes": size,
        "step_s": plain,
        "stall_s": stall,
        "stall_first_s": stalls[0],
        "stall_steps": stall / plain,
        "step_while_writing_s": statistics.median(during[1:]),
        "sealed_s": total,
        "sync_s": min(sync),
        "load_s": loaded,
        "copy_s": copy,
        "write_s": wrote,
        "read_s": read,
        "sha256_s": summed,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    print(
        f"{size / 12e6:.0f} M parameters, {size / GIB:.2f} GiB of state, {written / GIB:.2f} GiB "
        f"written; a step of {len(work.tokens_T)} tokens takes {plain:.2f} s"
    )
    print(
        f"asynchronous  training stands {stall:.2f} s, {stall / plain:.1%} of a step (the first "
        f"time {stalls[0]:.2f} s); sealed after {total:.2f} s; a bare copy takes {copy:.2f} s"
    )
    print(
        f"synchronous   {min(sync):.2f} s; a bare write and fsync {wrote:.2f} s, sha256 "
        f"{summed:.2f} s"
    )
    print(f"load          {loaded:.2f} s with its sums checked; a bare read {read:.2f} s")
    print(
        f"by bytes, one of eight ranks with Mistral-7B has {share:.1f} x as many: on this "
        f"machine {share * stall:.1f} s of stall, {share * total:.1f} s to the seal"
    )
    about = read_json(behind.out / "run.json")
    figures |= {name: about[name] for name in ("started", "device", "commit")}
    if o.json:
        with o.json.open("a") as file:
            file.write(json.dumps(figures) + "\n")
    shutil.rmtree(place)
    group.finish()


if __name__ == "__main__":
    main()

"""DPO of a random Mistral-7B on one GPU, side by side with others: `make bench-7b`.

    python -m benchmarks.dpo_7b                                     one H200, under ten minutes
    python -m benchmarks.dpo_7b --contenders trl-tuned              as long again
    python -m benchmarks.dpo_7b --contenders lora trl-lora          with adapters of rank 128
    python -m benchmarks.dpo_7b --shape tiny --steps 3 --batch 4    a CPU, in two or three

    ours      train_dpo.py from its command line
    control   the same, with transformers' Mistral, each response behind a prompt of its own, and
              logits, log_softmax and loss as a textbook has them: what our tricks are worth
    trl       DPOTrainer with its defaults, of which the fused head is one since 1.15: padded,
              recomputing, bf16 autocast over fp32 weights
    trl-tuned the same, with the pairs of a step in the order of their lengths: less is padded
    lora      train_dpo.py with the adapters, and for the memory, of the recipe zephyr-7b-dpo-lora
    trl-lora  trl with PEFT's adapters beside weights that are bf16 if it computes in bf16

All get the same starting weights, adapters' too, and in the same batches the same pairs: random
ids, of the lengths that UltraFeedback has. Losses that differ at any step fail the run, with
adapters and without for themselves; running out of memory is a result. OUT/dpo_7b.jsonl gets a line
for each contender, and one that has its line there or in benchmarks/h200, of the same flags,
machine and code, is not run again.

TRL at 7b, in the 140 GiB of an H200: weights, gradients and moments in fp32 are 108, autocast's
bf16 weights 13.5. A reference that stays leaves nothing for activations, so its log-probs are
precomputed; smaller shapes keep it, as TRL does. A bf16 model would fit with one, but at such
learning rates nearly all its updates round to nothing: not the same training.

A machine without a network gets TRL as wheels, in a folder that git ignores:
    pip download --no-deps --python-version 3.12 -d wheels trl datasets dill multiprocess peft
    pip install --no-deps --no-index --find-links wheels trl datasets dill multiprocess peft
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import vs_trl
from benchmarks.gpu import GRACE, MINUTES, ROOT, Part, attempt
from benchmarks.vs_trl import SIZES, TOLERANCE, VOCABULARY, WARM_UP
from zephyr import config, lora, packing, reference
from zephyr.data import arrays, batching
from zephyr.data.batching import PairSteps
from zephyr.distributed import fsdp
from zephyr.distributed.machine import tune_allocators
from zephyr.metrics import means
from zephyr.packing import pack_pairs
from zephyr.plan import costs
from zephyr.run.folder import Run
from zephyr.weights import adapter, base, config_json, hub, locate, masters

KEPT, FILE = ROOT / "benchmarks" / "h200", "dpo_7b.jsonl"
PAIRS = 61_135  # of UltraFeedback, an epoch
SPREAD = 0.32  # of a starting matrix's outputs where its inputs spread by 1
# what an H200 holds at 7b: 12 bytes for each weight, and 16k tokens without repeating a matmul
OWN = {"7b": "--masters split --adam-state bf16 --recompute elementwise --microbatch-tokens 16384"}
# each with the modules without which it is left out, and the seconds it may take. Together they are
# more than ten minutes: one that is cut short leaves nothing, one that had no turn has another call
CONTENDERS = {
    "ours": Part("train_dpo.py", 300, ()),
    "control": Part("transformers' Mistral in train_dpo.py", 300, (), ("transformers",)),
    "trl": Part("DPOTrainer", 330, (), ("trl", "datasets")),
    "trl-tuned": Part("DPOTrainer, pairs by length", 330, (), ("trl", "datasets")),
    "lora": Part("train_dpo.py with adapters", 300, ()),
    "trl-lora": Part("DPOTrainer with PEFT's adapters", 330, (), ("trl", "datasets", "peft")),
}
ADAPTED = ["lora", "trl-lora"]  # who is compared with each other, and not with the rest
LORA = "zephyr-7b-dpo-lora"  # the recipe of `lora`
DEFAULT = ["ours", "control", "trl"]  # what ten minutes are enough for
COLUMNS = {
    "pairs/s": ("pairs_per_second", 3),
    "tokens/s": ("tokens_per_second", 0),
    "unshared": ("unshared_per_second", 0),
    "MFU": ("mfu", 3),
    "MFU unshared": ("unshared_mfu", 3),
    "peak GiB": ("peak_gib", 2),
    "reference s": ("reference", 1),
    "hours": ("hours", 2),
}
# prompt/chosen/rejected: one of each 64th of AlpacaEval's pairs, ordered by length, in Mistral's
# tokens and Zephyr's template; scaled to UltraFeedback's means after the cut to 512 and 1024
LENGTHS = """
130/22/12 117/28/33 97/88/27 197/29/20 77/123/86 194/48/55 122/164/33 139/85/109 97/138/103
132/189/49 394/4/8 162/148/96 177/27/203 105/239/89 115/310/14 222/176/58 112/320/38
304/88/100 172/42/331 107/150/288 125/222/217 95/317/152 82/398/121 95/315/202 159/118/347
122/142/370 132/404/135 102/418/153 154/397/123 87/428/190 152/379/196 135/305/314 244/129/384
152/423/199 177/413/206 122/512/170 135/439/252 267/301/271 95/374/390 87/504/296 110/368/409
174/328/391 202/600/96 135/496/341 451/214/315 95/422/523 179/380/484 90/489/472 199/422/462
90/431/584 164/451/496 512/100/512 92/558/475 199/408/588 207/512/512 234/512/512 112/647/503
102/359/819 182/451/649 735/283/276 194/662/519 232/588/649 172/631/757 127/812/778
"""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags. Raises ValueError for a mistaken one, those for train_dpo.py included."""
    about, _, notes = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        "python -m benchmarks.dpo_7b",
        description=about,
        epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    home = KEPT if torch.cuda.is_available() else ROOT / "benchmarks" / "cpu"
    out = Path(os.environ.get("OUT") or home)
    add = parser.add_argument
    add("--shape", choices=SIZES, default="7b", help="of the random Mistral [7b]")
    add("--steps", type=int, default=5, help=f"optimizer steps; {WARM_UP} are warm-up [5]")
    add("--batch", type=int, default=128, help="pairs per optimizer step [recipe B's, 128]")
    usual = "bf16" if torch.cuda.is_available() else "fp32"  # many a CPU has no bf16 to speak of
    add("--precision", choices=TOLERANCE, default=usual, help=f"[{usual}]")
    add("--lr", type=float, help="constant [1e-5 / 256 x width: the losses move, none flies off]")
    add("--lora-lr", type=float, help="of adapters [8 x --lr: at 7b it is the recipe's 5e-6]")
    some = " ".join(DEFAULT)
    add("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT, help=f"[{some}]")
    add("--ours", help=f"more flags of train_dpo.py, in quotes [at 7b {OWN['7b']}]")
    add("--control", help="likewise [as --ours]")
    add(
        "--lora", default="", help=f"likewise; {LORA} is the recipe, and trl-lora's adapters follow"
    )
    add("--trl-pairs", type=int, help="per_device_train_batch_size [4, or --batch if less]")
    add("--trl-reference", choices=("live", "cached"), help="[live; at 7b cached]")
    add("--minutes", type=float, default=MINUTES, help=f"in all [{MINUTES}]")
    add("--again", action="store_true", help="run those, too, that have a result")
    add("--out", type=Path, default=out, help=f"folder of the results [{out}]")
    # of a child: run the one contender here, and write what is found to this file
    add("--found", type=Path, help=argparse.SUPPRESS)

    def error(message: str) -> None:
        raise ValueError(f"{message}; --help lists the flags")

    parser.error = error
    o = parser.parse_args(argv)
    if o.steps <= WARM_UP:
        raise ValueError(f"--steps {o.steps} must be above {WARM_UP}, the steps of the warm-up")
    o.trl_pairs = min(4, o.batch) if o.trl_pairs is None else o.trl_pairs
    if min(o.batch, o.trl_pairs) < 1 or o.batch % o.trl_pairs:
        raise ValueError(f"--batch {o.batch} must be a multiple of --trl-pairs {o.trl_pairs}")
    if not o.minutes > 0:
        raise ValueError(f"--minutes {o.minutes} must be above 0")
    o.lr = o.lr or 1e-5 * SIZES["tiny"][0] / SIZES[o.shape][0]
    o.lora_lr = o.lora_lr or 8 * o.lr
    if o.ours is None:
        o.ours = OWN.get(o.shape, "") if o.precision == "bf16" else ""
    o.control = o.ours if o.control is None else o.control
    o.trl_reference = o.trl_reference or ("cached" if o.shape == "7b" else "live")
    for name in ("ours", "control", "lora"):
        try:
            found = settings(o, name)
        except ValueError as mistake:
            raise ValueError(f"--{name}: {mistake}") from None
        if bool(found.lora_rank) != (name == "lora"):
            rank = found.lora_rank
            raise ValueError(f"--{name}: --lora-rank is {rank}; adapters are for --lora alone")
    return o


def flags(o: argparse.Namespace, place: Path, name: str) -> list[str]:
    """train_dpo.py's. Without smoothing `robust` is DPO's loss, in plain torch ops."""
    kind = {"control": ["--loss", "robust"], "lora": [LORA, "--log-every", "1"]}.get(name, [])
    return vs_trl.flags(o, place, o.precision, *kind, *shlex.split(getattr(o, name)))


def settings(o: argparse.Namespace, name: str) -> config.DPOConfig:
    """What train_dpo.py makes of its flags, of which the paths do not count here."""
    return config.parse(config.DPOConfig, flags(o, Path(), name))[0]


def rate(o: argparse.Namespace, name: str) -> float:
    """The contender's learning rate."""
    return o.lora_lr if name in ADAPTED else o.lr


def start(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The starting values of a parameter, in fp32: an adapter's are `lora.initial`."""
    if lora.is_adapter(name):
        return lora.initial(name, shape, config.DPOConfig.seed).to(device)
    return drawn(name, shape, device)


def drawn(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """The starting values of the parameter of that name, in fp32: ones for a norm, else normal
    numbers of a seed that is the name's own, so in whatever order they are made each contender's
    bits are equal.

    Their spread is SPREAD / √inputs. With 0.02 at every width, each of 7b's wide layers would
    enlarge the roundings before it: ours and transformers' log-probs of a token, in a CPU's bf16
    over all 32 layers, differ by 0.067 nats. The mean loss of 128 pairs, of two responses of 305
    tokens with a reference each, would then differ by beta / 2 * 0.067 * √(2 * 2 * 305 / 128) =
    0.010, twice what TOLERANCE allows. With SPREAD these are 0.0031 nats and 0.0005.
    """
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).normal_(
        std=SPREAD / shape[-1] ** 0.5, generator=generator
    )


def tokens(count: int):
    """`count` pairs of random ids as zephyr.data's Tokens. Each 64 have the lengths of LENGTHS, in
    some order; chosen responses have smaller ids, so that there is something to learn."""

    random = np.random.default_rng(0)
    known = np.array([[int(n) for n in pair.split("/")] for pair in LENGTHS.split()])
    rounds = [random.permutation(len(known)) for _ in range(-(-count // len(known)))]
    lengths = known[np.concatenate(rounds)[:count]].ravel()
    share = random.random(lengths.sum())
    chosen = np.repeat(np.tile([False, True, False], count), lengths)
    special = 3  # ids that are no text
    ids = special + (VOCABULARY - special) * np.where(chosen, share**4, share)
    places = np.stack([np.zeros(count), np.arange(count) + 1], 1).astype(np.int64)
    return arrays.Tokens(
        ids.astype(np.uint16),
        np.zeros(1, bool),
        lengths.cumsum().reshape(-1, 3),
        "random",
        {"kept": count, "rows": count},
        "",
        places,
        ("random",),
    )


def plan(o: argparse.Namespace, data):
    """Which of the pairs each step has, as train_dpo.py plans it."""
    return PairSteps(data, o.batch, 1 << 30, config.DPOConfig.seed, rank=0, world=1)


def apart(pairs: list, numbers: list[int]):
    """Pairs as one row in which each response stands behind a prompt of its own."""

    responses = [r for pair in pairs for r in pair[1:]]
    prompts = np.repeat(np.arange(len(pairs)), 2)
    pieces = []
    for k, response in zip(prompts, responses, strict=True):
        ids = np.concatenate([pairs[k].prompt, response])
        pieces.append((ids, np.arange(len(ids)) >= len(pairs[k].prompt), k))
    sizes = torch.tensor([len(r) for r in responses])
    response_N = torch.arange(len(responses)).repeat_interleave(sizes)
    row = packing.pack_documents(pieces)
    return replace(row, response_N=response_N, pairs=torch.tensor(numbers), documents=())


def work(o: argparse.Namespace) -> list[dict[str, float]]:
    """Of each step the tokens and FLOPs that it takes, prompts shared and not: no padding, no
    recomputation, no reference, and no gradient of frozen weights. See costs.model_flops."""

    data, shape, steps = tokens(o.steps * o.batch), vs_trl.architecture(o.shape), []
    order = plan(o, data)
    thin = costs.adapters(settings(o, "lora")) if o.contenders[0] in ADAPTED else None
    for step in range(o.steps):
        numbers = order.step(step).tolist()
        pairs = [data.pair(k) for k in numbers]
        shared, unshared = (means.work(shape, p(pairs, numbers), thin) for p in (pack_pairs, apart))
        steps.append(
            {
                "tokens": shared["tokens"],
                "flops": shared["flops"],
                "unshared": unshared["tokens"],
                "unshared_flops": unshared["flops"],
            }
        )
    return steps


def ours(o: argparse.Namespace, place: Path) -> dict:
    """train_dpo.py with pairs and weights made here."""

    made, calls, live = tokens(o.steps * o.batch), [], reference.live

    @torch.no_grad()
    def load(_, model: nn.Module, seed: int) -> None:
        for name, p in model.named_parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            masters.fill(p, local, start(name, p.shape, local.device))

    def measured(model: nn.Module):
        spent = []
        timed = vs_trl.timed(live(model), spent)

        def call(batch) -> Tensor:
            sums = timed(batch)
            calls.append((len(batch.pairs), spent[-1]))
            return sums

        # of the control's head a compiler makes another graph where no gradient is wanted
        return reference.Reference(call, exact=o.contenders[0] != "control")

    # on the device: 29 GB of files would be minutes of a lease on their way there, and writing the
    # result to a disk and taking the digest of files as many
    hub.load, hub.digest, Run.export = load, lambda _: "random", lambda *_: None
    base.look = lambda c: (c, config_json.read(c.model), SimpleNamespace(), [])
    locate.weight_files = lambda _: ([], None)
    arrays.preferences, reference.live = lambda *_: made, measured
    return vs_trl.script(o, place, flags(o, place, o.contenders[0])) | {"calls": calls}


class Apart(arrays.Tokens):
    """Tokens whose pairs are packed by `apart`."""

    def pair_lengths(self) -> np.ndarray:
        prompts = np.diff(self.ends.ravel(), prepend=0)[0::3]
        return super().pair_lengths() + prompts


def control(o: argparse.Namespace, place: Path) -> dict:
    """`ours` with another model, other rows and another objective."""
    from transformers import AutoConfig, MistralForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, q_BHTE, k_BKTE, v_BKTE, mask, *, layout, sliding_window=None, **_):
        q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (q_BHTE, k_BKTE, v_BKTE))
        return layout.attend(q_THE, k_TKE, v_TKE, module.layer_idx, sliding_window)[None], None

    def head(h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        return -nn.functional.cross_entropy((h_ND @ w_VD.T).float(), targets_N, reduction="none")

    ALL_ATTENTION_FUNCTIONS.register("packed", attend)
    theirs = AutoConfig.from_pretrained(place / "base")
    theirs._attn_implementation = "packed"
    if torch.cuda.is_available():
        head = torch.compile(head, dynamic=True)

    class Control(MistralForCausalLM):
        def __init__(self, _):
            super().__init__(theirs)

        def to_empty(self, *, device):
            super().to_empty(device=device)
            # its frequencies are in no file, and bf16 would be too coarse for them
            self.model.rotary_emb = type(self.model.rotary_emb)(theirs).to(device)
            return self

        def forward(self, batch) -> Tensor:
            h_TD = self.model(
                batch.tokens_T[None],
                position_ids=batch.layout.position_T[None],
                use_cache=False,
                layout=batch.layout,
            ).last_hidden_state[0]
            return head(h_TD[batch.predict_N], self.lm_head.weight, batch.targets_N)

    fsdp.Mistral, batching.pack_pairs, arrays.Tokens = Control, apart, Apart
    fsdp.fuse_matmuls, fsdp.FUSED = lambda _: None, fsdp.MATMULS  # its blocks are not ours
    return ours(o, place)


def trl(o: argparse.Namespace, place: Path) -> dict:
    """DPOTrainer, given models made here."""
    import trl.trainer.dpo_trainer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    thin = lora.spec(settings(o, "lora")) if o.contenders[0] in ADAPTED else None
    frozen = torch.bfloat16 if thin and o.precision == "bf16" else torch.float32
    tune_allocators()  # as the others do

    @torch.no_grad()
    def build() -> nn.Module:
        with device:
            shape = AutoConfig.from_pretrained(place / "base")
            model = AutoModelForCausalLM.from_config(shape, dtype=frozen)
        for name, p in model.named_parameters():
            p.copy_(start(name, p.shape, device))
        return model

    trl.trainer.dpo_trainer.get_peft_model = adapted

    # on a CPU and for the same reason: it names a cache that nobody will look for
    trl.trainer.dpo_trainer.hash_module = lambda _: "random"
    data = tokens(o.steps * o.batch)
    order, cached = plan(o, data), o.trl_reference == "cached"
    batches = [[data.pair(k) for k in order.step(step)] for step in range(o.steps)]
    if o.contenders[0] == "trl-tuned":
        # a sequence is padded to the longest of its micro-batch; a step's pairs stay the same
        batches = [sorted(b, key=lambda p: len(p[0]) + max(map(len, p[1:]))) for b in batches]
    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, "<unk>"))
    return vs_trl.trainer(
        o,
        build(),
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="</s>"),
        batches,
        None if cached or thin else build(),  # without adapters the model is its reference
        peft_config(thin) if thin else None,
        output_dir=str(place / "run"),
        bf16=o.precision == "bf16",
        per_device_train_batch_size=o.trl_pairs,
        precompute_ref_log_probs=cached,
    )


def peft_config(spec: lora.Spec):
    """PEFT's for the same adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        use_rslora=spec.rslora,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def adapted(model: nn.Module, wanted) -> nn.Module:
    """peft.get_peft_model, but the adapters start from the values that ours start from."""
    from peft import get_peft_model

    wrapped = get_peft_model(model, wanted)
    for name, p in wrapped.named_parameters():
        if p.requires_grad:
            ours = name.removeprefix(adapter.PREFIX).replace(".default.", ".")
            p.copy_(start(ours, p.shape, p.device))
    return wrapped


def child(o: argparse.Namespace) -> None:
    """Run the one contender in this process, and write what is found, if only that the memory ran
    out."""

    with tempfile.TemporaryDirectory(prefix="dpo_7b-") as folder:
        place = Path(folder)
        os.environ |= {"ZEPHYR_CACHE": folder, "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        (place / "base").mkdir()
        config_json.write_config(place / "base", vs_trl.architecture(o.shape), "float32", {})
        try:
            name = o.contenders[0]
            o.lr = rate(o, name)
            side = trl if name.startswith("trl") else control if name == "control" else ours
            cuda = torch.cuda.is_available()
            peak = means.peak_flops(torch.cuda.get_device_name()) if cuda else None
            found = rates(o, side(o, place), peak)
        except (torch.OutOfMemoryError, MemoryError) as error:
            found = {"error": f"out of memory: {str(error).partition('. ')[0]}"}
        o.found.write_text(json.dumps(vs_trl.with_peak(found)))


def rates(o: argparse.Namespace, r: dict, peak: float | None) -> dict:
    """A result with medians over the steps after the warm-up, of a device of `peak` FLOP/s, and the
    hours of an epoch: of its steps and, where log-probs of the reference are computed apart, of
    that, at the pace after as many calls."""
    steady = list(zip(r["seconds"], work(o), strict=True))[WARM_UP:]
    r["pairs_per_second"] = statistics.median(o.batch / s for s, _ in steady)
    for name, key in (("tokens", "flops"), ("unshared", "unshared_flops")):
        r[f"{name}_per_second"] = statistics.median(w[name] / s for s, w in steady)
        if peak:
            share = statistics.median(w[key] / s for s, w in steady) / peak
            r["mfu" if name == "tokens" else "unshared_mfu"] = share
    calls = r["calls"] if r["reference"] else []
    pairs, seconds = np.sum(calls[WARM_UP:] or calls or [(1, 0.0)], 0)
    r["hours"] = PAIRS / 3600 * (1 / r["pairs_per_second"] + float(seconds / pairs))
    return r


def about(o: argparse.Namespace, name: str, machine: dict) -> dict:
    """What a contender's result depends on: one whose `about` is equal stands for a new run."""
    trls = f"{o.trl_pairs} pairs, {o.trl_reference}"
    own = trls if name.startswith("trl") else getattr(o, name)
    own += f", --lora {o.lora}" * (name == "trl-lora")
    # the host of a GPU may be another the next time
    same = {k: v for k, v in machine.items() if not (machine["gpu"] and k in ("cpu", "cores"))}
    given = {k: getattr(o, k) for k in ("shape", "steps", "batch", "precision")}
    return {"contender": name, "own": own, **given, "lr": rate(o, name), **same}


def earlier(o: argparse.Namespace) -> list[dict]:
    """The results there are, the newest last. Raises ValueError for a line that is none."""
    rows = []
    for path in dict.fromkeys((KEPT / FILE, o.out / FILE)):
        lines = path.read_text().splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
                rows[-1]["about"], rows[-1]["found"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}:{number} is no result; delete the line") from None
    return rows


def compare(o: argparse.Namespace) -> str:
    """Run who has no result yet and print the table; returns what is wrong."""
    began, machine = time.monotonic(), vs_trl.alone(vs_trl.machine)
    print(*(f"{k} {v}" for k, v in machine.items()), sep="  ", flush=True)
    o.out.mkdir(parents=True, exist_ok=True)
    known = [] if o.again else earlier(o)
    results, ends = {}, {}
    for name in o.contenders:
        this = about(o, name, machine)
        same = [row["found"] for row in known if row["about"] == this]
        if not same:
            left = 60 * o.minutes - (time.monotonic() - began) - GRACE
            same, ends[name] = run(o, name, left)
            with (o.out / FILE).open("a") as file:
                file.writelines(json.dumps({"about": this, "found": r}) + "\n" for r in same)
        if same:
            results[name] = same[-1]
    ran = {name: r for name, r in results.items() if "error" not in r}
    groups = {
        "": {name: r for name, r in results.items() if name not in ADAPTED},
        " with adapters": {name: r for name, r in results.items() if name in ADAPTED},
    }
    for kind, group in groups.items():
        if group:
            lines = vs_trl.table(group, COLUMNS, ("control", "trl"))
            print(f"\n{o.shape} {o.precision}{kind}\n{lines}")
    for name in (name for name, r in ran.items() if "phases" in r):
        print(f"{name}:", *(f"{k} {v:.3g}" for k, v in ran[name]["phases"].items()), sep="  ")
    for name, end in ends.items():
        print(f"{name}: {end}", flush=True)
    bad = [
        f"{name} {end}"
        for name, end in ends.items()
        if name not in results and not end.startswith("left out: it needs")
    ]
    for group in groups.values():
        same = {name: ran[name] for name in group if name in ran}
        bad += [vs_trl.verdict(same, o.precision)] if same else []
    return "; ".join(filter(None, bad))


def run(o: argparse.Namespace, name: str, left: float) -> tuple[list[dict], str]:
    """The contender's result, in a list that is empty if there is none, and how it ended."""
    print(f"\n== {name}: {CONTENDERS[name].about}", flush=True)
    given = {k: v for k, v in vars(o).items() if k not in ("contenders", "again", "found")}
    argv = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    with (o.out / "dpo_7b.log").open("a") as log, tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = ("-m", "benchmarks.dpo_7b", *argv, f"--found={found}", "--contenders", name)
        part = CONTENDERS[name]._replace(command=command)
        end = attempt(part, o.out, min(part.seconds, left), log)
        return ([json.loads(found.read_text())], "ok") if found.exists() else ([], end)


def main(argv: list[str] | None = None) -> None:
    try:
        o = parse(argv)
        wrong = child(o) if o.found else compare(o)
    except (ValueError, OSError) as error:
        print(f"dpo_7b: {error}", file=sys.stderr)
        sys.exit(2)
    if wrong:
        sys.exit(f"dpo_7b: {wrong}")


if __name__ == "__main__":
    main()

"""One frozen flat dataclass per script: defaults < recipe.toml < --flags.

The comment behind each field is its `--help`. A recipe holds the tables [sft] and [dpo] with these
names as keys; an unknown key, in a flag or a recipe, is an error.
"""

import argparse
import dataclasses
import inspect
import json
import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from zephyr.architecture import PROJECTIONS
from zephyr.files import home, plain, shown

RECIPES = Path(__file__).parent / "recipes"
PATHS = {"model", "base", "data", "eval_data", "out"}
LARGEST_RANK = 4096  # of adapters: the width of a 7 B model
KNOBS = (
    "epochs",
    "microbatch_tokens",
    "clip",
    "log_every",
    "batch",
    "lr",
    "max_length",
    "timeout",
    "replicas",
)
# what transformers' and TRL's trainers call a setting, and what says it here
ELSEWHERE = {
    "model-name-or-path": "--model",
    "dataset-name": "--data, which takes files",
    "output-dir": "--out",
    "learning-rate": "--lr",
    "per-device-train-batch-size": "--batch, of a whole step, with --microbatch-tokens for memory",
    "per-device-eval-batch-size": "--microbatch-tokens",
    "gradient-accumulation-steps": "--batch, of a whole step, with --microbatch-tokens for memory",
    "gradient-checkpointing": "--recompute",
    "num-train-epochs": "--epochs",
    "max-steps": "--steps",
    "warmup-ratio": "--warmup",
    "lr-scheduler-type": "--schedule",
    "max-grad-norm": "--clip",
    "bf16": "--precision bf16",
    "dtype": "--precision",
    "torch-dtype": "--precision",
    "logging-steps": "--log-every",
    "eval-steps": "--eval-every",
    "save-steps": "--save-every",
    "save-total-limit": "--keep",
    "resume-from-checkpoint": "--resume, which is automatic: give the same command again",
    "loss-type": "--loss, whose dpo is sigmoid there",
    "precompute-ref-log-probs": "--reference cached, the default",
    "assistant-only-loss": "--train-on assistant",
    "use-peft": "--lora-rank",
    "lora-r": "--lora-rank",
    "lora-target-modules": "--lora-targets",
    "use-rslora": "--lora-rslora",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings that both stages share."""

    model: str  # Hugging Face folder to start from: config.json, safetensors, tokenizer.model
    base: str | None = None  # if --model is a LoRA adapter: its base, where its config is wrong
    data: tuple[str, ...]  # training files: .jsonl .json (.gz) .parquet; several, or a glob
    out: str  # run folder: config.toml, run.json, metrics.jsonl, checkpoints/, model/
    eval_data: tuple[str, ...] = ()  # held-out files, read as --data is
    epochs: int = 1  # passes over the data
    steps: int | None = None  # optimizer steps, instead of --epochs
    microbatch_tokens: int | Literal["auto"] = 16384  # tokens of a micro-batch; auto: fits
    schedule: Literal["linear", "cosine", "constant"] = "cosine"  # lr after warm-up, down to 0
    warmup: float = 0.1  # share of the steps over which lr rises from 0
    weight_decay: float = 0.0  # AdamW's, on matrices only
    clip: float = 1.0  # largest global gradient norm
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # to compute in; auto: bf16 if fast
    recompute: Literal["none", "elementwise", "full", "auto"] = "none"  # activation checkpointing
    masters: Literal["fp32", "split"] = "fp32"  # split: bf16 weights, and the masters' lower halves
    adam_state: Literal["fp32", "bf16"] = "fp32"  # AdamW's moments; bf16 saves 4 bytes a weight
    lora_rank: int = 0  # freeze the model, and train adapters of this rank beside it; 0: no LoRA
    lora_alpha: int | None = None  # adapters count alpha / rank times; by default the rank: once
    lora_targets: str = ",".join(PROJECTIONS)  # the matrices that get adapters
    lora_rslora: bool = False  # adapters count alpha / sqrt(rank) times (rsLoRA)
    merge: bool = True  # with LoRA leave model/, where the adapters are added, beside adapter/
    reshard: Literal["auto", "always", "never"] = "auto"  # always is ZeRO-3, never ZeRO-2
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile each block; auto: on a GPU
    deterministic: bool = False  # on a GPU: the same bits in every run, as on a CPU
    empty_system: bool | None = None  # insert one where there is none; by default as --model does
    seed: int = 42  # order of the data
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 100  # steps between evaluations; 0: only the one at the end
    save_every: int = 0  # steps between checkpoints; there is one at the end too; 0: none
    keep: int = 2  # how many of the newest checkpoints to keep; 0: all
    save_async: bool = True  # write checkpoints in the background, from a copy in host memory
    timeout: int = 600  # seconds after which a rank that does not answer ends the run
    replicas: int = 1  # copies of the sharded model, one inside each group of ranks (HSDP)
    profile: int | None = None  # step to trace, counted from 1, into RUN/profile/
    on_nonfinite: Literal["stop", "skip"] = "stop"  # skip: leave the step out, not 3 in a row
    on_bad_row: Literal["stop", "skip"] = "stop"  # skip: drop and list them, up to 1 %
    resume: Literal["auto", "previous", "fresh"] = "auto"  # previous: back to the last intact one

    @property
    def bits(self) -> str:
        """The settings that change the last bits of a log-prob, besides weights and data."""
        lora = ", lora" * (self.lora_rank > 0)
        return f"{self.precision}, masters {self.masters}, compile {self.compile}{lora}"

    def check(self) -> None:
        """Raise ValueError for the first value out of range."""
        for name in KNOBS:
            value = getattr(self, name)
            if value != "auto" and not 0 < value < math.inf:
                raise ValueError(f"{flag(name)} {value} must be finite and above 0")
        if self.masters == "split" and self.precision == "fp32":
            raise ValueError("--masters split is for --precision bf16; an fp32 weight is a master")
        self._check_lora()
        if self.steps is not None and self.steps <= 0:
            raise ValueError(f"--steps {self.steps} must be greater than 0; leave it out for all")
        for name in ("eval_every", "save_every", "keep", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} {getattr(self, name)} must be finite and 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup {self.warmup} must be a share of the steps, 0 <= w < 1")

    def _check_lora(self) -> None:
        if not 0 <= self.lora_rank <= LARGEST_RANK:
            raise ValueError(f"--lora-rank {self.lora_rank} must be from 0 to {LARGEST_RANK}")
        if not self.lora_rank:
            given = {
                "--lora-alpha": self.lora_alpha is not None,
                "--lora-rslora": self.lora_rslora,
                "--lora-targets": self.lora_targets != ",".join(PROJECTIONS),
                "--no-merge": not self.merge,
            }
            for name in (name for name, is_given in given.items() if is_given):
                raise ValueError(f"{name} is for adapters; give --lora-rank too, such as 128")
            return
        if self.lora_alpha is not None and not 0 < self.lora_alpha < 1 << 20:
            raise ValueError(f"--lora-alpha {self.lora_alpha} must be above 0 and below {1 << 20}")
        targets = self.lora_targets.split(",")
        if not set(targets) <= set(PROJECTIONS) or len(targets) > len(set(targets)):
            raise ValueError(
                f"--lora-targets {shown(self.lora_targets)} must be different ones of "
                f"{','.join(PROJECTIONS)}"
            )
        if self.masters == "split":
            raise ValueError(
                "--masters split does not go with --lora-rank: the frozen weights are bf16 as they "
                "are, and an adapter's masters are small; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class SFTConfig(Training):
    """The settings of dSFT. Defaults are those of the alignment handbook's re-run (recipe B)."""

    table: ClassVar[str] = "sft"
    batch: int = 128  # chunks of --max-length tokens per optimizer step, over all ranks
    lr: float = 2e-5  # peak learning rate
    max_length: int = 2048  # tokens in a chunk, into which the conversations are cut
    train_on: Literal["all", "assistant"] = "all"  # tokens whose log-probs make the loss

    def __post_init__(self) -> None:
        self.check()
        if self.microbatch_tokens != "auto" and self.microbatch_tokens < self.max_length:
            raise ValueError(
                f"--microbatch-tokens {self.microbatch_tokens} is less than one chunk of "
                f"--max-length {self.max_length}; use a multiple of it"
            )


@dataclass(frozen=True, kw_only=True)
class DPOConfig(Training):
    """The settings of dDPO. Defaults are those of the alignment handbook's re-run (recipe B)."""

    table: ClassVar[str] = "dpo"
    loss: Literal["dpo", "robust", "ipo", "hinge"] = "dpo"  # the objective, see zephyr/losses.py
    beta: float = 0.01  # larger keeps the policy closer to the reference, Eq. 7 of arXiv:2305.18290
    label_smoothing: float = 0.0  # share of pairs that are labelled the wrong way round
    batch: int = 128  # pairs per optimizer step, over all ranks
    lr: float = 5e-7  # peak learning rate
    max_length: int = 1024  # longest prompt + response, in tokens
    max_prompt_length: int = 512  # tokens that a prompt keeps, its last, when a pair is too long
    reference: Literal["cached", "live"] = "cached"  # live: keep a second, frozen model; LoRA: none

    def __post_init__(self) -> None:
        self.check()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"--beta {self.beta} must be finite and above 0; Zephyr's: 0.1, 0.01")
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"--max-prompt-length {self.max_prompt_length} must be above 0 and below "
                f"--max-length {self.max_length}: the difference is what each response may keep"
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label-smoothing {self.label_smoothing} must be in 0 <= s < 0.5")
        if self.label_smoothing and self.loss not in ("dpo", "robust"):
            raise ValueError(f"--label-smoothing has no meaning for --loss {self.loss}; use 0")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@cache
def comments(cls: type) -> dict[str, str]:
    """Return the comment behind each field, from the source of `cls` and its parent."""
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))


def parse(cls: type, argv: list[str] | None = None, doc: str = "") -> tuple[Any, str]:
    """Return the config from `[RECIPE] [--flag value]...`, and the recipe's name.

    RECIPE is a name or the path of a .toml. Without one it is `tiny`, but with a --model of the
    user's own there is none: what `tiny` sets would harm a large model.

    Raises ValueError for an unknown recipe or key, a value of the wrong type or out of range, and a
    missing --model, --data or --out.
    """
    fields, helps = {f.name: f for f in dataclasses.fields(cls)}, comments(cls)
    parser = _parser(cls, doc)
    tables = {path.stem: tomllib.loads(path.read_text()) for path in RECIPES.glob("*.toml")}
    names = ", ".join(sorted(name for name, recipe in tables.items() if cls.table in recipe))
    parser.add_argument("recipe", nargs="?", help=f"{names}, or the path of a .toml [tiny]")
    flags = _parsed(parser, argv)
    recipe = flags.pop("recipe", None) or ("" if "model" in flags else "tiny")
    values = (read_recipe(recipe, cls) if recipe else {}) | flags
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and not values.get(name):
            raise ValueError(f"{flag(name)} is required: {helps[name]}")
    for name in PATHS & values.keys():
        value = values[name]
        values[name] = [home(v) for v in value] if isinstance(value, list) else home(value)
    config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    return config, recipe


def _parser(cls: type, doc: str = "") -> argparse.ArgumentParser:
    """Return a parser with a flag for each field of a config, by its type."""
    hints, helps = get_type_hints(cls), comments(cls)
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
    )
    for field in dataclasses.fields(cls):
        bare = field.default in (dataclasses.MISSING, None, ())
        default = "" if bare else f" [{field.default}]"
        options: dict[str, Any] = {"help": (helps[field.name] + default).replace("%", "%%")}
        kind = hints[field.name]
        if get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        elif words(kind):
            options |= {"type": partial(_number_or, words(kind)), "metavar": "INT|auto"}
        elif scalar(kind) is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"nargs": "+"} if get_origin(kind) is tuple else {}
            options |= {"type": scalar(kind), "metavar": scalar(kind).__name__.upper()}
        parser.add_argument(flag(field.name), **options)
    return parser


def _parsed(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict[str, Any]:
    try:
        given, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(plain(str(error), 300)) from None
    if unknown:
        raise ValueError(f"unknown argument {plain(unknown[0])}; {_known(parser, unknown[0])}")
    return vars(given)


def _known(parser: argparse.ArgumentParser, unknown: str) -> str:
    """Say which flag of the parser an unknown one is, or how to list them."""
    name = unknown.partition("=")[0].lstrip("-").replace("_", "-")
    here = ELSEWHERE.get(name, f"--{name}")
    exists = re.match(r"[\w-]+", here)[0] in parser._option_string_actions
    return f"here it is {here}" if exists else "--help lists what there is"


def read_recipe(recipe: str, cls: type) -> dict[str, Any]:
    """Return the values in a recipe's table for a config. A recipe is a command line kept in a
    file."""
    path = Path(home(recipe)) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ValueError(f"no recipe {recipe}; there are {names}, or give the path of a .toml")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: cannot read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested too deeply
        raise ValueError(f"{path}: {plain(str(error), 200)}") from None
    table = tables.get(cls.table)
    if not isinstance(table, dict):
        raise ValueError(f"{path}: has no [{cls.table}] table; this script wants one")
    hints = {field.name: get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)}
    lists = {}
    for name, value in table.items():
        if name not in hints:
            raise ValueError(f"{path}: [{cls.table}] has an unknown key {shown(name)}")
        many = get_origin(hints[name]) is tuple
        text = isinstance(value, list) and all(isinstance(x, str) for x in value)
        if text != many or isinstance(value, list | dict) != many:
            rule = "a list of texts" if many else "one value"
            raise ValueError(f"{path}: [{cls.table}] {name} = {shown(value)} is not {rule}")
        if many:
            lists[name] = value
    try:
        values = _parsed(_parser(cls), flags_of(table, hints))
    except ValueError as error:
        raise ValueError(f"{path}: [{cls.table}] {error}") from None
    return values | lists


def flags_of(table: dict[str, Any], hints: dict[str, Any]) -> list[str]:
    """The values of a recipe's table as flags, given the types of the fields; lists stay lists.

    {"lr": 5e-7, "empty_system": False, "data": ["a"]} becomes ["--lr=5e-07", "--no-empty-system"].
    """
    flags = []
    for name, value in table.items():
        if scalar(hints[name]) is bool and isinstance(value, bool):
            flags.append(flag(name) if value else flag(f"no_{name}"))
        elif not isinstance(value, list):
            flags.append(f"{flag(name)}={value}")
    return flags


def words(kind: Any) -> tuple[str, ...]:
    """Return the words that may stand for a field's number: `int | Literal["auto"]` ->
    ("auto",)."""
    return tuple(w for a in get_args(kind) if get_origin(a) is Literal for w in get_args(a))


def _number_or(words: tuple[str, ...], text: str) -> int | str:
    if text in words:
        return text
    try:
        return int(text)
    except ValueError:
        rule = " nor ".join(("an int", *words))
        raise argparse.ArgumentTypeError(f"{text!r} is neither {rule}") from None


def scalar(kind: Any) -> type:
    """Return str, int or float of a field's type: `tuple[str, ...]` -> str, `int | None` -> int."""
    inner = [a for a in get_args(kind) if a not in (NoneType, ...)]
    return inner[0] if inner else kind


def to_toml(config: Training) -> str:
    """Return the config as a recipe that reproduces it; None is left out, as TOML has none."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]
    return "\n".join([f"[{config.table}]", *lines, ""])

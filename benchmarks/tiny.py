"""A tiny model, tokenizer and data for the benchmarks that break runs: the same bytes each time."""

from pathlib import Path
from random import Random

import sentencepiece

from zephyr.architecture import MistralConfig
from zephyr.data import readers
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, hub

WORDS = "the cat sat on a mat and the dog ran to it while rain fell over every hill".split()
# rows reach beyond the window, and the vocabulary of 301 divides by no small number of ranks
SHAPE = dict(
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=24,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
# train_dpo.py's flags for it: the losses move, 64 pairs are 8 steps of about 60 ms on a CPU
DPO = (
    "--epochs 1 --batch 8 --lr 1e-3 --warmup 0.2 --beta 0.1 --precision fp32 "
    "--max-length 160 --max-prompt-length 96 --microbatch-tokens 256"
).split()


def tokenizer(folder: Path) -> None:
    """Write a tokenizer.model that knows WORDS."""
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*WORDS, "<|user|> <|assistant|> <|system|>"] * 3),
            model_writer=file,
            vocab_size=301,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            minloglevel=2,
            hard_vocab_limit=False,
            num_threads=1,
        )


def make(folder: Path, pairs: int = 64) -> None:
    """Write folder/base (random weights, tokenizer), and `pairs` rows in pairs.jsonl and in
    chats.jsonl, 5 in test.jsonl."""
    (base := folder / "base").mkdir(parents=True)
    tokenizer(base)
    shape = MistralConfig(vocab_size=Tokenizer(base).vocab_size, **SHAPE)
    # a wide spread, so that a difference in the training shows
    config_json.write_config(base, shape, "float32", {"initializer_range": 0.3})
    hub.fresh(base, seed=0)

    rng = Random(0)

    def said(role: str) -> dict:
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 14)))}

    def rows(count: int) -> list[dict]:
        asks = [said("user") for _ in range(count)]
        return [
            {
                "prompt": ask["content"],
                "chosen": [ask, said("assistant")],
                "rejected": [ask, said("assistant")],
            }
            for ask in asks
        ]

    readers.write_rows(folder / "pairs.jsonl", train := rows(pairs))
    readers.write_rows(folder / "test.jsonl", rows(5))
    readers.write_rows(folder / "chats.jsonl", [{"messages": row["chosen"]} for row in train])

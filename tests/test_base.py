"""What is said of the model folder that a run starts from, before anything is computed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from helpers import pieces, shared
from model_helpers import MISTRAL_7B, folder_of, model, published, put, refused
from zephyr import generate
from zephyr.config import DPOConfig, SFTConfig
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, config_json, hub, tokenizer_json
from zephyr.weights.mistral import convert


def test_rows_above_the_pieces_are_kept_and_never_sampled(tmp_path):
    wide = model(vocab_size=103)
    folder = folder_of(wide, tmp_path / "wide")
    (note,) = base.open_folder(folder).notes
    assert note == (
        f"{folder} has 2 embedding rows above the 101 pieces of its tokenizer.model: padding or "
        "added tokens, which no text becomes; they are kept, and never sampled"
    )
    put(folder, added_tokens__json={"<|im_start|>": 101, "<|im_end|>": 102, "x": 7, "y": "z"})
    (note,) = base.open_folder(folder).notes
    assert "tokenizer.model: added tokens (<|im_end|>, <|im_start|>), which no text" in note
    put(
        folder,
        added_tokens__json={},
        tokenizer__json={"added_tokens": [{"id": 102, "content": "<pad>"}, 3, {"content": []}]},
    )
    assert "added tokens (<pad>), which" in base.open_folder(folder).notes[0]
    (folder / "tokenizer.json").unlink()
    hub.save(wide, tmp_path / "out", folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.lm_head.weight.shape[0] == 103

    with torch.no_grad():
        wide.lm_head.weight[101:] = 9 * wide.lm_head.weight.abs().sum(0)
        wide.model.norm.weight.abs_()
    prompt = [[1, 5, 6]]
    free = torch.tensor(list(generate.stream(wide, prompt, 40, seed=3)))
    kept = torch.tensor(list(generate.stream(wide, prompt, 40, seed=3, pieces=101)))
    assert (free >= 101).any() and (kept < 101).all()


def test_fewer_rows_than_pieces(tmp_path):
    folder = folder_of(model(vocab_size=100), tmp_path / "narrow")
    assert refused(folder) == (
        f"{folder}/tokenizer.model has 101 pieces, the model only 100 embedding rows: it is another"
        f" model's tokenizer; fetch the one that belongs to {folder}"
    )


def settings(folder: Path, **changes) -> DPOConfig:
    c = DPOConfig(model=str(folder), data=("d",), out="o", max_length=64, max_prompt_length=32)
    return replace(c, **changes)


def test_max_length_beyond_the_positions(good):
    assert base.look(settings(good))[0].max_length == 64
    for c in (settings(good, max_length=65), SFTConfig(model=str(good), data=("d",), out="o")):
        with pytest.raises(ValueError) as raised:
            base.look(c)
        assert str(raised.value) == (
            f"--max-length {c.max_length} is beyond the 64 positions that {good} was made for "
            "(max_position_embeddings); use 64 or less"
        )


def test_the_empty_system_message_is_the_folders_own(good):
    def look(**changes) -> tuple[bool, list[str]]:
        c, _, _, notes = base.look(settings(good, **changes))
        return c.empty_system, notes

    assert look() == (True, []) and look(empty_system=False) == (False, [])
    put(good, chat_template__jinja=config_json.chat_template(True))
    assert look() == (True, []) and look(empty_system=True) == (True, [])
    decided, (note,) = look(empty_system=False)
    assert decided is False and note == (
        f"the chat template of {good} inserts an empty system message, this run does otherwise: "
        "--no-empty-system"
    )
    put(good, chat_template__jinja=config_json.chat_template(False))
    decided, (note,) = look()
    assert decided is False and note == (
        f"the chat template of {good} inserts no empty system message, and so does this run: "
        "--no-empty-system"
    )
    assert look(empty_system=False)[0] is False
    decided, (note,) = look(empty_system=True)
    assert decided is True and "this run does otherwise: --empty-system" in note
    put(good, chat_template__jinja="{{ '<|im_start|>' }}")
    assert look() == (
        True,
        [
            f"{good} has a chat template of its own; Zephyr's is used in its place, see "
            "docs/operate/data.md"
        ],
    )


def test_the_bases_own_tokenizer_json(good):
    tokenizer = Tokenizer(good)
    ours = tokenizer_json.build(tokenizer)
    assert base.look(settings(good))[3] == []
    put(good, tokenizer__json=ours)
    assert base.look(settings(good))[3] == []
    pairs = [pair.split(" ") for pair in ours["model"]["merges"]]  # as tokenizers 0.20 on writes
    put(good, tokenizer__json=ours | {"model": ours["model"] | {"merges": pairs}})
    assert base.look(settings(good))[3] == []
    vocab, first = ours["model"]["vocab"], list(ours["model"]["vocab"])[9]
    for change, what in (
        ({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}, "pre_tokenizer"),
        ({"normalizer": None}, "normalizer"),
        ({"model": ours["model"] | {"merges": pairs[::-1]}}, "merges"),
        ({"model": ours["model"] | {"merges": 7}, "normalizer": {}}, "merges, normalizer"),
        ({"model": ours["model"] | {"vocab": vocab | {"new": 101}}}, "vocab"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}, "the kind of model"),
    ):
        put(good, tokenizer__json=ours | change)
        (note,) = base.look(settings(good))[3]
        assert note == (
            f"{good}/tokenizer.json differs from tokenizer.model in {what}, so who reads it may "
            "get other ids; the saved model gets one that gives the ids of training"
        )
    put(good, tokenizer__json=ours | {"model": ours["model"] | {"vocab": vocab | {first: 3}}})
    with pytest.raises(ValueError, match="json gives .* the id 3, tokenizer.model 9: one of them"):
        base.look(settings(good))


def test_mistrals_tokenizer_json_as_converters_write_it(tmp_path):
    """Of its runs of spaces, which all have one score, the longest come first."""
    put(tmp_path, tokenizer__model=shared("mistral/tokenizer.model").read_bytes())
    tokenizer = Tokenizer(tmp_path)
    theirs = tokenizer_json.build(tokenizer)
    merges = [pair.split(" ") for pair in theirs["model"]["merges"]]
    runs = [pair for pair in merges if set("".join(pair)) == {tokenizer_json.SPACE}]
    merges = [pair for pair in merges if pair not in runs] + runs[::-1]
    assert len(runs) > 20 and merges != [x.split(" ") for x in theirs["model"]["merges"]]
    theirs["model"]["merges"] = merges
    put(tmp_path, tokenizer__json=theirs, config__json=MISTRAL_7B)
    assert base.look(settings(tmp_path))[3] == []
    merges[5], merges[6] = merges[6], merges[5]
    put(tmp_path, tokenizer__json=theirs)
    assert "differs from tokenizer.model in merges, so" in base.look(settings(tmp_path))[3][0]


def test_a_tokenizer_that_cannot_be_saved_is_refused_at_the_start(good, tmp_path):
    put(good, tokenizer__model=pieces(101, add_dummy_prefix=False))
    with pytest.raises(ValueError, match="no tokenizer.json gives its ids"):
        base.look(settings(good))
    source = published(tmp_path / "raw", model())
    put(source, tokenizer__model__v1=pieces(101, add_dummy_prefix=False))
    with pytest.raises(ValueError, match="no tokenizer.json gives its ids"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()

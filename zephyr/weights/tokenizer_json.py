"""tokenizer.json: a sentencepiece model as Hugging Face's tokenizers read it, with the same ids.

transformers 4 and 5 make different tokenizers of a tokenizer.model alone. Of this file, under the
class PreTrainedTokenizerFast, both make the one that was trained: text after a special token is a
fresh piece with its own dummy prefix, as zephyr.tokenizer has it.

    "<|user|>\nHi</s>\n"  ->  [1, 523, 28766, 1838, 28766, 28767, 13, 23809, 2, 28705, 13]
"""

from itertools import pairwise, zip_longest

from sentencepiece import SentencePieceProcessor

from zephyr.files import shown
from zephyr.tokenizer import Tokenizer

SPACE = "\u2581"  # what sentencepiece writes for a space
# what distinguishes tokenizers: spaces at the ends and in runs, lines, scripts, bytes, templates
PROBES = (
    "Hello, world!",
    " leading and trailing ",
    "a  b   c      d",
    "\n",
    "\n\n\n  x\t\ty\r\n",
    "<|user|>\nWhat's 1234567890 + 3.14?\n",
    "\n<|assistant|>\nNa\u00efve caf\u00e9 \u2014\u2026",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f",
    "\U0001f600 \u0301",
    "\U0001f468\u200d\U0001f469",
    "\ufb01 \u00bd \uff21 \u2028\u00a0",
    "[INST] hi [/INST]",
    "def f(x):\n    return x ** 2  # \u2190\n",
    "aaaaaaaaaaaaaaaa -------- ========",
)


def build(tokenizer: Tokenizer) -> dict:
    """Return the content of tokenizer.json, in the oldest form that is still read (tokenizers 0.15
    on).

    Raises ValueError unless it gives the sentencepiece model's ids for each of PROBES. It does for
    BPE without a normaliser, as Mistral's and Llama's are.
    """
    sp = tokenizer.sp
    pieces = [sp.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    normal = [i for i in range(len(pieces)) if _is_text(sp, i)]
    merges = _merges([pieces[i] for i in normal], sp.get_score(normal))
    _check(tokenizer, vocab, merges)
    bos, eos = pieces[tokenizer.bos], pieces[tokenizer.eos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # <unk> and other control pieces are left out, so that their text stays text, as in training
        "added_tokens": [
            {
                "id": vocab[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token in (bos, eos)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": "<0x00>" in vocab,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _is_text(sp: SentencePieceProcessor, i: int) -> bool:
    """Return True if a piece is text: no control piece, no byte, not the unknown."""
    return not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i))


def _merges(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Return every way to join two pieces into a third, the best third first. sentencepiece scores
    the piece that results; tokenizers ranks the pair that is joined."""
    order = sorted(range(len(pieces)), key=lambda i: (-scores[i], i))
    known = set(pieces)
    return [
        (whole[:k], whole[k:])
        for whole in (pieces[i] for i in order)
        for k in range(1, len(whole))
        if whole[:k] in known and whole[k:] in known
    ]


def _check(tokenizer: Tokenizer, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    """Raise ValueError unless vocab and merges give the sentencepiece model's ids for PROBES, and
    for every piece that no merge makes, such as a user-defined one."""
    sp, ranks = tokenizer.sp, {pair: k for k, pair in enumerate(merges)}
    made = {left + right for left, right in merges}
    lone = [p for p, i in vocab.items() if len(p) > 1 and p not in made and _is_text(sp, i)]
    for text in (*PROBES, *(p.replace(SPACE, " ") for p in lone)):
        ids, ours = _encode(text, vocab, ranks, sp.unk_id()), tokenizer.encode(text)
        if ids != ours:
            k = next(k for k, (a, b) in enumerate(zip_longest(ids, ours)) if a != b)
            raise ValueError(
                f"{tokenizer.path}: no tokenizer.json gives its ids, so other programs would read "
                f"other ids than are trained: in {shown(text, 20)} {ids[k : k + 4]} instead of "
                f"{ours[k : k + 4]}; it must be BPE without a normaliser and without "
                "user-defined pieces, as Mistral's and Llama's are"
            )


def _encode(text: str, vocab: dict[str, int], ranks: dict, unknown: int) -> list[int]:
    """Return the ids that `build`'s file gives a short text; it is slow for long ones."""
    symbols = list(SPACE + text.replace(" ", SPACE))
    while pairs := [pair for pair in pairwise(symbols) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        k = next(k for k, pair in enumerate(pairwise(symbols)) if pair == best)
        symbols[k : k + 2] = ["".join(best)]
    ids: list[int] = []
    for symbol in symbols:
        bytes_ = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        known = [symbol] if symbol in vocab else bytes_ if bytes_[0] in vocab else []
        ids += [vocab[piece] for piece in known]
        if not known and ids[-1:] != [unknown]:  # unknown characters side by side are one piece
            ids.append(unknown)
    return ids

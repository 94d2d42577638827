"""The model folder that a run starts from, looked at before anything is computed: what of it cannot
be used is refused, and what will be otherwise in the model that is saved is said."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from zephyr import files
from zephyr.architecture import MistralConfig
from zephyr.config import Training, flag
from zephyr.files import shown
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json, locate, tokenizer_json
from zephyr.weights.locate import Parts

TOKENIZER_JSON = "tokenizer.json"


class Base(NamedTuple):
    shape: MistralConfig
    tokenizer: Tokenizer
    empty_system: bool | None  # whether its chat template inserts one; None if it is not Zephyr's
    notes: list[str]  # a line each of what a user should know of it


def look(c: Training) -> tuple[Training, MistralConfig, Tokenizer, list[str]]:
    """Return the settings with `empty_system` decided and an adapter's `base` found, the
    architecture, the tokenizer, and lines that the user should read.

    An empty system message is inserted if the user says so; if the user says nothing, if the
    folder's chat template does so; else as Zephyr does. Raises ValueError if the folder cannot be
    trained, or if --max-length is beyond its positions.
    """
    place = locate.parts(c.model, c.base)
    shape, tokenizer, own, notes = open_folder(place)
    c = replace(c, base=str(place.model) if place.adapter else None)
    if c.max_length > (limit := shape.max_position_embeddings):
        raise ValueError(
            f"--max-length {c.max_length} is beyond the {limit} positions that "
            f"{c.model} was made for (max_position_embeddings); use {limit} or less"
        )
    notes += _tokenizer_json(place.tokenizer, tokenizer)
    notes += _dropout(place)
    decided = next(x for x in (c.empty_system, own, True) if x is not None)
    if own is not None and (decided != own or not decided):
        does = "inserts an empty system message" if own else "inserts no empty system message"
        word = "and so does this run" if decided == own else "this run does otherwise"
        name = flag("empty_system") if decided else flag("no_empty_system")
        notes.append(f"the chat template of {c.model} {does}, {word}: {name}")
    return replace(c, empty_system=decided), shape, tokenizer, notes


def open_folder(folder: str | Path | Parts) -> Base:
    """Return what a model folder, or an adapter with its base, holds besides weights.

    Raises ValueError if config.json or tokenizer.model is missing or cannot be used, or if they do
    not belong together.
    """
    place = locate.parts(folder)
    folder = place.tokenizer
    shape, tokenizer = config_json.read(place.model), Tokenizer(folder)
    notes = _vocabulary(folder, shape, tokenizer)
    own = config_json.empty_system(folder)
    if own is None and config_json.own_template(folder):
        notes.append(
            f"{folder} has a chat template of its own; Zephyr's is used in its place, see "
            "docs/operate/data.md"
        )
    return Base(shape, tokenizer, own, notes)


def _dropout(place: Parts) -> list[str]:
    """Return a line if a run starts from an adapter that was trained with dropout."""
    config = files.read_json(place.adapter / locate.ADAPTER) if place.adapter else {}
    if not (share := config.get("lora_dropout")):
        return []
    return [
        f"{place.adapter} was trained with lora_dropout {shown(share)}; it is added to its base "
        "without, and nothing is dropped out in this run"
    ]


def _vocabulary(folder: Path, shape: MistralConfig, tokenizer: Tokenizer) -> list[str]:
    """Return a line if the model has more embeddings than the tokenizer has pieces. Raises
    ValueError if it has fewer."""
    pieces, rows = tokenizer.vocab_size, shape.vocab_size
    if rows < pieces:
        raise ValueError(
            f"{tokenizer.path} has {pieces} pieces, the model only {rows} embedding "
            "rows: it is another model's tokenizer; fetch the one that belongs to "
            f"{folder}"
        )
    if rows == pieces:
        return []
    names = {i: name for name, i in _added(folder).items() if pieces <= i < rows}
    what = f"added tokens ({files.some(names.values())})" if names else "padding or added tokens"
    return [
        f"{folder} has {rows - pieces} embedding rows above the {pieces} pieces of its "
        f"tokenizer.model: {what}, which no text becomes; they are kept, and never sampled"
    ]


def _added(folder: Path) -> dict[str, int]:
    """Return the tokens that were added to a tokenizer, by their text, as its JSON files say."""
    path = folder / TOKENIZER_JSON
    listed = files.read_json(path).get("added_tokens") if path.exists() else []
    listed = listed if isinstance(listed, list) else []
    found = [(x.get("content"), x.get("id")) for x in listed if isinstance(x, dict)]
    path = folder / "added_tokens.json"
    found += files.read_json(path).items() if path.exists() else []
    return {k: i for k, i in found if isinstance(k, str) and isinstance(i, int)}


def _tokenizer_json(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Return a line if a folder's tokenizer.json differs from its tokenizer.model, as the saved
    model will get one that agrees. Raises ValueError if none can be made, or if the two give a
    piece different ids, as then one of them is another model's."""
    ours = tokenizer_json.build(tokenizer)
    path = folder / TOKENIZER_JSON
    if not path.exists():
        return []
    theirs = files.read_json(path)
    model = theirs.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):
        differs = ["the kind of model"]
    else:
        for piece, i in ours["model"]["vocab"].items():
            if vocab.get(piece, i) != i:
                raise ValueError(
                    f"{path} gives {shown(piece)} the id {shown(vocab[piece])}, "
                    f"tokenizer.model {i}: one of them is another model's; fetch both "
                    "from where the weights are from"
                )
        differs = ["vocab"] if vocab.keys() != ours["model"]["vocab"].keys() else []
        same = _same_merges(model.get("merges"), ours["model"]["merges"], tokenizer)
        differs += [] if same else ["merges"]
    differs += [key for key in ("normalizer", "pre_tokenizer") if theirs.get(key) != ours[key]]
    if not differs:
        return []
    return [
        f"{path} differs from tokenizer.model in {', '.join(differs)}, so who reads it may "
        "get other ids; the saved model gets one that gives the ids of training"
    ]


def _same_merges(theirs: object, ours: list[str], tokenizer: Tokenizer) -> bool:
    """Return True if merges are the same pairs, "a b" or ["a", "b"], with the best-scored results
    first.

    Among equal scores, such as those of Mistral's runs of spaces, converters differ in the order,
    and the ids do not.
    """
    try:
        pairs = [tuple(x.split(" ") if isinstance(x, str) else x) for x in theirs]
        if set(pairs) != {tuple(x.split(" ")) for x in ours}:
            return False
    except TypeError:
        return False
    made = [tokenizer.sp.piece_to_id(left + right) for left, right in pairs]
    scores = tokenizer.sp.get_score(made)
    return scores == sorted(scores, reverse=True)

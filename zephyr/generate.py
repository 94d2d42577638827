"""Sampling with a rolling key/value cache, and a chat.

    python -m zephyr.generate MODEL                        talk to it; end with Ctrl-D
    python -m zephyr.generate MODEL --prompt "Hello"       one answer

B sequences  T rows  S cache slots  H query heads  K key/value heads  E head width  V vocabulary
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from zephyr import attention, files
from zephyr.architecture import MistralConfig
from zephyr.attention import Layout, visible
from zephyr.distributed import machine
from zephyr.model import Mistral
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, config_json, hub


class Cache:
    """Keys and values of the last S positions of each sequence; position p lives in slot p % S.

    With S = 4, a sequence whose next position is 6 holds positions 4 5 2 3. Position 6 then takes
    slot 2, that of position 2, which a window of 4 no longer sees.
    """

    def __init__(self, c: MistralConfig, sequences: int, slots: int, like: Tensor):
        shape = (c.num_hidden_layers, sequences, slots, c.num_key_value_heads, c.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.slots = slots
        self.held_BS = torch.full((sequences, slots), -1, device=like.device)
        self.owner_T = torch.arange(sequences, device=like.device)

    def place(self, position_T: Tensor, owner_T: Tensor) -> None:
        """Note which positions the next tokens have, and which sequences they belong to. Call it
        before each forward: `attend` then stores their keys and values in those slots."""
        self.position_T, self.owner_T = position_T, owner_T
        self.held_BS[owner_T, position_T % self.slots] = position_T

    def store(self, k_TKE: Tensor, v_TKE: Tensor, layer: int) -> None:
        where = (layer, self.owner_T, self.position_T % self.slots)
        self.k[where], self.v[where] = k_TKE, v_TKE

    def attend(self, q_BHE: Tensor, k_BKE: Tensor, v_BKE: Tensor, layer: int, window: int | None):
        """Attention of one query of each sequence over what the cache holds of it, the query's own
        key included."""
        self.store(k_BKE, v_BKE, layer)
        held = self.held_BS
        mask_BS = visible(self.position_T[:, None], held, window) & (held >= 0)
        k_BKSE, v_BKSE = (x[layer].transpose(1, 2) for x in (self.k, self.v))
        return F.scaled_dot_product_attention(
            q_BHE[:, :, None], k_BKSE, v_BKSE, attn_mask=mask_BS[:, None, None], enable_gqa=True
        )[:, :, 0]


@dataclass(frozen=True)
class Prefill(Layout):
    """The layout of the prompts as one pack, which also leaves their last keys and values in a
    cache."""

    cache: Cache
    kept_T: Tensor  # rows that the cache keeps

    def attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int | None):
        self.cache.store(k_TKE[self.kept_T], v_TKE[self.kept_T], layer)
        return super().attend(q_THE, k_TKE, v_TKE, layer, window)


def prefill(model: Mistral, prompts: list[list[int]], new: int) -> tuple[Cache, Tensor]:
    """Return a cache that holds the prompts and has room for `new` tokens, and the logits [B, V] of
    each prompt's next token."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    window = model.config.sliding_window
    slots = longest + new if window is None else min(window, longest + new)
    head = model.lm_head.weight
    cache = Cache(model.config, len(prompts), slots, head)

    position_T = torch.cat([torch.arange(n) for n in lengths.tolist()])
    owner_T = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
    kept_T = torch.nonzero(position_T >= (lengths - slots)[owner_T]).flatten()
    ends = F.pad(lengths.cumsum(0), (1, 0))
    cu, kept_T, position_T, owner_T = (
        x.to(head.device) for x in (ends.int(), kept_T, position_T, owner_T)
    )
    cache.place(position_T[kept_T], owner_T[kept_T])
    tokens_T = torch.tensor([i for prompt in prompts for i in prompt], device=head.device)
    layout = Prefill(position_T, cu, cu, None, None, longest, longest, cache, kept_T)
    return cache, model.logits(tokens_T, layout, (ends[1:] - 1).to(head.device))


@torch.inference_mode()
def stream(
    model: Mistral,
    prompts: list[list[int]],
    new: int,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    pieces: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt [B], up to `new` times.

    At temperature 0 it is the most likely token; else it is sampled from the smallest set of tokens
    whose probability reaches `top_p`. Only the first `pieces` tokens are taken, as a model may have
    more embeddings than its tokenizer has pieces. The same seed and prompts give the same tokens.
    """
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    cache, logits_BV = prefill(model, prompts, new)
    owner_B = torch.arange(len(prompts), device=logits_BV.device)
    position_B = torch.tensor([len(prompt) for prompt in prompts], device=logits_BV.device)
    for k in range(new):
        token_B = choose(logits_BV[:, :pieces].float(), temperature, top_p, generator)
        yield token_B
        if k + 1 < new:
            cache.place(position_B + k, owner_B)
            logits_BV = model.logits(token_B, cache)


def choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator):
    """Return a token [B] for each row of logits."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # below the largest, in double: no temperature above 0, however small, makes infinity of 0
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / temperature
    probability, order = scaled_BV.softmax(-1).sort(-1, descending=True)
    before = probability.cumsum(-1) - probability  # the mass of what is likelier: 0 for the first
    probability[before >= top_p] = 0
    return order.gather(1, torch.multinomial(probability, 1, generator=generator)).squeeze(1)


def generate(
    model: Mistral, prompts: list[list[int]], new: int, eos: int, **sampling: float
) -> list[list[int]]:
    """Return the sampled continuation of every prompt, up to its EOS and without it. See
    `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for token_B in stream(model, prompts, new, **sampling):
        tokens = token_B.tolist()
        going -= {k for k in going if tokens[k] == eos}
        for k in going:
            answers[k].append(tokens[k])
        if not going:
            break
    return answers


def load(folder: str) -> tuple[Mistral, Tokenizer]:
    """Return a model and its tokenizer to sample from: bf16 on a GPU, fp32 on a CPU. Prints what is
    odd about the folder."""
    shape, tokenizer, _, notes = base.open_folder(folder)
    for note in [*notes, *machine.tune_allocators()]:
        print(note, file=sys.stderr)
    attention.prepare_back_end()
    cuda = torch.cuda.is_available()
    # of one query against a masked cache cuDNN's attention, torch's first choice, is untried here
    torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.device("meta"):
        model = Mistral(shape).to(torch.bfloat16 if cuda else torch.float32)
    model.to_empty(device="cuda" if cuda else "cpu")
    hub.load(folder, model)
    return model.eval(), tokenizer


def answer(model: Mistral, tokenizer: Tokenizer, messages: list, new: int, **sampling) -> str:
    """Print the assistant's next message as it comes, and return it. Raises ValueError if the
    conversation leaves no room in the model's positions."""
    prompt = tokenizer.prompt(messages, system=False)  # the caller has put one there, or none
    limit = model.config.max_position_embeddings
    if len(prompt) >= limit:
        raise ValueError(f"the conversation has {len(prompt)} tokens, the model {limit} positions")
    ids: list[int] = []
    shown = ""
    sampling["pieces"] = tokenizer.vocab_size
    for token_B in stream(model, [prompt], min(new, limit - len(prompt)), **sampling):
        if (token := int(token_B)) == tokenizer.eos:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character: wait for its other bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    print(text[len(shown) :])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m zephyr.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a Hugging Face folder, as a run's model/")
    parser.add_argument("--prompt", help="answer this and end; without it, chat")
    parser.add_argument("--system", default="", help="the system message [empty]")
    parser.add_argument(
        "--empty-system",
        action=argparse.BooleanOptionalAction,
        help="where --system says nothing [as the model's template has it]",
    )
    parser.add_argument("--max-new", type=int, default=1024, help="longest answer, tokens [1024]")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy [0.7]")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus to sample from [1.0]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")

    def error(message: str) -> None:
        raise ValueError(f"{message}; see --help")

    parser.error = error
    args = parser.parse_args()
    for flag, value, fits in (
        ("--prompt", repr(args.prompt), args.prompt != ""),
        ("--max-new", args.max_new, args.max_new > 0),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf")),
        ("--top-p", args.top_p, 0 < args.top_p <= 1),
        ("--seed", args.seed, 0 <= args.seed < 1 << 64),
    ):
        if not fits:
            error(f"{flag} {value} is out of range")
    args.model, args.system = files.home(args.model), text(args.system, "--system")
    args.prompt = args.prompt and text(args.prompt, "--prompt")
    model, tokenizer = load(args.model)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    if args.empty_system is None:
        args.empty_system = config_json.empty_system(Path(args.model)) is not False
    opens = args.system or args.empty_system
    messages = [{"role": "system", "content": args.system}] if opens else []
    while asked := args.prompt or ask():
        messages.append({"role": "user", "content": asked})
        said = answer(model, tokenizer, messages, args.max_new, **sampling)
        if args.prompt:
            return
        messages.append({"role": "assistant", "content": said})


def ask() -> str:
    """Return the user's next line that is not blank; "" at the end of the input.

    Raises ValueError for a line that is not text. At a terminal, which may have cut a character in
    two, the line is asked for again.
    """
    terminal, line = sys.stdin.isatty(), ""
    while not line:
        try:
            line = text(input("\n> " if terminal else "").strip(), "a line of the input")
        except EOFError:
            print()
            return ""
        except ValueError as error:
            if not terminal:
                raise
            print(error, file=sys.stderr)
    return line


def text(given: str, what: str) -> str:
    """Return text from the command line or the input, read as UTF-8 whatever the locale. Raises
    ValueError if its bytes are not UTF-8."""
    try:
        return given.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError:
        raise ValueError(
            f"{what} {files.shown(given)} is not UTF-8: a character is cut, or it is "
            "in another encoding; give it again"
        ) from None


if __name__ == "__main__":
    exits.call(main)

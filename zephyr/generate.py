"""Sampling with a rolling key/value cache, and a chat.

    python -m zephyr.generate MODEL                        talk to it; end with Ctrl-D
    python -m zephyr.generate MODEL --prompt "Hello"       one answer

B sequences  T rows  S cache slots  H query heads  K key/value heads  G query heads of each  E head
width  V vocabulary
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zephyr import attention, files
from zephyr.architecture import MistralConfig
from zephyr.attention import Layout, in_one_call
from zephyr.distributed import machine
from zephyr.model import Mistral
from zephyr.run import exits
from zephyr.tokenizer import Tokenizer
from zephyr.weights import base, config_json, hub, locate

CAPTURE = 16  # steps; a capture takes the time of ten or more


class Cache:
    """Keys and values of the last S positions of each sequence; position p lives in slot p % S.

    With S = 4, a sequence whose next position is 6 holds positions 4 5 2 3. Position 6 then takes
    slot 2, that of position 2, which a window of 4 no longer sees. S is at most the window, so a
    token sees all that its sequence then holds, in slots 0 .. min(position, S - 1). Of the rows T
    of a forward there is one for each sequence, but in `prefill`.
    """

    def __init__(self, c: MistralConfig, lengths: Tensor, slots: int, like: Tensor):
        shape = (c.num_hidden_layers, len(lengths), slots, c.num_key_value_heads, c.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.slots, self.longest, self.one_call = slots, int(lengths.max()), in_one_call(like)
        self.position_T = (lengths - 1).to(like.device)  # of each sequence's last token so far

    def advance(self) -> None:
        """Move each sequence on to its next position, and work out what is the same for all layers:
        where a token's key goes, and which keys it sees. Call it before each forward."""
        S, position_B = self.slots, self.position_T.add_(1)
        start_B = torch.arange(0, len(position_B) * S, S, device=position_B.device)
        held_B = (position_B + 1).clamp(max=S)
        self.place_T = start_B + position_B % S
        if self.one_call:
            # two segments for a sequence, its query with the keys it sees, and no query with the
            # slots that are still empty:  cu_seqlens_q 0 1 1 2 2 ..  cu_seqlens_k 0 held S ..
            ends_k = torch.stack((start_B + held_B, start_B + S), 1).flatten()
            ends_q = (torch.arange(len(ends_k), device=start_B.device) + 2) // 2
            cu_q, cu_k = (F.pad(ends.int(), (1, 0)) for ends in (ends_q, ends_k))
            self.layout = Layout(position_B, cu_q, cu_k, None, None, 1, S)
        else:
            self.longest += 1
            # no slots beyond the longest sequence, unless a graph is to serve for later steps, too
            some = S if captures(start_B.device) else min(self.longest, S)
            seen_BS = torch.arange(some, device=start_B.device) < held_B[:, None]
            self.bias_BS = torch.where(seen_BS, 0.0, -torch.inf).to(self.k.dtype)

    def store(self, k_TKE: Tensor, v_TKE: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Put keys and values in their places; returns all of the layer's."""
        k, v = self.k[layer].flatten(0, 1), self.v[layer].flatten(0, 1)
        return k.index_copy_(0, self.place_T, k_TKE), v.index_copy_(0, self.place_T, v_TKE)

    def attend(self, q_BHE: Tensor, k_BKE: Tensor, v_BKE: Tensor, layer: int, window: int | None):
        """Return the attention of one query of each sequence over what the cache holds of it, the
        query's own key included. The cache has no key that the window hides."""
        k, v = self.store(k_BKE, v_BKE, layer)
        if self.one_call:
            return self.layout.flash(q_BHE, k, v, None)
        # the heads that share a key head are as many queries of it: no key is repeated for them
        q_BKGE = q_BHE.unflatten(1, (k_BKE.shape[1], -1))
        some, bias = self.bias_BS.shape[1], self.bias_BS[:, None, None]
        k_BKSE, v_BKSE = (x[layer][:, :some].transpose(1, 2) for x in (self.k, self.v))
        return F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, bias).flatten(1, 2)

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these. The others move up inside the memory that the cache has,
        one layer at a time."""
        for x in (*self.k, *self.v):
            x[: len(rows)] = x[rows]
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]
        self.position_T = self.position_T[rows]


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

    position_T = torch.cat([torch.arange(n) for n in lengths.tolist()])
    owner_T = torch.repeat_interleave(torch.arange(len(prompts)), lengths)
    kept_T = torch.nonzero(position_T >= (lengths - slots)[owner_T]).flatten()
    place_T = (owner_T * slots + position_T % slots)[kept_T]
    ends = F.pad(lengths.cumsum(0), (1, 0))
    cache = Cache(model.config, lengths, slots, head)
    cu, kept_T, position_T, cache.place_T = (
        x.to(head.device) for x in (ends.int(), kept_T, position_T, place_T)
    )
    tokens_T = torch.tensor([i for prompt in prompts for i in prompt], device=head.device)
    layout = Prefill(position_T, cu, cu, None, None, longest, longest, cache, kept_T)
    return cache, model.logits(tokens_T, layout, (ends[1:] - 1).to(head.device))


class Step:
    """Takes a token of each sequence into the cache, and returns the logits [B, V] of the next.

    A step of Mistral-7B launches 1,500 kernels, and at batch 1 the host needs far longer for that
    than the GPU for the work. On CUDA the first step is therefore captured as a graph, which later
    ones launch as a whole. A graph knows addresses, not values: its tokens lie in `token_B`, and it
    moves the cache's positions on by itself.
    """

    def __init__(self, model: Mistral, cache: Cache):
        self.model, self.cache = model, cache
        self.token_B = torch.empty_like(cache.position_T)
        self.replay: Callable[[], Tensor] | None = None

    def eager(self) -> Tensor:
        self.cache.advance()
        return self.model.logits(self.token_B, self.cache)

    def __call__(self, token_B: Tensor, left: int) -> Tensor:
        self.token_B.copy_(token_B)
        if self.replay:
            return self.replay()
        logits_BV = self.eager()
        # not before: libraries set themselves up in a first run; nor for a few steps that are left
        if captures(token_B.device) and left > CAPTURE:
            self.replay = captured(self.eager)
        return logits_BV


def captures(device: torch.device) -> bool:
    """Return True where steps are captured."""
    return device.type == "cuda"


def captured(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Return a function that does what `step` does, with one launch. What it returns is overwritten
    by its next call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()  # what it launches is noted, and does not run

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@torch.inference_mode()
def stream(
    model: Mistral,
    prompts: list[list[int]],
    new: int,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
    pieces: int | None = None,
    eos: int | None = None,
) -> Iterator[list[int]]:
    """Yield the next token of every prompt, up to `new` times; after its `eos`, that again.

    At temperature 0 it is the most likely token; else it is sampled from the smallest set of tokens
    whose probability reaches `top_p`. Only the first `pieces` tokens are taken, as a model may have
    more embeddings than its tokenizer has pieces. The same seed and prompts give the same tokens.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache, logits_BV = prefill(model, prompts, new)
    step = Step(model, cache)
    rows = list(range(len(prompts)))  # the prompt of each row of the batch
    going = set(rows)  # the prompts that have not ended
    for left in reversed(range(new)):
        token_B = choose(logits_BV[:, :pieces].float(), temperature, top_p, generator)
        said = dict(zip(rows, token_B.tolist(), strict=True))
        going = {k for k in going if said[k] != eos}
        yield [said[k] if k in going else eos for k in range(len(prompts))]
        if not going or not left:
            return
        # What has ended leaves the batch at once; where steps are captured, when it is half of it.
        # Each size needs a graph of its own, and a capture takes the time of many steps, while one
        # row too many costs little: a step's time is mostly that of reading the weights.
        if len(going) <= (len(rows) // 2 if captures(device) else len(rows) - 1):
            stay = [row for row, k in enumerate(rows) if k in going]
            cache.keep(stay)
            rows = [rows[row] for row in stay]
            token_B, step = token_B[stay], Step(model, cache)
        logits_BV = step(token_B, left)


def choose(logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator):
    """Return a token [B] for each row of logits."""
    if temperature == 0:
        return logits_BV.argmax(-1)
    # below the largest, in double: no temperature above 0, however small, makes infinity of 0
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).double() / temperature
    probability_BV = scaled_BV.softmax(-1)
    if top_p < 1:
        falling_BV, order_BV = probability_BV.sort(-1, descending=True)
        before_BV = falling_BV.cumsum(-1) - falling_BV  # the mass of what is likelier
        probability_BV.scatter_(1, order_BV, falling_BV.masked_fill(before_BV >= top_p, 0))
    # the first of exponential clocks with these rates, as in torch.multinomial, which would also
    # make the host wait for the GPU to look at the probabilities
    clock_BV = torch.empty_like(probability_BV).exponential_(generator=generator)
    return (probability_BV / clock_BV).argmax(-1)


def generate(
    model: Mistral, prompts: list[list[int]], new: int, eos: int, **sampling: float
) -> list[list[int]]:
    """Return the sampled continuation of every prompt, up to its EOS and without it. See
    `stream`."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, new, eos=eos, **sampling):
        for answer, token in zip(answers, tokens, strict=True):
            answer += [token] * (token != eos)
    return answers


def load(folder: str, under: str | None = None) -> tuple[Mistral, Tokenizer]:
    """Return a model and its tokenizer to sample from: bf16 on a GPU that multiplies it, else fp32.
    Prints what is odd about the folder. A LoRA adapter is added to its base, which is `under` or
    the folder that the adapter names."""
    place = locate.parts(folder, under)
    shape, tokenizer, _, notes = base.open_folder(place)
    for note in [*notes, *machine.tune_allocators()]:
        print(note, file=sys.stderr)
    attention.prepare_back_end()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow = device.type == "cuda" and machine.multiplies_bf16(device)
    with torch.device("meta"):
        model = Mistral(shape).to(torch.bfloat16 if narrow else torch.float32)
    model.to_empty(device=device)
    hub.load(place, model)
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
    for (token,) in stream(model, [prompt], min(new, limit - len(prompt)), **sampling):
        if token == tokenizer.eos:
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
    parser = exits.Parser("python -m zephyr.generate", description=__doc__)
    parser.add_argument("model", help="a Hugging Face folder, as a run's model/ or adapter/")
    parser.add_argument("--base", help="of an adapter: its base, if not where its config says")
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

    args = parser.parse_args()
    for flag, value, fits in (
        ("--prompt", repr(args.prompt), args.prompt != ""),
        ("--max-new", args.max_new, args.max_new > 0),
        ("--temperature", args.temperature, 0 <= args.temperature < float("inf")),
        ("--top-p", args.top_p, 0 < args.top_p <= 1),
        ("--seed", args.seed, 0 <= args.seed < 1 << 64),
    ):
        if not fits:
            parser.error(f"{flag} {value} is out of range")
    args.model, args.system = files.home(args.model), text(args.system, "--system")
    args.prompt = args.prompt and text(args.prompt, "--prompt")
    args.base = args.base and files.home(args.base)
    model, tokenizer = load(args.model, args.base)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "seed": args.seed}
    if args.empty_system is None:
        place = locate.parts(args.model, args.base)
        args.empty_system = config_json.empty_system(place.tokenizer) is not False
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

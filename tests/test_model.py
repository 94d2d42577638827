"""The model against transformers' own, and packed rows against separate sequences."""

import pytest
import torch
import transformers
from torch import Tensor

from model_helpers import SMALL, batch, model, packed, tokens
from zephyr.architecture import MistralConfig
from zephyr.attention import Layout
from zephyr.model import Mistral
from zephyr.weights.hub import initialise


def gradients(m: Mistral, loss: Tensor) -> dict[str, Tensor]:
    m.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).abs().max()
        assert difference <= 1e-5 + 1e-4 * b[name].abs().max(), f"{name}: {difference}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 1},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4, "rope_theta": 1e6},
        {
            "hidden_size": 30,
            "intermediate_size": 37,
            "num_attention_heads": 6,
            "head_dim": 10,
            "num_key_value_heads": 3,
            "rms_norm_eps": 0.1,
        },
        {"head_dim": 2, "sliding_window": 22},
        {"tie_word_embeddings": True},
        {"model_type": "llama", "sliding_window": None},
        {"model_type": "llama", "sliding_window": None, "head_dim": 6, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_logits_equal_transformers(changes):
    """Strict loading also shows that names and shapes are Hugging Face's."""
    ours = model(**changes)
    c = ours.config
    sizes = {key: getattr(c, key) for key in SMALL if key != "rope_theta"}
    if c.model_type == "llama":
        del sizes["sliding_window"]
    kind = c.model_type.capitalize()
    theirs = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(
            **sizes,
            tie_word_embeddings=c.tie_word_embeddings,
            attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = tokens(23)
    with torch.no_grad():
        expected = theirs(x[None]).logits[0]
        logits = ours.logits(x, packed(23))
        logprob = ours(batch(x, packed(23), range(22), x[1:].tolist()))
    assert expected.std() > 0.5  # the comparison means something
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    reference = expected.log_softmax(-1)[:-1].gather(1, x[1:, None])[:, 0]
    torch.testing.assert_close(logprob, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_packed_documents_equal_each_alone(window):
    m, lengths = model(sliding_window=window), (7, 1, 12)
    x = tokens(20)
    together = m.logits(x, packed(*lengths))
    alone = [m.logits(part, packed(len(part))) for part in x.split(lengths)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_shared_prompt_equals_two_sequences(window, tied):
    """Prompt a b c, chosen p, rejected x y, each with one more token as its last target."""
    m = model(sliding_window=window, tie_word_embeddings=tied)
    a, b, c, p, q, x, y, z = tokens(8).tolist()
    layout = Layout(
        torch.tensor([0, 1, 2, 3, 3, 4]),
        torch.tensor([0, 4, 6]).int(),
        torch.tensor([0, 4, 9]).int(),
        torch.tensor([0, 1, 2, 3, 0, 1, 2, 4, 5]),
        torch.tensor([[0, 1, 2, 3, 7, 8], [4, 5, 6, -1, -1, -1]]),
        4,
        5,
    )
    shared = m(batch(torch.tensor([a, b, c, p, x, y]), layout, [2, 3, 2, 4, 5], [p, q, x, y, z]))
    chosen = m(batch(torch.tensor([a, b, c, p]), packed(4), [2, 3], [p, q]))
    rejected = m(batch(torch.tensor([a, b, c, x, y]), packed(5), [2, 3, 4], [x, y, z]))
    apart = torch.cat([chosen, rejected])
    torch.testing.assert_close(shared, apart, rtol=0, atol=1e-5)
    upstream = torch.tensor([1.3, -0.4, -0.9, 0.7, 2.1])
    close(gradients(m, shared @ upstream), gradients(m, apart @ upstream))


@pytest.mark.parametrize("window", [1, 3, 9, 11])
def test_window_sees_exactly_w_keys(window):
    """With one layer the last row depends on the last `window` tokens and on no other."""
    m, n = model(sliding_window=window, num_hidden_layers=1), 12
    x = tokens(n)
    last = m.logits(x, packed(n))[-1]
    for j in range(n):
        changed = x.clone()
        changed[j] = (x[j] + 1) % 101
        difference = (m.logits(changed, packed(n))[-1] - last).abs().max()
        assert difference > 1e-3 if j >= n - window else difference == 0, f"key {j}"


def test_rows_of_logits():
    m, x = model(), tokens(9)
    rows = torch.tensor([8, 2])
    torch.testing.assert_close(m.logits(x, packed(9), rows), m.logits(x, packed(9))[rows])


def test_bf16_is_close_and_gives_fp32_logprobs():
    m, x = model(), tokens(23)
    b = batch(x, packed(11, 12), [*range(10), *range(11, 22)], [*x[1:11], *x[12:]])
    wide = m(b)
    narrow = m.bfloat16()(b)
    assert narrow.dtype == torch.float32
    assert 0 < (narrow - wide).abs().max() < 0.5
    assert all(g.isfinite().all() for g in gradients(m, narrow.sum()).values())


def test_a_batch_that_predicts_nothing_gives_zero_gradients():
    """Ranks with less data still join every collective, which takes a gradient for every weight."""
    m = model()
    logprob = m(batch(tokens(1), packed(1), [], []))
    assert logprob.shape == (0,)
    assert all((g == 0).all() for g in gradients(m, logprob.sum()).values())


def test_fresh_weights_depend_on_the_seed_alone():
    first, again, other = (Mistral(MistralConfig(**SMALL)) for _ in range(3))
    initialise(first, 7)
    initialise(again, 7)
    initialise(other, 8)
    for name, p in first.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
        if p.dim() == 1:
            assert (p == 1).all()
        else:
            assert not torch.equal(p, other.get_parameter(name))
            assert p.std().item() == pytest.approx(0.02, rel=0.1)

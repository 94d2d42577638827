"""Mistral: architecture only. No rank, no compilation, no optimizer, no files.

Attributes carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), and RoPE is its
half-split form, so weights load with no map and no permutation. Llama-2 is the same network
without a window.

T tokens of the pack  N predicting tokens  D width  F MLP width  V vocabulary
H query heads  K key/value heads  E head width
"""

import torch
from torch import Tensor, nn

import kernels
from zephyr.architecture import MistralConfig


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) ∘ weight, over the last axis (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


def rope(position_T: Tensor, config: MistralConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, E/2] of position x theta^(-2i/E), computed in fp32 (arXiv:2104.09864)."""
    E = config.head_dim
    power = torch.arange(0, E, 2, device=position_T.device, dtype=torch.float32) / E
    angle = position_T[:, None, None].float() / config.rope_theta**power
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x_THE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x[i], x[i + E/2]) turned by its angle."""
    a, b = x_THE.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Grouped-query attention: H / K query heads share a key and a value head. `layout` knows which
    keys each query sees."""

    def __init__(self, c: MistralConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, c.sliding_window, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, the heads side by side."""
        return self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout) -> Tensor:
        q, k, v = (x.unflatten(1, (-1, self.head_dim)) for x in self.project(x_TD))
        o_THE = layout.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, self.layer, self.window)
        return self.o_proj(o_THE.flatten(1))


class MLP(nn.Module):
    """down(silu(gate(x)) ∘ up(x))  (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, c: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(kernels.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normed input and added to the residual."""

    def __init__(self, c: MistralConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos, sin, layout)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    """Tokens to hidden states: embedding, blocks, final norm."""

    def __init__(self, c: MistralConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens_T: Tensor, layout, wanted_N: Tensor | None = None) -> Tensor:
        """The final hidden states [N, D] at the places `wanted_N`; without it, at every place."""
        x_TD = self.embed_tokens(tokens_T)
        cos, sin = rope(layout.position_T, self.config, x_TD.dtype)
        for block in self.layers:
            x_TD = block(x_TD, cos, sin, layout)
        return self.norm(x_TD if wanted_N is None else x_TD.index_select(0, wanted_N))


class Mistral(nn.Module):
    """A decoder and its LM head. `layout` says who sees whom: `attention.Layout` when training,
    `generate.Cache` when sampling; the model only calls its `attend`."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch) -> Tensor:
        """log p [N] of the batch's targets, fp32 nats. The head runs only where a target is."""
        h_ND = self.model(batch.tokens_T, batch.layout, batch.predict_N)
        return kernels.linear_logprob(h_ND, self.lm_head.weight, batch.targets_N)

    def logits(self, tokens_T: Tensor, layout, wanted_N: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the token after each of `wanted_N`; without it, after every token."""
        return self.lm_head(self.model(tokens_T, layout, wanted_N))

"""Mistral: architecture only. No rank, no compilation, no optimizer, no files.

Attributes carry Hugging Face's names (`model.layers.0.self_attn.q_proj.weight`), and RoPE is its
half-split form, so weights load with no map and no permutation. Llama-2 is the same network
without a window.

T rows  N predicting rows  D width  F MLP width  H query heads  K key/value heads  E head width
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from zephyr.architecture import MistralConfig


class Normed(torch.autograd.Function):
    """With s = 1 / √(mean(x²) + eps) and u = x s:  y = weight ∘ u,  and of a gradient g at y,

        dx = s (g ∘ weight - u mean(g ∘ weight ∘ u))        dweight = Σ g ∘ u, over the rows

    in fp32. Keeps x and a number for each row; autograd would keep three more tensors of x's size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit, gw = x.float() * scale, (g * weight).float()
        dx = scale * (gw - unit * (gw * unit).mean(-1, keepdim=True))
        dweight = (g * unit.to(x.dtype)).sum(0, dtype=torch.float32)
        return dx.to(x.dtype), dweight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) ∘ weight, over the last axis (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return Normed.apply(x, self.weight, self.eps)


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
    """Grouped-query attention; what each query sees is `layout`'s business."""

    def __init__(self, c: MistralConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.head_dim = layer, c.sliding_window, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout, rows: Tensor | None) -> Tensor:
        heads = (len(x), -1, self.head_dim)
        q_THE = rotate(self.q_proj(x).view(heads), cos, sin)
        k_TKE = rotate(self.k_proj(x).view(heads), cos, sin)
        v_TKE = self.v_proj(x).view(heads)
        o_THE = layout.attend(q_THE, k_TKE, v_TKE, self.layer, self.window)
        return self.o_proj(picked(o_THE.flatten(1), rows))


class Gated(torch.autograd.Function):
    """silu(gate) ∘ up. Keeps these two; autograd would keep silu(gate) besides."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)


class MLP(nn.Module):
    """down(silu(gate(x)) ∘ up(x))  (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, c: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(Gated.apply(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, c: MistralConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout, rows: Tensor | None = None
    ) -> Tensor:
        """The next hidden states; only of `rows` if given: all rows are keys, but only those are
        worth the rest."""
        attended = self.self_attn(self.input_layernorm(x), cos, sin, layout, rows)
        x = picked(x, rows) + attended
        return x + self.mlp(self.post_attention_layernorm(x))


def picked(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class Decoder(nn.Module):
    """Tokens to hidden states: embedding, blocks, final norm."""

    def __init__(self, c: MistralConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens_T: Tensor, layout, rows_N: Tensor | None = None) -> Tensor:
        """Final hidden states: of all rows, or of `rows_N` alone, which alone the last block then
        completes."""
        x = self.embed_tokens(tokens_T)
        cos, sin = rope(layout.position_T, self.config, x.dtype)
        *blocks, last = self.layers
        for block in blocks:
            x = block(x, cos, sin, layout)
        return self.norm(last(x, cos, sin, layout, rows_N))


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
        """logprob_N of the batch's targets, fp32 nats. The last block's MLP and the head run only
        on the rows that predict."""
        h_ND = self.model(batch.tokens_T, batch.layout, batch.predict_N)
        return kernels.linear_logprob(h_ND, self.lm_head.weight, batch.targets_N)

    def logits(self, tokens_T: Tensor, layout, rows_N: Tensor | None = None) -> Tensor:
        """Logits [N, V] of the next token after each of `rows_N`, or after every row."""
        return self.lm_head(self.model(tokens_T, layout, rows_N))


def initialise(model: Mistral, seed: int, std: float = 0.02) -> None:
    """Fresh weights in place: N(0, std²) for matrices, ones for norms (Hugging Face's defaults)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std, generator=generator)
        else:
            nn.init.ones_(parameter)

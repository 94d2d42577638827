"""The architecture of a model: Mistral's, or Llama-2's, which is the same without a window."""

from dataclasses import dataclass

# the matrices of a block, in the order of its forward
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class MistralConfig:
    """The architecture, under the names of Hugging Face's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None  # keys each query sees, its own included; None is all
    tie_word_embeddings: bool = False
    model_type: str = "mistral"

"""BLOOM, whole in one file: bloom-560m to bloom-176b and bloomz (BigScience 2022, arXiv 2211.05100).

Parameter names are Hugging Face's, so that a safetensors file loads with no renaming. Sizes in the comments:
N tokens of documents laid end to end, d hidden_size, H heads, D = d / H, V vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minixllm.errors import UserError, found
from minixllm.models import fused_cpu
from minixllm.models.attention import Packed, alibi_slopes
from minixllm.models.config import read_settings
from minixllm.models.token_logps import token_logps


@dataclass(frozen=True)
class BloomConfig:
    """The settings of config.json that the architecture has, under their Hugging Face names."""

    model_type = "bloom"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int    # n_layer in the files
    num_attention_heads: int  # n_head in the files
    layer_norm_epsilon: float = 1e-5
    apply_residual_connection_post_layernorm: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"n_head: found {self.num_attention_heads}, expected a divisor of hidden_size, "
                            f"{self.hidden_size}")

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, config: dict) -> "BloomConfig":
        """Reads config.json. Raises UserError naming a key whose value is absurd or asks for something not built."""
        spellings = {"n_embed": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
        for old, name in spellings.items():
            if config.get(old) is not None:
                if old != "n_embed" and config.get(name, config[old]) != config[old]:  # n_embed beats hidden_size
                    raise UserError(f"{name}: found {found(config[name])}, expected that of {old}")
                config = config | {name: config[old]}
        settings = read_settings(cls, config)
        if config.get("n_inner") not in (None, 4 * settings.hidden_size):
            raise UserError(f"n_inner: found {found(config['n_inner'])}, expected null or 4 times hidden_size")
        if config.get("slow_but_exact") and config.get("pretraining_tp") not in (None, 1):
            raise UserError(f"slow_but_exact: found {found(config['slow_but_exact'])} with pretraining_tp "
                            f"{found(config['pretraining_tp'])}, expected false: sums in slices are not built")
        return settings

    def to_dict(self) -> dict:
        """The contents of config.json."""
        config = {"model_type": self.model_type, "architectures": ["BloomForCausalLM"], **asdict(self)}
        return {**config, "n_layer": config.pop("num_hidden_layers"), "n_head": config.pop("num_attention_heads")}


class BloomAttention(nn.Module):
    """Multi-head attention, softmax(q k^T / sqrt(D) + ALiBi) v: see `attention.alibi_slopes`."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, slopes, context):
        N = hidden.shape[0]
        # The rows of the matrix are laid out head by head as [q, k, v], not as three matrices.
        query, key, value = self.query_key_value(hidden).view(N, -1, 3, self.head_dim).unbind(2)  # (N, H, D)
        attended = context.attend(self.layer_idx, query, key, value, slopes)
        return self.dense(attended.reshape(N, -1))


class BloomMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, hidden):
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate="tanh"))


class BloomBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.residual_after_layernorm = config.apply_residual_connection_post_layernorm
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attention = BloomAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = BloomMLP(config)

    def forward(self, hidden, slopes, context):
        normed = self.input_layernorm(hidden)
        residual = normed if self.residual_after_layernorm else hidden
        hidden = residual + self.self_attention(normed, slopes, context)
        normed = self.post_attention_layernorm(hidden)
        residual = normed if self.residual_after_layernorm else hidden
        return residual + self.mlp(normed)


class Bloom(nn.Module):
    config_class = BloomConfig
    EMBEDDING = "transformer.word_embeddings.weight"
    LORA_TARGETS = ("query_key_value",)  # the paper names none for BLOOM: this is the usual choice
    fused_block = staticmethod(fused_cpu.bloom_block)

    def __init__(self, config: BloomConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.transformer = nn.ModuleDict({
            "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
            "word_embeddings_layernorm": nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon),
            "h": nn.ModuleList(BloomBlock(config, i) for i in range(config.num_hidden_layers)),
            "ln_f": nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Makes a tied head the embedding's weight. Call it again after new storage, which unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    def forward(self, input_ids, context=None, labels=None, positions=None):
        """input_ids (N,) laid out as `context` says, or (B, T): B documents of T tokens -> logits (N, V) or (B, T, V),
        (M, V) with `positions` (M,); or with `labels` their log-probabilities. See `Llama.forward`.
        """
        shape = input_ids.shape
        if context is None:
            context = Packed([shape[1]] * shape[0], input_ids.device)
        hidden = self.transformer.word_embeddings(input_ids.reshape(-1))  # (N, d)
        hidden = self.transformer.word_embeddings_layernorm(hidden)
        slopes = alibi_slopes(self.config.num_attention_heads, hidden.device)  # fp32; as a buffer, it would be rounded
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, slopes, context, use_reentrant=False)
            else:
                hidden = block(hidden, slopes, context)
        hidden = self.transformer.ln_f(hidden)
        if labels is not None:
            return token_logps(hidden, self.lm_head.weight, labels.reshape(-1)).view(shape)
        if positions is not None:
            return self.lm_head(hidden[positions])
        return self.lm_head(hidden).view(*shape, -1)

"""LLaMA, whole in one file: versions 1 to 3.2, and whatever else saves as `LlamaForCausalLM`.

Parameter names are Hugging Face's, so that a safetensors file loads with no renaming. Sizes in the comments:
N tokens of documents laid end to end, d hidden_size, H query heads, KV key and value heads, D head_dim, V vocabulary.
"""

import functools
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minixllm.errors import UserError, expect, found
from minixllm.models import fused_cpu
from minixllm.models.attention import Packed
from minixllm.models.config import read_settings
from minixllm.models.token_logps import token_logps


@dataclass(frozen=True)
class LlamaConfig:
    """The settings of config.json that the architecture has, under their Hugging Face names."""

    model_type = "llama"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None             # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(f"num_attention_heads: found {self.num_attention_heads}, expected a divisor of "
                                f"hidden_size, {self.hidden_size}, or a head_dim")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}, expected an even number, for rotary positions")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_key_value_heads: found {self.num_key_value_heads}, expected a divisor of "
                            f"num_attention_heads, {self.num_attention_heads}")

    @classmethod
    def from_dict(cls, config: dict) -> "LlamaConfig":
        """Reads config.json, in the spelling of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters).

        Raises UserError naming a key whose value is absurd or asks for something that is not built.
        """
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        scaling = _rope_scaling(rope, config.get("max_position_embeddings", cls.max_position_embeddings))
        theta = rope.get("rope_theta", config.get("rope_theta", cls.rope_theta))
        return read_settings(cls, {**config, "rope_theta": theta, "rope_scaling": scaling},
                             {"hidden_act": "silu", "partial_rotary_factor": 1})

    def to_dict(self) -> dict:
        """The contents of config.json, in a spelling that transformers 4 and 5 both read."""
        config = {"model_type": self.model_type, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        return config | asdict(self)


def _rope_scaling(rope: dict, max_position_embeddings: int) -> dict | None:
    """The checked `rope_scaling` of config.json; None where positions are not scaled."""
    needed = {"default": [], "linear": ["factor"],
              "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]}
    expect(rope, dict, "rope_scaling")
    kind = expect(rope.get("rope_type", rope.get("type", "default")), str, "rope_scaling: rope_type", choices=needed)
    defaults = {"original_max_position_embeddings": max_position_embeddings}
    scaling = {key: expect(rope.get(key, defaults.get(key)), float, f"rope_scaling: {key}", above=0)
               for key in needed[kind]}
    unknown = set(rope) - set(scaling) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"rope_scaling: found {found(rope)}, expected only {', '.join(['rope_type', *scaling])}")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise UserError(f"rope_scaling: found {found(rope)}, expected high_freq_factor above low_freq_factor")
    return {"rope_type": kind, **scaling} if kind != "default" else None


def rotary_angles(config: LlamaConfig, position_ids: torch.Tensor):
    """RoPE, rotary position embedding: pair i of a query or key turns by position * theta^(-2i / D) (Su et al. 2021,
    arXiv 2104.09864, eq. 34). A pair is the dimensions i and i + D/2, as in Hugging Face, and 2i, 2i + 1 in the paper.

    position_ids (N,) -> cosines and sines, (N, 1, D) each, the first half of the sines negated as `rotate` needs them.
    They are fp32 in every model, because bf16 cannot tell position 256 from 257.
    """
    D = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, device=position_ids.device).float() / D)  # (D/2,)
    scaling = config.rope_scaling
    if scaling and scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling and scaling["rope_type"] == "llama3":
        # Llama 3.1's way to longer contexts (Dubey et al. 2024, arXiv 2407.21783). A pair that does not even turn once
        # in the original context would meet angles it never saw in training, so that its frequency is divided by the
        # factor. Fast pairs saw every angle, and tell near tokens apart: they stay. Those between are interpolated.
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling["factor"]
    angles = torch.outer(position_ids.float(), frequencies).unsqueeze(1)  # (N, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: torch.Tensor, rotary) -> torch.Tensor:
    """RoPE applied: each pair (x[i], x[i + D/2]) of x (N, heads, D) is turned by its angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([second, first], dim=-1), sin).to(x.dtype)


class LlamaRMSNorm(nn.Module):
    """RMSNorm: weight * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4)."""

    def __init__(self, config):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))

    def forward(self, hidden):
        # As in Hugging Face, the norm is rounded to the model's type before the weight. nn.RMSNorm rounds after it.
        return self.weight * F.rms_norm(hidden, self.weight.shape, eps=self.eps)


class LlamaAttention(nn.Module):
    """Grouped-query attention: each key and value head serves H / KV query heads (Ainslie et al. 2023, arXiv
    2305.13245). KV = H is multi-head attention, softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.head_dim
        d, D, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.q_proj = nn.Linear(d, config.num_attention_heads * D, bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * D, bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * D, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * D, d, bias)

    def forward(self, hidden, rotary, context):
        N = hidden.shape[0]
        query = self.q_proj(hidden).view(N, -1, self.head_dim)  # (N, H, D)
        key = self.k_proj(hidden).view(N, -1, self.head_dim)  # (N, KV, D)
        value = self.v_proj(hidden).view(N, -1, self.head_dim)
        attended = context.attend(self.layer_idx, rotate(query, rotary), rotate(key, rotary), value)
        return self.o_proj(attended.reshape(N, -1))


class LlamaMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), silu(z) = z * sigmoid(z) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, width, bias)
        self.up_proj = nn.Linear(d, width, bias)
        self.down_proj = nn.Linear(width, d, bias)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class LlamaBlock(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config)
        self.post_attention_layernorm = LlamaRMSNorm(config)

    def forward(self, hidden, rotary, context):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, context)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    config_class = LlamaConfig
    EMBEDDING = "model.embed_tokens.weight"
    LORA_TARGETS = ("q_proj", "v_proj")  # what the paper's recipe adapts
    fused_block = staticmethod(functools.partial(fused_cpu.llama_block, rotate=rotate))

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(LlamaBlock(config, i) for i in range(config.num_hidden_layers)),
            "norm": LlamaRMSNorm(config),
        })
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Makes a tied head the embedding's weight. Call it again after new storage, which unties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    def forward(self, input_ids, context=None, labels=None, positions=None):
        """input_ids (N,) laid out as `context` says, or (B, T): B documents of T tokens.

        Returns the logits (N, V) or (B, T, V); with `positions` (M,) only those rows of them, (M, V). With `labels`,
        already shifted (labels[i] is the token to predict at i, -100 for none), returns instead the labels'
        log-probabilities in fp32, shaped as the labels, 0 where there is none; the logits are then never held whole.
        The head is applied in here, because FSDP2 gathers the weights outside the blocks only within this forward.
        """
        shape = input_ids.shape
        if context is None:
            context = Packed([shape[1]] * shape[0], input_ids.device)
        hidden = self.model.embed_tokens(input_ids.reshape(-1))  # (N, d)
        rotary = rotary_angles(self.config, context.position_ids)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, rotary, context, use_reentrant=False)
            else:
                hidden = block(hidden, rotary, context)
        hidden = self.model.norm(hidden)
        if labels is not None:
            return token_logps(hidden, self.lm_head.weight, labels.reshape(-1)).view(shape)
        if positions is not None:
            return self.lm_head(hidden[positions])
        return self.lm_head(hidden).view(*shape, -1)

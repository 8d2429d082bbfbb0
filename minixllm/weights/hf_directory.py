"""Hugging Face model directories, both ways: config.json and safetensors <-> a model, plain or sharded by FSDP2.

Reading takes the memory of the model plus one tensor, and each rank reads only the slices it keeps; writing gathers
one tensor at a time, and the directory appears whole or not at all.
"""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from minixllm.distributed import is_first
from minixllm.errors import UserError
from minixllm.files import read_json, write_json
from minixllm.models.architectures import ARCHITECTURES
from minixllm.models.lora import is_adapter
from minixllm.tokenizers import load_tokenizer
from minixllm.weights.safetensors_files import Stored, find_tensors, what_instead, what_kind, write_tensors

HEAD = "lm_head.weight"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a model directory may hold, and a save may therefore replace.
MODEL_FILES = re.compile(r"(config|generation_config|special_tokens_map|added_tokens|vocab|tokenizer(_config)?)\.json"
                         r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
                         r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


# ---------------------------------------------------------------------------------------------------------- reading


def load(directory, dtype=torch.float32, device="cpu"):
    """(model in eval mode, tokenizer) of a Hugging Face directory, told from its files alone. Raises UserError."""
    config, tokenizer = read_directory(directory)
    model = build(config, dtype)
    load_weights(model, directory, device)
    return model.eval(), tokenizer


def load_model(directory, dtype=torch.float32, device="cpu"):
    """The model alone, whole on one device, in eval mode. Peak memory: the model and its largest tensor."""
    model = build(read_config(directory), dtype)
    load_weights(model, directory, device)
    return model.eval()


def read_directory(directory):
    """(config, tokenizer) of a directory, found to belong together. Raises UserError.

    A tokenizer with ids beyond the embedding is refused; one with fewer is fine, for embeddings are often padded.
    """
    config, tokenizer = read_config(directory), load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, but the embedding only "
                        f"{config.vocab_size} rows (config.json: vocab_size); it may be another model's")
    return config, tokenizer


def read_config(directory):
    """The config of a directory. Raises UserError naming the file and key that cannot be used.

    Whether the head is tied is decided from config.json *and* the tensors: as in transformers 5, a head that differs
    from the embedding is a head of its own whatever config.json says.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        found = what_kind(directory, "a file") if directory.exists() else "nothing there"
        raise UserError(f"{directory}: found {found}, expected a Hugging Face model directory on this disk, such as "
                        "`hf download NAME --local-dir DIR` makes")
    adapter = (directory / "adapter_config.json").exists()
    if not path.exists():
        if (directory / "model" / "config.json").exists():  # a run's output
            raise UserError(f"{directory}: no config.json; expected a model, such as {directory / 'model'}")
        raise UserError(f"{directory}: " + ("found a PEFT adapter, expected a model (an adapter's base, for one)"
                                            if adapter else f"no config.json; {what_instead(directory)}"))
    values = read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(f"{path}: model_type: found {model_type!r}, expected {' or '.join(ARCHITECTURES)}")
    config_class = ARCHITECTURES[model_type].config_class
    generation = read_generation_config(directory)
    where = path
    try:
        config = config_class.from_dict(values)
        if generation.get("eos_token_id") is not None:  # what ends an answer of a chat model may stand there alone
            where = path.with_name("generation_config.json")
            config = config_class.from_dict(values | {"eos_token_id": generation["eos_token_id"]})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None

    tensors = find_tensors(directory)
    if adapter and (directory / "adapter_model.safetensors").exists():
        raise UserError(f"{directory}: found a model and a PEFT adapter, expected one of them")
    if config.num_hidden_layers > len(tensors):  # rather than build a billion layers to find them missing
        raise UserError(f"{path}: num_hidden_layers: found {config.num_hidden_layers}, "
                        f"but there are only {len(tensors)} tensors in {directory}")
    try:
        model = build(config)
    except RuntimeError as error:
        raise UserError(f"{path}: sizes of which no model can be built: {str(error).splitlines()[0]}") from None
    if config.tie_word_embeddings:
        named = _named_as(model, tensors)
        embedding, head = named.get(model.EMBEDDING), named.get(HEAD)
        if embedding and head and not _equal(embedding, head):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def build(config, dtype=torch.float32):
    """A model without storage, on the meta device: perhaps to be sharded, then to be filled by one of the next two."""
    with torch.device("meta"):
        return ARCHITECTURES[config.model_type](config).to(dtype)


@torch.no_grad()
def load_weights(model, directory, device="cpu"):
    """Fill a model (plain, or sharded by FSDP2: each rank then reads only its slices) with a directory's tensors.

    A model on the meta device gets its storage on `device`, once the directory is known to fit. Each tensor is
    converted to the model's dtype as it is read. LoRA's parameters are left for `lora.initialise` or the adapter's
    file. Raises UserError when a tensor is missing, unexpected or of another shape.
    """
    tensors = _named_as(model, find_tensors(directory))
    if model.config.tie_word_embeddings and (head := tensors.pop(HEAD, None)):
        tensors.setdefault(model.EMBEDDING, head)  # read_config found the two equal, or one alone
    wanted = {name: parameter for name, parameter in model.named_parameters() if not is_adapter(name)}
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    problems = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshaped": [f"{name} (found {list(stored.shape)}, expected {list(shapes[name])})"
                      for name, stored in tensors.items() if stored.shape != shapes.get(name, stored.shape)]}
    if any(problems.values()):
        what = "; ".join(f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                         for problem, names in problems.items() if names)
        raise UserError(f"{directory}: the tensors are not those that config.json describes: {what}")
    _materialise(model, device)
    for name, parameter in model.named_parameters():
        if name in wanted:
            _fill(parameter, tensors[name].read)


@torch.no_grad()
def initialise(model, seed: int, device="cpu"):
    """Random weights, the same at any world size: every rank draws the full tensors from one seed and keeps its slices.

    LoRA's parameters are left for `lora.initialise`.
    """
    _materialise(model, device)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            full = torch.empty(parameter.shape)
            model.init_weights(name, full, generator)
            _fill(parameter, full.__getitem__)


def read_generation_config(directory) -> dict:
    """The fields of a directory's generation_config.json that a fine-tuned model keeps; {} where there is none."""
    values = read_json(Path(directory) / "generation_config.json")
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_from_model_config")}


def _named_as(model, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors by the model's names: those of a bare LlamaModel or BloomModel (BLOOM's own files) lack a prefix."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    renamed = {}
    for key, stored in tensors.items():
        if key.endswith(".rotary_emb.inv_freq"):  # a buffer in old files; it follows from the config
            continue
        name = next((prefix + key for prefix in ("", "model.", "transformer.") if prefix + key in names), key)
        if name in renamed:
            raise UserError(f"{stored.path}: tensors {renamed[name].key} and {key} are both {name}")
        renamed[name] = stored
    return renamed


def _equal(a: Stored, b: Stored, rows: int = 4096) -> bool:
    return a.shape == b.shape and all(torch.equal(a.read(slice(i, i + rows)), b.read(slice(i, i + rows)))
                                      for i in range(0, a.shape[0], rows))


def _materialise(model, device):
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        model.tie_weights()


def _fill(parameter, read):
    """Copy read(slices), the slices of the full tensor that this rank keeps, into a parameter."""
    slices, local = [slice(0, size) for size in parameter.shape], parameter
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard):
                whole, mesh = slices[placement.dim], parameter.device_mesh
                size = -(-(whole.stop - whole.start) // mesh.size(axis))  # as torch.chunk: the last may be short
                start = min(whole.start + size * mesh.get_local_rank(axis), whole.stop)
                slices[placement.dim] = slice(start, min(start + size, whole.stop))
    if local.numel():  # a small tensor may have no row for this rank
        local.copy_(read(tuple(slices)))


# ---------------------------------------------------------------------------------------------------------- writing


def save_model(model, directory, tokenizer=None, generation_config=None, dtype=None):
    """Write a directory that transformers opens with the same logits. A collective: every rank must call it.

    generation_config: fields kept of the source model's (read_generation_config); bos, eos and pad of the tokenizer
    join them. dtype: of the tensors in the file, None for the embedding's. An earlier model in the directory is
    replaced, anything else refused. Raises UserError, on every rank, and leaves what was there, if rank 0 cannot write.
    """
    directory = Path(directory).resolve()
    dtype = dtype or model.embedding.weight.dtype
    tensors = _gather(model, dtype)
    error = None
    if is_first():
        try:
            check_target(directory)
            _write_directory(model, directory, tokenizer, generation_config or {}, dtype, tensors)
        except Exception as caught:
            error = caught
    for _ in tensors:  # ranks that do not write, or no longer, still take part in the gathers that are left
        pass
    message = [error and f"{directory}: not saved: {error}"]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)  # nor does a rank go on before the directory is there
    if error and not isinstance(error, (OSError, UserError)):
        raise error
    if message[0]:
        raise UserError(message[0]) from error


def check_target(directory):
    """Refuse a directory that a save must not replace, one that holds anything but a model's files."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: found a file, expected a directory or nothing")
    others = [path.name for path in directory.iterdir() if not MODEL_FILES.fullmatch(path.name)] \
        if directory.exists() else []
    if others:
        raise UserError(f"{directory}: holds {min(others)}, which is no part of a model and would be lost; "
                        "expected a new directory or an earlier model's")


@torch.no_grad()
def _gather(model, dtype):
    """The full tensors one at a time, a tied head not repeated; a collective where the model is sharded."""
    for name, parameter in model.named_parameters():
        assert not is_adapter(name), "merge the adapters before the model is saved"
        tensor = parameter.to(dtype)
        yield tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _write_directory(model, directory, tokenizer, generation_config, dtype, tensors):
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not directory.exists():  # a save was killed between the two renames below
        os.rename(old, directory)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        ids = _special_ids(tokenizer, {"eos_token_id": model.config.eos_token_id} | generation_config)
        write_json(partial / "config.json", {
            **model.config.to_dict(), **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
        write_json(partial / "generation_config.json", {**generation_config, **ids})
        if tokenizer is not None:
            tokenizer.save(partial)
        write_tensors(partial, {name: tuple(p.shape) for name, p in model.named_parameters()}, dtype, tensors)
        if directory.exists():
            os.rename(directory, old)
        os.rename(partial, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _special_ids(tokenizer, kept: dict) -> dict:
    """bos, eos and pad ids: the tokenizer's, its eos beside any other at which the source model already stopped."""
    if tokenizer is None:
        return {name: kept[name] for name in SPECIAL if name in kept}
    stops = kept.get("eos_token_id")
    stops = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop not in (None, tokenizer.eos_id)]
    if stops and tokenizer.eos_id is not None:
        stops = [tokenizer.eos_id, *stops]
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops or tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id}

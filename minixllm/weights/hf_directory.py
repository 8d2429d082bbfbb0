"""Hugging Face model directories, both ways: config.json and safetensors <-> a model, plain or sharded by FSDP2.

Reading takes the memory of the model plus one tensor, and each rank reads only the slices it keeps; writing gathers
one tensor at a time, and the directory appears whole or not at all.
"""

import dataclasses
import functools
import os
import re
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from minixllm.distributed import full_tensor, is_first
from minixllm.errors import UserError, expect
from minixllm.files import read_json, write_json
from minixllm.models.architectures import ARCHITECTURES
from minixllm.models.lora import is_adapter
from minixllm.models.nf4 import nf4_layers
from minixllm.tokenizers import has_tokenizer, load_tokenizer
from minixllm.weights.safetensors_files import Stored, find_tensors, what_instead, what_kind, write_tensors

HEAD = "lm_head.weight"
ROWS = 4096  # of two matrices that are compared at once
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a model directory may hold, and a save may therefore replace; hidden files are those of a file manager.
MODEL_FILES = re.compile(r"\..*"
                         r"|(config|generation_config|special_tokens_map|added_tokens|vocab|tokenizer(_config)?)\.json"
                         r"|tokenizer\.model|merges\.txt|chat_template\.jinja"
                         r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


# ---------------------------------------------------------------------------------------------------------- reading


def load(directory, dtype=torch.float32, device="cpu", adapter=None):
    """(model in eval mode, tokenizer) of a Hugging Face directory, told from its files alone. Raises UserError.

    adapter: see `read_directory`.
    """
    config, tokenizer = read_directory(directory, adapter)
    model = build(config, dtype, Path(directory) / "config.json")
    load_weights(model, directory, device)
    return model.eval(), tokenizer


def read_directory(directory, adapter=None):
    """(config, tokenizer) of a directory, found to belong together. Raises UserError.

    A tokenizer with ids beyond the embedding is refused; one with fewer is fine, for embeddings are often padded.
    adapter: the directory of an adapter of this model. Its tokenizer and generation_config.json are used where it has
    them.
    """
    config = read_config(directory, adapter)
    folder = adapter if adapter and has_tokenizer(adapter) else directory
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, but the embedding only "
                        f"{config.vocab_size} rows ({directory}/config.json: vocab_size); it may be another model's")
    return config, tokenizer


def read_config(directory, adapter=None):
    """The config of a directory. Raises UserError naming the file and key that cannot be used.

    Whether the head is tied is decided from config.json *and* the tensors: as in transformers 5, a head that differs
    from the embedding is a head of its own whatever config.json says. adapter: see `read_directory`.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not directory.is_dir():
        found = what_kind(directory, "a file") if directory.exists() else "nothing there"
        raise UserError(f"{directory}: found {found}, expected a Hugging Face model directory on this disk, such as "
                        "`hf download NAME --local-dir DIR` makes")
    has_adapter = (directory / "adapter_config.json").exists()
    if not path.exists():
        if (directory / "model" / "config.json").exists():  # a run's output
            raise UserError(f"{directory}: no config.json; expected a model, such as {directory / 'model'}")
        raise UserError(f"{directory}: " + ("found a PEFT adapter, expected a model (an adapter's base, for one)"
                                            if has_adapter else f"no config.json; {what_instead(directory)}"))
    values, where = read_json(path), path
    try:
        model_class = ARCHITECTURES[expect(values.get("model_type"), str, "model_type", choices=tuple(ARCHITECTURES))]
        config = model_class.config_class.from_dict(values)
        # The tokens that end an answer of a chat model may stand in generation_config.json alone.
        for folder in (directory, adapter) if adapter else (directory,):
            where = Path(folder) / "generation_config.json"
            if "eos_token_id" in (generation := read_generation_config(folder)):
                config = model_class.config_class.from_dict(
                    values | {"eos_token_id": generation["eos_token_id"]})
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(where)) else f"{where}: {error}") from None

    tensors = find_tensors(directory)
    if has_adapter and (directory / "adapter_model.safetensors").exists():
        raise UserError(f"{directory}: found a model and a PEFT adapter, expected one of them")
    if config.num_hidden_layers > len(tensors):  # rather than build a billion layers to find them missing
        raise UserError(f"{path}: num_hidden_layers: found {config.num_hidden_layers}, "
                        f"but there are only {len(tensors)} tensors in {directory}")
    if config.tie_word_embeddings:
        named = _named_as(model_class, tensors)
        embedding, head = named.get(model_class.EMBEDDING), named.get(HEAD)
        if embedding and head and not _equal(embedding, head):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def build(config, dtype=torch.float32, where="config.json"):
    """A model without storage, on the meta device: perhaps to be sharded, then to be filled by one of the next two.

    where: the file that errors name.
    """
    try:
        with torch.device("meta"):
            return ARCHITECTURES[config.model_type](config).to(dtype)
    except RuntimeError as error:
        raise UserError(f"{where}: sizes of which no model can be built: {error}") from None


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
    shapes = _shapes(model)
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [stored.key for name, stored in tensors.items() if name not in shapes],
        "misshaped": [f"{name} (found {list(stored.shape)}, expected {list(shapes[name])})"
                      for name, stored in tensors.items() if stored.shape != shapes.get(name, stored.shape)]}
    if any(problems.values()):
        what = "; ".join(f"{len(names)} {problem}: {', '.join(names[:2])}{', ...' * (len(names) > 2)}"
                         for problem, names in problems.items() if names)
        raise UserError(f"{directory}: the tensors are not those that config.json describes: {what}")
    _materialise(model, device)
    for name, fill in _fills(model):
        fill(tensors[name].read)


@torch.no_grad()
def initialise(model, seed: int, device="cpu"):
    """Random weights, the same at any world size: every rank draws the full tensors from one seed and keeps its slices.

    LoRA's parameters are left for `lora.initialise`.
    """
    _materialise(model, device)
    generator = torch.Generator().manual_seed(seed)
    shapes = _shapes(model)
    for name, fill in _fills(model):
        full = torch.empty(shapes[name])
        model.init_weights(name, full, generator)
        fill(full.__getitem__)


def read_generation_config(directory) -> dict:
    """The fields of a directory's generation_config.json that a fine-tuned model keeps; {} where there is none.

    An eos_token_id of null says nothing: then config.json's counts.
    """
    values = read_json(Path(directory) / "generation_config.json")
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_from_model_config")
            and not (key == "eos_token_id" and value is None)}


def _named_as(model, tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names of a model or its class: those of a bare LlamaModel or BloomModel (BLOOM's own files) lack
    a prefix.
    """
    prefix, renamed = model.EMBEDDING.partition(".")[0] + ".", {}
    for key, stored in tensors.items():
        name = key if key.startswith(prefix) or key == HEAD else prefix + key
        if name in renamed:
            raise UserError(f"{stored.path}: tensors {renamed[name].key} and {key} are both {name}")
        renamed[name] = stored
    return renamed


def _equal(a: Stored, b: Stored) -> bool:
    if a.shape != b.shape:
        return False
    some = [slice(i, min(i + ROWS, a.shape[0])) for i in range(0, a.shape[0], ROWS)]
    return all(torch.equal(a.read(rows), b.read(rows)) for rows in some)


def _materialise(model, device):
    if next(model.parameters()).is_meta:
        model.to_empty(device=device)
        model.tie_weights()


def _shapes(model) -> dict[str, tuple]:
    """The shape of each tensor of the base model by its name in files, those that are held in NF4 included."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not is_adapter(name)}
    return shapes | {name: (layer.out_features, layer.in_features) for name, layer in nf4_layers(model).items()}


def _fills(model):
    """Yield each of these names with a function that fills the tensor from read(slices)."""
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            yield name, functools.partial(_fill, parameter)
    for name, layer in nf4_layers(model).items():  # quantised one at a time: no second whole tensor is ever held
        yield name, lambda read, layer=layer: layer.load(read(...).to(layer.codes.device))


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


def save_model(model, directory, tokenizer=None, generation_config=None):
    """Write a directory that transformers opens with the same logits. A collective: every rank must call it.

    generation_config: fields kept of the source model's (read_generation_config); bos, eos and pad of the tokenizer
    join them. An earlier model in the directory is replaced, anything else refused. Raises UserError, on every rank,
    and leaves what was there, if rank 0 cannot write.
    """
    directory = Path(directory).resolve()
    tensors = _gather(model)
    error = None
    if is_first():
        try:
            check_target(directory)
            _write_directory(model, directory, tokenizer, generation_config or {}, tensors)
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
    others = [path.name for path in directory.iterdir()
              if not MODEL_FILES.fullmatch(path.name)] if directory.exists() else []
    if others:
        raise UserError(f"{directory}: holds {min(others)}, which is no part of a model and would be lost; "
                        "expected a new directory or an earlier model's")


@torch.no_grad()
def _gather(model):
    """The full tensors one at a time in the embedding's type, a tied head not repeated; a collective where sharded."""
    for name, parameter in model.named_parameters():
        assert not is_adapter(name), "merge the adapters before the model is saved"
        yield full_tensor(parameter.to(model.embedding.weight.dtype))


def _write_directory(model, directory, tokenizer, generation_config, tensors):
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not directory.exists():  # a save was killed between the two renames below
        os.rename(old, directory)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        ids = _special_ids(tokenizer, {"eos_token_id": model.config.eos_token_id} | generation_config)
        dtype = model.embedding.weight.dtype
        write_json(partial / "config.json", {
            **model.config.to_dict(), **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
        write_json(partial / "generation_config.json", {**generation_config, **ids})
        if tokenizer is not None:
            tokenizer.save(partial, getattr(model.config, "max_position_embeddings", None))
        write_tensors(partial, {name: p.numel() * dtype.itemsize for name, p in model.named_parameters()}, tensors)
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

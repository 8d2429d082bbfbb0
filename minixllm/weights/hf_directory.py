"""Hugging Face model directories, both ways: config.json and safetensors <-> a model, plain or sharded by FSDP2.

Reading takes the memory of the model plus one tensor, and each rank reads only the slices it keeps. Writing gathers
one tensor at a time, and the directory appears whole or not at all.
"""

import dataclasses
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import init
from torch.overrides import TorchFunctionMode

from minixllm.distributed import full_tensor, is_first, is_sharded
from minixllm.errors import UserError, expect
from minixllm.files import read_json, replacing, what_kind, write_json
from minixllm.models.bloom import Bloom
from minixllm.models.llama import Llama
from minixllm.models.lora import is_adapter
from minixllm.models.nf4 import nf4_layers
from minixllm.tokenizers import has_tokenizer, load_tokenizer
from minixllm.tokenizers.base import COMPANIONS
from minixllm.weights.safetensors_files import check_shapes, find_tensors, what_instead, write_tensors

ARCHITECTURES = {model.config_class.model_type: model for model in (Llama, Bloom)}  # by config.json's model_type
HEAD = "lm_head.weight"
# What a model directory may hold, and what a save may therefore replace; file managers leave hidden files there.
MODEL_FILES = {"config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json", *COMPANIONS}
WEIGHTS_OR_HIDDEN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|\..*")


def read_directory(directory, adapter=None):
    """(config, tokenizer) of a directory. Raises UserError if the tokenizer has ids beyond the embedding.

    A tokenizer with fewer ids is fine, because embeddings are often padded. adapter: the directory of an adapter of
    this model. Where it has a tokenizer or a generation_config.json of its own, these are used.
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
    from the embedding is a head of its own, whatever config.json says. `adapter` as for `read_directory`.
    """
    directory = Path(directory)
    path, is_adapted = directory / "config.json", (directory / "adapter_config.json").exists()
    if not directory.is_dir():
        found = what_kind(directory) or "a file" if directory.exists() else "nothing there"
        raise UserError(f"{directory}: found {found}, expected a Hugging Face model directory on this disk, such as "
                        "`hf download NAME --local-dir DIR` makes")
    if not path.exists():
        if (directory / "model" / "config.json").exists():  # the output of a training run
            raise UserError(f"{directory}: no config.json; expected a model, such as {directory / 'model'}")
        raise UserError(f"{directory}: " + ("found a PEFT adapter, expected a model (an adapter's base, for one)"
                                            if is_adapted else f"no config.json; {what_instead(directory)}"))
    values = read_json(path)
    config = _parse(values, path)
    for folder in filter(None, (directory, adapter)):  # a chat model's stop tokens may stand in this file alone
        if "eos_token_id" in (generation := read_generation_config(folder)):
            config = _parse(values | {"eos_token_id": generation["eos_token_id"]},
                            Path(folder) / "generation_config.json")

    tensors = find_tensors(directory)
    if is_adapted and (directory / "adapter_model.safetensors").exists():
        raise UserError(f"{directory}: found a model and a PEFT adapter, expected one of them")
    if config.num_hidden_layers > len(tensors):  # rather than build a billion layers to find them missing
        raise UserError(f"{path}: num_hidden_layers: found {config.num_hidden_layers}, "
                        f"but there are only {len(tensors)} tensors in {directory}")
    if config.tie_word_embeddings:
        model_class = ARCHITECTURES[config.model_type]
        named = _by_name(model_class, tensors)
        embedding, head = named.get(model_class.EMBEDDING), named.get(HEAD)
        if embedding and head and not embedding.equals(head):
            config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def read_generation_config(directory) -> dict:
    """The fields of a directory's generation_config.json that a fine-tuned model keeps; {} where there is none.

    An eos_token_id of null is left out, so that config.json's counts.
    """
    values = read_json(Path(directory) / "generation_config.json")
    return {key: value for key, value in values.items() if key not in ("transformers_version", "_from_model_config")
            and not (key == "eos_token_id" and value is None)}


def build(config, dtype=torch.float32, where="config.json"):
    """A model on the meta device, without storage. It may be sharded, and is filled by `load_weights` or `initialise`.

    where: the file that errors name.
    """
    try:
        with torch.device("meta"), _Undrawn():
            return ARCHITECTURES[config.model_type](config).to(dtype)
    except RuntimeError as error:
        raise UserError(f"{where}: sizes of which no model can be built: {error}") from None


@torch.no_grad()
def load_weights(model, directory, device="cpu"):
    """Fill a model with a directory's tensors. Under FSDP2 each rank reads only the slices it keeps.

    A model on the meta device gets its storage on `device`, once the directory is known to fit. Each tensor is
    converted to the model's dtype as it is read. LoRA's parameters are not touched: `lora.initialise` or an adapter's
    file fills them. Raises UserError when a tensor is missing, unexpected or of another shape.
    """
    tensors = _by_name(model, find_tensors(directory))
    if model.config.tie_word_embeddings and (head := tensors.pop(HEAD, None)):
        tensors.setdefault(model.EMBEDDING, head)  # read_config has found that both are equal, or that one is absent
    check_shapes(tensors, _shapes(model), f"{directory}: the tensors are not those that config.json describes")
    _fill(model, device, lambda name: tensors[name].read)


@torch.no_grad()
def initialise(model, seed: int, device="cpu"):
    """Random weights, the same at any world size: every rank draws the full tensors from one seed and keeps its slices.

    LoRA's parameters are not touched: `lora.initialise` fills them.
    """
    generator, shapes = torch.Generator().manual_seed(seed), _shapes(model)

    def draw(name):
        return initial(name, torch.empty(shapes[name]), model.config.initializer_range, generator).__getitem__

    _fill(model, device, draw)


def initial(name: str, tensor: torch.Tensor, std: float, generator) -> torch.Tensor:
    """Fill the whole tensor of one parameter as Hugging Face does: biases 0, weights of norms 1, others Gaussian."""
    if name.endswith(".bias"):
        return tensor.zero_()
    return tensor.fill_(1.0) if tensor.dim() == 1 else tensor.normal_(0.0, std, generator=generator)


class _Undrawn(TorchFunctionMode):
    """Embeddings get no random values, which on the meta device would load PyTorch's compiler, for a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return None if function is init.normal_ else function(*args, **(kwargs or {}))


def _parse(values: dict, path):
    """The config that `values` describe; errors name `path`."""
    try:
        kind = expect(values.get("model_type"), str, "model_type", choices=tuple(ARCHITECTURES))
        return ARCHITECTURES[kind].config_class.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _by_name(model, tensors: dict) -> dict:
    """The tensors by the names that the model, or its class, gives them.

    Files of a bare LlamaModel or BloomModel, such as BLOOM's own, lack the first part of each name.
    """
    prefix, named = model.EMBEDDING.partition(".")[0] + ".", {}
    for key, stored in tensors.items():
        name = key if key.startswith(prefix) or key == HEAD else prefix + key
        if name in named:
            raise UserError(f"{stored.path}: tensors {named[name].key} and {key} are both {name}")
        named[name] = stored
    return named


def _shapes(model) -> dict[str, tuple]:
    """The shape of each tensor of the base model by its name in files. Those that are held in NF4 are among them."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if not is_adapter(name)}
    return shapes | {name: (layer.out_features, layer.in_features) for name, layer in nf4_layers(model).items()}


def _fill(model, device, source):
    """Fill the base model, giving it storage first. source(name): a function that reads any rows of that tensor."""
    if next(model.parameters()).is_meta:
        # What Module.to_empty does; but that loads sympy, for half a second.
        model._apply(lambda tensor: tensor.new_empty(tensor.shape, device=device))
        model.tie_weights()  # a tied head has got a storage of its own
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        read, rows, local = source(name), slice(0, parameter.shape[0]), parameter
        if is_sharded(parameter):  # FSDP2 cuts the rows as torch.chunk does: the last share may be short
            local, mesh = parameter.to_local(), parameter.device_mesh
            start = -(-rows.stop // mesh.size()) * mesh.get_local_rank()
            rows = slice(start, start + len(local))
        if local.numel():  # a small tensor may have no row for this rank
            local.copy_(read(rows))
    for name, layer in nf4_layers(model).items():  # quantised one by one: only one whole tensor is held at a time
        layer.load(source(name)(...).to(layer.codes.device))


def save_model(model, directory, tokenizer=None, generation_config=None):
    """Write a directory that transformers opens with the same logits. A collective: every rank must call it.

    generation_config: fields kept of the source model's (read_generation_config); bos, eos and pad of the tokenizer
    join them. An earlier model in the directory is replaced, anything else refused. If rank 0 cannot write, every rank
    raises UserError and the directory stays as it was.
    """
    directory = Path(directory).resolve()
    tensors = _gather(model)
    error = None
    if is_first():
        try:
            check_target(directory)
            with replacing(directory) as partial:
                _write_directory(model, partial, tokenizer, generation_config or {}, tensors)
        except Exception as caught:
            error = caught
    for _ in tensors:  # a rank that does not write, or no longer, must still take part in the gathers that are left
        pass
    message = [error and f"{directory}: not saved: {error}"]
    if dist.is_initialized():
        dist.broadcast_object_list(message, src=0)  # the other ranks also wait here until the directory is there
    if error and not isinstance(error, (OSError, UserError)):
        raise error
    if message[0]:
        raise UserError(message[0]) from error


def check_target(directory):
    """Raise UserError for a directory that a save must not replace: one that holds anything but a model's files."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: found a file, expected a directory or nothing")
    names = os.listdir(directory) if directory.exists() else []
    if others := [name for name in names if name not in MODEL_FILES and not WEIGHTS_OR_HIDDEN.fullmatch(name)]:
        raise UserError(f"{directory}: holds {min(others)}, which is no part of a model and would be lost; "
                        "expected a new directory or an earlier model's")


@torch.no_grad()
def _gather(model):
    """The full tensors one at a time, in the embedding's dtype; a tied head comes once. A collective where sharded."""
    for name, parameter in model.named_parameters():
        assert not is_adapter(name), "merge the adapters before the model is saved"
        yield full_tensor(parameter.to(model.embedding.weight.dtype))


def _write_directory(model, directory, tokenizer, generation_config, tensors):
    ids, dtype = {}, model.embedding.weight.dtype
    if tokenizer is not None:
        ids = _special_ids(tokenizer, generation_config.get("eos_token_id", model.config.eos_token_id))
        tokenizer.save(directory, getattr(model.config, "max_position_embeddings", None))
    write_json(directory / "config.json",
               {**model.config.to_dict(), **ids, "torch_dtype": str(dtype).removeprefix("torch.")})
    write_json(directory / "generation_config.json", {**generation_config, **ids})
    write_tensors(directory, {name: p.numel() * dtype.itemsize for name, p in model.named_parameters()}, tensors)


def _special_ids(tokenizer, stops) -> dict:
    """The tokenizer's bos, eos and pad; its eos with the source model's other stop tokens, `stops`, an id or a list."""
    others = [stop for stop in (stops if isinstance(stops, list) else [stops]) if stop not in (None, tokenizer.eos_id)]
    eos = [tokenizer.eos_id, *others] if tokenizer.eos_id is not None else others
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos if others else tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id}

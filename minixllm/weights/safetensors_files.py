"""safetensors files: the tensors of a directory found and read one at a time, or written as they come.

Format (https://huggingface.co/docs/safetensors): a length, a JSON header, then raw little-endian tensors. A model is
one such file, or shards beside an index. Pickle files are never read, nor any file outside the directory.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from minixllm.errors import UserError
from minixllm.files import read_json, write_json

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their name in the header
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    key: str
    shape: tuple[int, ...]

    def read(self, slices=...) -> torch.Tensor:
        """The tensor, or a part of it, in the file's dtype; use it before the next one is read."""
        # The file is mapped anew for each tensor: what was read of a mapping counts as our memory until it closes.
        with open_tensors(self.path) as file:
            return file.get_slice(self.key)[slices]


def find_tensors(directory) -> dict[str, Stored]:
    """Every tensor of a model directory by its key. Raises UserError for absent or contradictory files."""
    directory = Path(directory)
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() and index.exists():
        raise UserError(f"{directory}: found both {SINGLE} and {INDEX}, expected one of them")
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise UserError(f"{directory}: {what_instead(directory)}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{index}: weight_map: expected an object from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:  # a plain name; as a symbolic link it may lead elsewhere, as in the Hub's own cache
        if shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: weight_map: found {shard!r}, expected a .safetensors file of this directory")
    strays = sorted({path.name for path in directory.glob("model-*-of-*.safetensors")} - set(shards))
    if strays:
        raise UserError(f"{directory}: {strays[0]} is not in {INDEX}: two models may be mixed here")
    tensors = {}
    for shard in shards:
        for key, stored in read_header(directory / shard).items():
            if key in tensors:
                raise UserError(f"{stored.path}: tensor {key} is also in {tensors[key].path.name}")
            tensors[key] = stored
    for key in weight_map.keys() | tensors.keys():
        found = tensors[key].path.name if key in tensors else None
        if found != weight_map.get(key):
            raise UserError(f"{index}: tensor {key}: found in {found}, expected in {weight_map.get(key)}")
    return tensors


def read_header(path) -> dict[str, Stored]:
    """Every tensor of one file by its key."""
    tensors = {}
    with open_tensors(path) as file:
        for key in file.keys():
            view = file.get_slice(key)
            if view.get_dtype() not in DTYPES:
                raise UserError(f"{path}: tensor {key}: found {view.get_dtype()}, expected one of {', '.join(DTYPES)}")
            tensors[key] = Stored(Path(path), key, tuple(view.get_shape()))
    return tensors


@contextlib.contextmanager
def open_tensors(path):
    """safetensors' own handle of a file, its errors turned into UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: expected a safetensors file, found {what_kind(path)} ({error})") from None


def fingerprint(directory) -> str:
    """Tells the weights in a directory from others, by the middle row of each tensor: all would take long to read."""
    digest = hashlib.sha256()
    for key, stored in sorted(find_tensors(directory).items()):
        digest.update(repr((key, stored.shape)).encode())
        middle = slice(stored.shape[0] // 2, stored.shape[0] // 2 + 1) if stored.shape else ...
        digest.update(stored.read(middle).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def what_kind(path, otherwise: str = "a truncated or corrupt one") -> str:
    """What people hand over in place of safetensors, told by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(64)
    known = {b"GGUF": "a GGUF file", b"PK\x03\x04": "a PyTorch pickle", b"\x80": "a pickle",
             b"version https://git-lfs": "a Git LFS pointer whose content was not downloaded"}
    kind = next((kind for magic, kind in known.items() if start.startswith(magic)), otherwise)
    return kind if start else "an empty file"


def what_instead(directory) -> str:
    """What a directory without safetensors holds instead, and what to do about it."""
    weights = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    found = sorted(path.name for path in Path(directory).iterdir() if path.suffix in weights)
    return (f"found {', '.join(found[:3]) or 'no weights'}, expected {SINGLE} or {INDEX} "
            "(pickle and GGUF are not read; transformers opens both, and its save_pretrained writes safetensors)")


def write_tensors(directory, shapes: dict[str, tuple], dtype: torch.dtype, tensors):
    """Write `tensors`, an iterator of tensors in the order of `shapes`, holding one at a time.

    One file, or shards of at most MAX_SHARD_BYTES with an index.
    """
    directory, shards, room = Path(directory), [], 0
    for name, shape in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append({})
            room = MAX_SHARD_BYTES
        shards[-1][name] = size
        room -= size
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    stored = next(name for name, value in DTYPES.items() if value == dtype)
    for file_name, shard in zip(files, shards):
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, size in shard.items():
            header[name] = {"dtype": stored, "shape": list(shapes[name]), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        with open(directory / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in shard:
                file.write(next(tensors).cpu().contiguous().view(-1).view(torch.uint8).numpy())
            file.flush()
            os.fsync(file.fileno())
    if count > 1:
        write_json(directory / INDEX, {
            "metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
            "weight_map": {name: file_name for file_name, shard in zip(files, shards) for name in shard}})

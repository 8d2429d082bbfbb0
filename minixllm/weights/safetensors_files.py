"""safetensors files: the tensors of a directory found and read one at a time, or written as they come.

Format (https://huggingface.co/docs/safetensors): a length, a JSON header, then raw little-endian tensors. A model is
one such file, or shards beside an index. Pickle files are never read, nor any file outside the directory.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minixllm.errors import UserError, expect
from minixllm.files import read_json, what_kind, write_json

FLOATS = ("F32", "BF16", "F16", "F64")  # types by their names in a file
# Buffers that older programs wrote beside the weights. They follow from the config, whatever their type.
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.\w+|position_ids|causal_mask|alibi|(self_)?att(n|ention)\.(masked_)?bias)")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
ROWS = 4096  # of two tensors that are compared at once


class Stored(NamedTuple):
    """A tensor in a file, not read yet."""

    path: Path
    key: str
    shape: tuple[int, ...]
    file: safe_open

    def read(self, slices=...) -> torch.Tensor:
        """The tensor, or a part of it, in the file's dtype."""
        return self.file.get_slice(self.key)[slices]

    def equals(self, other: "Stored") -> bool:
        """Whether both hold the same numbers; a few thousand rows are read at a time."""
        parts = [slice(i, min(i + ROWS, self.shape[0])) for i in range(0, self.shape[0], ROWS)]
        return self.shape == other.shape and all(torch.equal(self.read(rows), other.read(rows)) for rows in parts)


def find_tensors(directory) -> dict[str, Stored]:
    """Every tensor of a model directory by its key. Raises UserError for absent or contradictory files.

    A single file counts before an index with its shards, as for transformers.
    """
    directory = Path(directory)
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if not index.exists():
        raise UserError(f"{directory}: {what_instead(directory)}")
    where, tensors = f"{index}: weight_map", {}
    weight_map = expect(read_json(index).get("weight_map"), dict, where)
    for key, shard in weight_map.items():  # a name must not lead elsewhere; a symbolic link may, as the Hub's do
        if expect(shard, str, f"{where}: {key}") != Path(shard).name or not shard.endswith(".safetensors"):
            raise UserError(f"{where}: found {shard!r}, expected a .safetensors file of this directory")
    shards = set(weight_map.values())
    if strays := {path.name for path in directory.glob("model-*-of-*.safetensors")} - shards:
        raise UserError(f"{directory}: {min(strays)} is not in {INDEX}: two models may be mixed here")
    for shard in sorted(shards):
        for key, stored in read_header(directory / shard).items():
            if weight_map.get(key) != shard:
                raise UserError(f"{index}: tensor {key}: found in {shard}, expected in {weight_map.get(key)}")
            tensors[key] = stored
    if missing := [key for key in weight_map if key not in tensors and not BUFFERS.fullmatch(key)]:
        raise UserError(f"{index}: tensor {missing[0]}: found in None, expected in {weight_map[missing[0]]}")
    return tensors


def check_shapes(tensors: dict[str, Stored], shapes: dict[str, tuple], where: str):
    """Raise UserError, beginning with `where`, unless the tensors have exactly these names and shapes.

    It counts what is wrong and names the first of each kind: a message has room for few names.
    """
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [stored.key for name, stored in tensors.items() if name not in shapes],
        "misshaped": [f"{name} (found {list(tensors[name].shape)}, expected {list(shape)})"
                      for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]}
    if any(problems.values()):
        raise UserError(f"{where}: " + "; ".join(f"{len(names)} {problem}: {names[0]}" + ", ..." * (len(names) > 1)
                                                 for problem, names in problems.items() if names))


def read_header(path) -> dict[str, Stored]:
    """Every tensor of one file by its key, buffers left out. The file stays open as long as one of them is kept."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        # "pread" does not map the file: mapped pages would count as this process's memory until the file is closed.
        file = safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        found = what_kind(path) or "an empty, truncated or corrupt one"
        raise UserError(f"{path}: expected a safetensors file, found {found} ({error})") from None
    tensors = {}
    for key in file.keys():
        if not BUFFERS.fullmatch(key):
            view = file.get_slice(key)
            expect(view.get_dtype(), str, f"{path}: tensor {key}", choices=FLOATS)
            tensors[key] = Stored(Path(path), key, tuple(view.get_shape()), file)
    return tensors


def fingerprint(directory) -> str:
    """A hash that tells a directory's weights from others, of the middle row of each tensor: reading all takes long."""
    digest = hashlib.sha256()
    for key, stored in sorted(find_tensors(directory).items()):
        digest.update(repr((key, stored.shape)).encode())
        middle = slice(stored.shape[0] // 2, stored.shape[0] // 2 + 1) if stored.shape else ...
        digest.update(stored.read(middle).contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def what_instead(directory) -> str:
    """What a directory without safetensors holds instead, and what to do about it."""
    weights = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
    found = sorted(path.name for path in Path(directory).iterdir() if path.suffix in weights)
    return (f"found {', '.join(found[:3]) or 'no weights'}, expected {SINGLE} or {INDEX} "
            "(pickle and GGUF are not read; transformers opens both, and its save_pretrained writes safetensors)")


def write_tensors(directory, sizes: dict[str, int], tensors):
    """Write `tensors`, an iterator of tensors in the order of `sizes` (their bytes by name), a file at a time.

    One file, or shards of at most MAX_SHARD_BYTES with an index.
    """
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards, room = [*shards, []], MAX_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    count, weight_map = len(shards), {}
    for i, names in enumerate(shards, 1):
        file_name = SINGLE if count == 1 else f"model-{i:05}-of-{count:05}.safetensors"
        shard = {name: next(tensors).cpu().contiguous() for name in names}
        try:
            save_file(shard, Path(directory) / file_name, metadata={"format": "pt"})
        except SafetensorError as error:  # above all a full disk, which is no OSError here
            raise UserError(f"{file_name}: {error}") from None
        weight_map |= dict.fromkeys(names, file_name)
        del shard  # free its memory before the next one is gathered
    if count > 1:
        write_json(Path(directory) / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})

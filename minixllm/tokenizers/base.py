"""What every tokenizer shares: the files of a model directory and the special tokens they choose."""

import hashlib
from pathlib import Path

from minixllm.errors import UserError
from minixllm.files import atomic_write, read_json, write_json

# A tokenizer's files in a model directory, besides the one it is read from; `save` carries them along.
COMPANIONS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template.jinja")


class Tokenizer:
    """What both kinds share: the files beside the model, and which ids they choose as bos, eos and pad.

    Attributes: vocab_size, bos_id, eos_id, pad_id, special_texts (how special tokens are written), and `fingerprint`, a sha256 of everything the ids depend on (the
    key of token caches). Pickles as its path, so that worker processes read the file again.
    """

    def __init__(self, path):
        self.path = Path(path)
        beside = self.path.parent
        self.config = read_json(beside / "special_tokens_map.json") | read_json(beside / "tokenizer_config.json")
        try:
            self.model_bytes = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer to read: {error.strerror}") from None

    def __reduce__(self):
        return type(self), (self.path,)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, without the EOS that some tokenizers put after every text: here the answer follows."""
        ids = self.encode(text, add_special_tokens=True)
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def choose_special(self, ids: dict[str, int], defaults: dict[str, int | None]):
        """Set bos_id, eos_id, pad_id from the names in tokenizer_config.json, else from `defaults`.

        ids: the id of each token by its text.
        """
        for kind in ("bos", "eos", "pad"):
            name = self.config.get(f"{kind}_token")
            name = name.get("content") if isinstance(name, dict) else name
            if name is not None and (not isinstance(name, str) or name not in ids):
                raise UserError(f"{self.path.parent / 'tokenizer_config.json'}: {kind}_token {name!r} is no token "
                                f"of {self.path.name}")
            setattr(self, f"{kind}_id", defaults.get(kind) if name is None else ids[name])

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.path.parent / 'tokenizer_config.json'}: {key} is {value!r}, expected true or false")
        return default if value is None else value

    def sign(self, *choices):
        self.fingerprint = hashlib.sha256(self.model_bytes + repr(choices).encode()).hexdigest()

    def save_files(self, directory, name: str, config: dict):
        """Write the model as `name`, `config` as tokenizer_config.json, and the companions of the original."""
        directory = Path(directory)
        with atomic_write(directory / name, "wb") as file:
            file.write(self.model_bytes)
        write_json(directory / "tokenizer_config.json", config)
        for companion in COMPANIONS:
            original = self.path.parent / companion
            if companion != name and original.exists():
                content = original.read_bytes()  # before the write: the directory may be the original's
                with atomic_write(directory / companion, "wb") as file:
                    file.write(content)

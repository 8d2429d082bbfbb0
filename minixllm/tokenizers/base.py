"""What every tokenizer shares: the files of a model directory, its special tokens, and text from ids."""

import codecs
import hashlib
from pathlib import Path

from minixllm.errors import UserError, check_text
from minixllm.files import read_json, write_json

# The other files of a tokenizer in a model directory. `save` carries them along.
COMPANIONS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template.jinja")

# SentencePiece writes one U+FFFD for each byte that is no UTF-8, where Python's "replace" writes one for several.
codecs.register_error("each byte", lambda error: ("\ufffd" * (error.end - error.start), error.end))


class Tokenizer:
    """What all kinds share. A kind offers `encode_text(text) -> ids`, and sets these attributes:

    CLASS: the class that `transformers` opens the directory with; adds_space: whether a text gets a first space.
    vocab_size; bos_id, eos_id, pad_id (None where there is none); special_texts, how special tokens are written.
    prefix and suffix: the ids that the model's own tokenizer puts before and after a text.
    pieces: the UTF-8 bytes of every id that is text; control tokens have none.
    spaced: ids whose first byte, a space, is dropped at the beginning of a text, because `encode` put it there.
    fingerprint: a sha256 of everything the ids depend on, for the keys of token caches.
    A tokenizer pickles as its path, so that worker processes read the file again.
    """

    FILE: str                   # the name of the file that holds the vocabulary
    FLAGS = ()                  # those of add_bos_token and add_eos_token that tokenizer_config.json must have
    BAD_BYTES = "replace"       # how bytes that are no UTF-8 are decoded (codecs' error handlers)
    spaced = frozenset()
    trims = False               # whether all spaces at the beginning of a text are dropped, and not only the first

    def __init__(self, path):
        self.path = Path(path)
        self.config_path = self.path.with_name("tokenizer_config.json")
        self.config = read_json(self.path.with_name("special_tokens_map.json")) | read_json(self.config_path)
        try:
            self.model_bytes = self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: no tokenizer to read: {error.strerror}") from None

    def __reduce__(self):
        return type(self), (self.path,)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; with add_special_tokens, between `prefix` and `suffix`.

        Special tokens typed in `text` are text. Raises UserError for half of a surrogate pair, which has no UTF-8.
        """
        try:
            ids = self.encode_text(text)
        except (UnicodeEncodeError, RuntimeError):  # RuntimeError is the `sentencepiece` library's
            check_text(text)
            raise
        return self.prefix + ids + self.suffix if add_special_tokens else ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt, without the EOS that some tokenizers put after every text: here the answer follows."""
        ids = self.encode(text, add_special_tokens=True)
        return ids[:-1] if ids and ids[-1] == self.eos_id else ids

    def decode(self, ids) -> str:
        """The text of `ids`; control tokens and ids beyond the vocabulary (an embedding's padding) give nothing."""
        stream = self.stream()
        return stream.utf8.decode(b"".join(map(stream.bytes_of, map(int, ids))), final=True)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def choose_special(self, ids: dict[str, int], defaults: dict[str, int | None]):
        """Set bos_id, eos_id, pad_id from the names in tokenizer_config.json, else from `defaults`.

        ids: the id of each token by its text.
        """
        self.names = {}
        for kind in ("bos", "eos", "pad"):
            name = self.config.get(f"{kind}_token")
            name = name.get("content") if isinstance(name, dict) else name
            if name is not None and (not isinstance(name, str) or name not in ids):
                raise UserError(f"{self.config_path}: {kind}_token {name!r} is no token of {self.path.name}")
            chosen = defaults.get(kind) if name is None else ids[name]
            setattr(self, f"{kind}_id", chosen)
            if name is None and chosen is not None:
                name = next(text for text, i in ids.items() if i == chosen)
            self.names[f"{kind}_token"] = name

    def set_fingerprint(self, *more):
        """more: what the ids depend on besides the bytes of the file and the special tokens."""
        choices = self.prefix, self.suffix, self.bos_id, self.eos_id, self.pad_id, *more
        self.fingerprint = hashlib.sha256(self.model_bytes + repr(choices).encode()).hexdigest()

    def save(self, directory, max_length: int | None = None):
        """Write the tokenizer's files into a model directory, so that other programs give the same ids.

        tokenizer_config.json keeps what it said and also says what a reader would guess otherwise: the class, the
        special tokens, whether BOS, EOS and a first space are added, and the longest text (max_length, in tokens).
        One difference stays: `transformers` reads special tokens typed in a text as such unless it is called with
        split_special_tokens=True.
        """
        directory = Path(directory)
        config = {"tokenizer_class": self.CLASS, "clean_up_tokenization_spaces": False} | self.config
        limit = config.get("model_max_length")
        if max_length and (limit is None or type(limit) in (int, float) and limit > 1e18):  # transformers' "unknown"
            config["model_max_length"] = max_length
        config |= {key: name for key, name in self.names.items() if config.get(key) is None}
        flags = {"add_bos_token": bool(self.prefix), "add_eos_token": bool(self.suffix)}
        config |= {key: value for key, value in flags.items() if key in config or key in self.FLAGS}
        config["add_prefix_space"] = self.adds_space
        directory.mkdir(parents=True, exist_ok=True)
        (directory / self.FILE).write_bytes(self.model_bytes)
        write_json(directory / "tokenizer_config.json", config)
        for companion in COMPANIONS:
            original = self.path.with_name(companion)
            if companion != self.FILE and original.exists():
                (directory / companion).write_bytes(original.read_bytes())


class TextStream:
    """Text from ids that arrive one by one: `push(id)` gives the text that is complete, `flush()` the rest.

    The first bytes of a character wait for the others. All texts joined equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.begun = tokenizer, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.BAD_BYTES)

    def push(self, i: int) -> str:
        return self.utf8.decode(self.bytes_of(int(i)))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)

    def bytes_of(self, i: int) -> bytes:
        data = self.tokenizer.pieces.get(i, b"")
        if data and not self.begun:
            dropped = i in self.tokenizer.spaced
            data = data[dropped:]
            self.begun = bool(data) or not self.tokenizer.trims
        return data

"""Text <-> token ids: SentencePiece models and byte-level BPE, read from the files Hugging Face users have.

A tokenizer here offers `encode`, `decode`, `stream`, `save` and the ids `bos_id`, `eos_id`, `pad_id` (None where the
model has none). What a user types is only ever text: "</s>" in it gives ordinary pieces, never the control id.
"""

import codecs
import hashlib
import io
import itertools
import json
import re
from pathlib import Path

from minixllm import byte_bpe
from minixllm.errors import UserError, atomic_write

# A tokenizer's files in a model directory, besides the one it is read from; `save` carries them along.
COMPANIONS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
              "chat_template.jinja")


class Tokenizer:
    """What both kinds share: the files beside the model, and which ids they choose as bos, eos and pad.

    Attributes: vocab_size, bos_id, eos_id, pad_id, and `fingerprint`, a sha256 of everything the ids depend on (the
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

    def choose_special(self, ids: dict[str, int], defaults: dict[str, int | None]):
        """Set bos_id, eos_id, pad_id from the names in tokenizer_config.json, else from `defaults`.

        ids: the id of each token by its text.
        """
        for kind in ("bos", "eos", "pad"):
            name = self.config.get(f"{kind}_token")
            name = name.get("content") if isinstance(name, dict) else name
            if name is not None and name not in ids:
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
        """Write the model as `name`, `config` as tokenizer_config.json, and the companions found beside the original."""
        directory = Path(directory)
        with atomic_write(directory / name, "wb") as file:
            file.write(self.model_bytes)
        with atomic_write(directory / "tokenizer_config.json") as file:
            json.dump(config, file, ensure_ascii=False, indent=2)
        for companion in COMPANIONS:
            original = self.path.parent / companion
            if companion != name and original.exists():
                content = original.read_bytes()  # before the write: the directory may be the original's
                with atomic_write(directory / companion, "wb") as file:
                    file.write(content)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (`tokenizer.model`) with the choices of the tokenizer_config.json beside it, if any.

    The ids are those of the `sentencepiece` library itself. Tokens that the configuration adds after the model's own
    vocabulary (a "<pad>" at 32000) are control tokens: text never gives them.
    Raises UserError: no file, not a SentencePiece model, a special token that does not exist.
    """

    def __init__(self, path):
        super().__init__(path)
        import sentencepiece

        try:
            self.model = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"empty")
        except (RuntimeError, OSError):
            raise UserError(f"{self.path}: not a SentencePiece model, or a damaged one") from None
        size = self.model.vocab_size()
        added = self._added_tokens(size)
        self.vocab_size = max([size - 1, *added.values()]) + 1
        ids = {self.model.id_to_piece(i): i for i in range(size)} | added
        defaults = {kind: i if i >= 0 else None for kind, i in (
            ("bos", self.model.bos_id()), ("eos", self.model.eos_id()), ("pad", self.model.pad_id()))}
        self.choose_special(ids, defaults)
        # A model may hold a chosen special token as "user defined", which text would match.
        self.control = {self.bos_id, self.eos_id, self.pad_id} - {None, self.model.unk_id()} | set(added.values())
        self.spelt = {i: [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in self.model.id_to_piece(i).encode()]
                      for i in self.control if i < size and not self.model.is_control(i)}
        self.control |= {i for i in range(size) if self.model.is_control(i)}
        self.bytes = {i: int(self.model.id_to_piece(i)[3:5], 16) for i in range(size) if self.model.is_byte(i)}
        self.prefix = [self.bos_id] if self.flag("add_bos_token", True) and self.bos_id is not None else []
        self.suffix = [self.eos_id] if self.flag("add_eos_token", False) and self.eos_id is not None else []
        self.sign(self.prefix, self.suffix, self.bos_id, self.eos_id, self.pad_id, sorted(added.items()))

    def _added_tokens(self, size: int) -> dict[str, int]:
        """Tokens beyond the model's own `size`, by text, from added_tokens.json and tokenizer_config.json."""
        added = dict(read_json(self.path.parent / "added_tokens.json"))
        for key, token in self.config.get("added_tokens_decoder", {}).items():
            if int(key) >= size and not token.get("special", False):
                raise UserError(f"{self.path.parent / 'tokenizer_config.json'}: added_tokens_decoder: {key} "
                                f"({token['content']!r}) is no special token; only special ones can be added to a "
                                "SentencePiece model")
            added[token["content"]] = int(key)
        return {text: i for text, i in added.items() if i >= size}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; with add_special_tokens, between the BOS and EOS the model's own tokenizer adds.

        Raises UserError for text with lone surrogates, which no encoding can hold.
        """
        try:
            ids = self.model.encode(text)
        except RuntimeError:
            check_text(text)
            raise
        if self.spelt:  # a control token spelt out by a user becomes its bytes
            ids = [byte for i in ids for byte in self.spelt.get(i, (i,))]
        return self.prefix + ids + self.suffix if add_special_tokens else ids

    def decode(self, ids) -> str:
        """The text of `ids`; control tokens and ids beyond the vocabulary (an embedding's padding) give nothing."""
        return self.model.decode([i for i in map(int, ids) if self.is_text(i)])

    def is_text(self, i: int) -> bool:
        return i not in self.control and 0 <= i < self.model.vocab_size()

    def stream(self) -> "PieceStream":
        return PieceStream(self)

    def save(self, directory):
        """Write tokenizer.model and a tokenizer_config.json with which `transformers` opens the directory."""
        names = {f"{kind}_token": self.model.id_to_piece(i) for kind, i in (
            ("bos", self.model.bos_id()), ("eos", self.model.eos_id()), ("unk", self.model.unk_id()),
            ("pad", self.model.pad_id())) if i >= 0}
        self.save_files(directory, "tokenizer.model", {
            "tokenizer_class": "LlamaTokenizer", **names, "add_bos_token": True, "add_eos_token": False,
            "legacy": True, "clean_up_tokenization_spaces": False, **self.config})


class PieceStream:
    """Text as its ids arrive: `push(id)` gives what has become certain, `flush()` the rest.

    Byte-fallback pieces are held back until they make a whole character. All that is given out, joined, equals
    `decode` of all ids.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # only to know whether a character is under way
        self.ids, self.shown = [], 0

    def push(self, i: int) -> str:
        tokenizer = self.tokenizer
        if not tokenizer.is_text(i):
            return ""
        self.ids.append(i)
        if i in tokenizer.bytes:
            self.utf8.decode(bytes([tokenizer.bytes[i]]))
            return "" if self.utf8.getstate()[0] else self._show()
        self.utf8.reset()
        piece = self._show()
        alone = tokenizer.model.decode([i])
        if alone:  # the next piece can only depend on this one: forget those before it, and streaming stays linear
            self.ids, self.shown = [i], len(alone)
        return piece

    def flush(self) -> str:
        self.utf8.reset()
        return self._show()

    def _show(self) -> str:
        text = self.tokenizer.model.decode(self.ids)
        piece, self.shown = text[self.shown:], len(text)
        return piece


class ByteLevelBPE(Tokenizer):
    """A byte-level BPE in Hugging Face's `tokenizer.json`: BLOOM's, GPT-2's, LLaMA 3's, SmolLM2's and their like.

    The ids are those of `tokenizers` with encode_special_tokens = True: special tokens typed in a text are text.
    A component, flag or pattern other than theirs is refused by name, never ignored.
    Raises UserError naming the file and the key.
    """

    def __init__(self, path):
        super().__init__(path)
        content = read_json(self.path)
        model = self.get(content, "model", dict, "model")
        if self.get(content, "normalizer", dict, "normalizer", {}):
            self.refuse("normalizer", content["normalizer"].get("type"), "none (a file converted from SentencePiece "
                        "has one: put its tokenizer.model beside it, which is read instead)")
        self.steps = self._pre_tokenizer(content)
        decoder = self.get(content, "decoder", dict, "decoder", {}).get("type")
        if decoder != "ByteLevel":
            self.refuse("decoder", decoder, "ByteLevel")
        vocab, added = self._vocabulary(content, model)
        special = {token["id"] for token in added if token.get("special")}
        self.vocab_size = max(vocab.values()) + 1
        self.names = {token["id"]: token["content"] for token in added}
        self.pieces = self._byte_strings(vocab, added)
        self.merger = self._merger(model, vocab, special)
        self.control = special
        self.choose_special(vocab, {})
        self.prefix, self.suffix = self._post_processor(content, vocab)
        # Added tokens that are not special are found in text before anything else, the longest of those at one place.
        self.added = {token["content"]: token["id"] for token in added}
        texts = sorted(self.added, key=len, reverse=True) if len(special) < len(self.added) else []
        self.added_pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self.sign(self.prefix, self.suffix, self.bos_id, self.eos_id, self.pad_id)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of `text`; with add_special_tokens, between what the post-processor puts around one text (BOS).

        Raises UserError for text with lone surrogates, which no encoding can hold.
        """
        try:
            ids = self._encode(text)
        except UnicodeEncodeError:
            check_text(text)
            raise
        return self.prefix + ids + self.suffix if add_special_tokens else ids

    def _encode(self, text: str) -> list[int]:
        if self.added_pattern is None:
            return self._encode_ordinary(text)
        ids, start = [], 0
        for match in self.added_pattern.finditer(text):
            token = self.added[match.group()]
            if token not in self.control:
                ids += self._encode_ordinary(text[start:match.start()]) + [token]
                start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def _encode_ordinary(self, text: str) -> list[int]:
        return list(itertools.chain.from_iterable(map(self.merger.__getitem__, byte_bpe.split(self.steps, text))))

    def decode(self, ids) -> str:
        """The text of `ids`, bytes that are no UTF-8 as U+FFFD; control tokens and unknown ids give nothing."""
        return b"".join(map(self.bytes_of, ids)).decode("utf-8", "replace")

    def bytes_of(self, i: int) -> bytes:
        return b"" if i in self.control else self.pieces.get(int(i), "").encode("latin-1")

    def stream(self) -> "ByteStream":
        return ByteStream(self)

    def save(self, directory):
        """Write tokenizer.json and tokenizer_config.json, with which `transformers` opens the directory."""
        names = {f"{kind}_token": self.names[i] for kind, i in (
            ("bos", self.bos_id), ("eos", self.eos_id), ("pad", self.pad_id)) if i is not None}
        self.save_files(directory, "tokenizer.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False,
            **self.config})

    # ---- reading tokenizer.json ----

    def refuse(self, key: str, found, expected: str):
        raise UserError(f"{self.path}: {key} is {found!r}, expected {expected}")

    def get(self, section: dict, key: str, kind: type, name: str, default=None):
        """section[key], of the given type; null and absent give the default, or are refused where there is none."""
        value = section.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, kind):
            self.refuse(name, value, f"a JSON {'array' if kind is list else 'object'}")
        return value

    def _pre_tokenizer(self, content) -> tuple[str, ...]:
        """The splitting steps, a key of byte_bpe.PIECES."""
        section = self.get(content, "pre_tokenizer", dict, "pre_tokenizer")
        kind = section.get("type")
        parts = self.get(section, "pretokenizers", list, "pre_tokenizer.pretokenizers") if kind == "Sequence" else [section]
        steps = []
        for part in parts:
            match part:
                case {"type": "ByteLevel", "add_prefix_space": False}:
                    steps += [byte_bpe.GPT2] if part.get("use_regex", True) else []
                case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                    steps.append(pattern)
                case {"type": "Digits", "individual_digits": True}:
                    steps.append(byte_bpe.DIGITS)
                case _:
                    self.refuse("pre_tokenizer", part, "one of BLOOM's, GPT-2's, LLaMA 3's or SmolLM2's")
        if tuple(steps) not in byte_bpe.PIECES or parts[-1]["type"] != "ByteLevel":
            self.refuse("pre_tokenizer", section, "one of BLOOM's, GPT-2's, LLaMA 3's or SmolLM2's")
        return tuple(steps)

    def _vocabulary(self, content, model) -> tuple[dict[str, int], list[dict]]:
        """All tokens by text, the added ones among them, and the list of added ones; ids are checked."""
        if model.get("type", "BPE") != "BPE":
            self.refuse("model.type", model["type"], "'BPE'")
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
            if model.get(key):
                self.refuse(f"model.{key}", model[key], "none: byte-level BPE has no such thing")
        vocab = self.get(model, "vocab", dict, "model.vocab")
        added = self.get(content, "added_tokens", list, "added_tokens", [])
        for token in added:
            match token:
                case {"id": int(), "content": str(text)} if text:
                    pass
                case _:
                    self.refuse("added_tokens", token, "an id and a content")
            if not token.get("special") and any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip")):
                self.refuse(f"added_tokens: {token['content']!r}", token, "no single_word, lstrip or rstrip")
        vocab = vocab | {token["content"]: token["id"] for token in added}
        if set(map(type, vocab.values())) - {int} or min(vocab.values(), default=-1) < 0:
            self.refuse("model.vocab", next((v for v in vocab.items() if type(v[1]) is not int or v[1] < 0), "empty"),
                        "tokens with their ids")
        if len(set(vocab.values())) < len(vocab):
            seen = {}
            for text, i in vocab.items():
                if i in seen:
                    raise UserError(f"{self.path}: model.vocab: id {i} is given twice, to {seen[i]!r} and {text!r}")
                seen[i] = text
        return vocab, added

    def _byte_strings(self, vocab, added) -> dict[int, str]:
        """id -> the token's bytes as a latin-1 string."""
        alphabet = byte_bpe.byte_alphabet()
        separator = "\uffff"  # no byte stands for it: all tokens are translated in one go
        table = {ord(character): byte for byte, character in enumerate(alphabet)}
        strings = separator.join(vocab).translate(table).split(separator)
        pieces = dict(zip(vocab.values(), strings))
        pieces |= {token["id"]: token["content"].encode().decode("latin-1") for token in added}
        try:
            "".join(pieces.values()).encode("latin-1")
        except UnicodeEncodeError:
            token = next(text for text, i in vocab.items() if max(pieces[i], default="") > "\xff")
            self.refuse("model.vocab", token, "tokens in the byte alphabet of byte-level BPE")
        return pieces

    def _merger(self, model, vocab, special) -> byte_bpe.Merger:
        """The merges as ranks of pairs of ids, in either format: "a b" or ["a", "b"]."""
        merges, merged = {}, []
        lines = self.get(model, "merges", list, "model.merges")
        try:
            for line in lines:
                left, right = line.split(" ") if isinstance(line, str) else line
                merges[vocab[left] << 32 | vocab[right]] = len(merged)
                merged.append(vocab[left + right])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            name = f"{error} is no token of model.vocab" if isinstance(error, KeyError) else "expected two tokens"
            raise UserError(f"{self.path}: model.merges[{len(merged)}] is {lines[len(merged)]!r}: {name}") from None
        if special.intersection(merged):  # ordinary text must not reach a control token
            merges = {pair: rank for pair, rank in merges.items() if merged[rank] not in special}
        alphabet = byte_bpe.byte_alphabet()
        bytes_to_ids = [vocab.get(character) for character in alphabet]
        if None in bytes_to_ids and model.get("unk_token") is not None:
            self.refuse("model.unk_token", model["unk_token"], "none, as some bytes have no token")
        whole = {}
        if model.get("ignore_merges"):
            whole = {self.pieces[i]: i for i in vocab.values() if i not in special}
        return byte_bpe.Merger(bytes_to_ids, merges, merged, whole)

    def _post_processor(self, content, vocab) -> tuple[list[int], list[int]]:
        """The ids that TemplateProcessing puts before and after a single text."""
        section = self.get(content, "post_processor", dict, "post_processor", {"type": "ByteLevel"})
        parts = section.get("processors", []) if section.get("type") == "Sequence" else [section]
        around = [], []
        for part in parts:
            match part:
                case {"type": "ByteLevel"}:  # offsets only
                    pass
                case {"type": "TemplateProcessing", "single": list(single)}:
                    side = 0
                    for item in single:
                        match item:
                            case {"SpecialToken": {"id": str(name)}} if name in vocab:
                                around[side].append(vocab[name])
                            case {"Sequence": {"id": "A"}} if side == 0:
                                side = 1
                            case _:
                                self.refuse("post_processor.single", item, "a known special token or sequence A")
                case _:
                    self.refuse("post_processor", part.get("type"), "ByteLevel or TemplateProcessing")
        return around


class ByteStream:
    """As PieceStream, for tokens that are bytes: an incomplete character waits for the rest of it."""

    def __init__(self, tokenizer: ByteLevelBPE):
        self.tokenizer, self.utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        return self.utf8.decode(self.tokenizer.bytes_of(i))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


def train_sentencepiece(texts, path, vocab_size: int, character_coverage: float = 0.9995) -> SentencePieceTokenizer:
    """Train a SentencePiece model of LLaMA's kind on an iterator of texts, write it to `path`, and return it.

    BPE with byte fallback, digits apart, no normalisation (so that text survives the round trip); <unk>, <s>, </s>
    are 0, 1, 2. Fewer than vocab_size pieces come out where the texts do not yield so many.
    Raises UserError when vocab_size cannot hold the characters of the texts, or there are no texts.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, byte_fallback=True, split_digits=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, character_coverage=character_coverage, max_sentence_length=1 << 20,
            minloglevel=2)
    except RuntimeError as error:
        raise UserError(f"no SentencePiece model of {vocab_size} pieces can be trained for {path}: {error}") from None
    with atomic_write(path, "wb") as file:
        file.write(model.getvalue())
    return SentencePieceTokenizer(path)


def load_tokenizer(directory) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory: tokenizer.model where there is one, else tokenizer.json.

    LLaMA 3's tokenizer.model is no SentencePiece model but a list of "base64 rank"; its tokenizer.json says the same.
    """
    directory = Path(directory)
    sentencepiece, byte_level = directory / "tokenizer.model", directory / "tokenizer.json"
    if sentencepiece.exists():
        with open(sentencepiece, "rb") as file:
            if not (byte_level.exists() and re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(100))):
                return SentencePieceTokenizer(sentencepiece)
    if byte_level.exists():
        return ByteLevelBPE(byte_level)
    raise UserError(f"{directory}: holds neither tokenizer.model nor tokenizer.json")


def check_text(text: str):
    """Raise UserError where `text` holds a lone surrogate (half of a pair of UTF-16), which UTF-8 cannot spell."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text holds the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                        "it is no valid Unicode and has no tokens") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file, {} where there is no file; UserError where it is damaged or no object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: no valid JSON, perhaps cut short: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value

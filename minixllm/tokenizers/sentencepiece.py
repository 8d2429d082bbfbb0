"""SentencePiece models (`tokenizer.model`), and training one of LLaMA's kind."""

import codecs
import io

from minixllm.errors import UserError, check_text
from minixllm.files import atomic_write, read_json
from minixllm.tokenizers.base import Tokenizer


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
        added, special = self._added_tokens(size)
        self.vocab_size = max([size - 1, *added.values()]) + 1
        ids = {self.model.id_to_piece(i): i for i in range(size)} | added
        defaults = {kind: i if i >= 0 else None for kind, i in (
            ("bos", self.model.bos_id()), ("eos", self.model.eos_id()), ("pad", self.model.pad_id()))}
        self.choose_special(ids, defaults)
        # A model may hold a chosen special token as "user defined", which text would match.
        self.control = ({self.bos_id, self.eos_id, self.pad_id} | special) - {None, self.model.unk_id()}
        self.spelt = {i: [self.model.piece_to_id(f"<0x{byte:02X}>") for byte in self.model.id_to_piece(i).encode()]
                      for i in self.control if i < size and not self.model.is_control(i)}
        self.control |= {i for i in range(size) if self.model.is_control(i)}
        self.special_texts = {text for text, i in ids.items() if i in self.control}
        self.bytes = {i: int(self.model.id_to_piece(i)[3:5], 16) for i in range(size) if self.model.is_byte(i)}
        self.prefix = [self.bos_id] if self.flag("add_bos_token", True) and self.bos_id is not None else []
        self.suffix = [self.eos_id] if self.flag("add_eos_token", False) and self.eos_id is not None else []
        self.sign(self.prefix, self.suffix, self.bos_id, self.eos_id, self.pad_id, sorted(added.items()))

    def _added_tokens(self, size: int) -> tuple[dict[str, int], set[int]]:
        """Tokens beyond the model's own `size`, by text, from added_tokens.json and tokenizer_config.json; the ids of
        these and of those within that the latter calls special.
        """
        path = self.path.parent / "added_tokens.json"
        added = read_json(path)
        if not all(type(i) is int for i in added.values()):
            raise UserError(f"{path}: found {added!r}, expected tokens with their ids")
        added = {text: i for text, i in added.items() if i >= size}
        path, special = self.path.parent / "tokenizer_config.json", set(added.values())
        entries = self.config.get("added_tokens_decoder") or {}
        for key, token in entries.items() if isinstance(entries, dict) else [("", entries)]:
            match token:
                case {"content": str(text), **rest} if key.isdecimal():
                    pass
                case _:
                    raise UserError(f"{path}: added_tokens_decoder: found {key!r}: {token!r}, expected an id and its "
                                    "content")
            if rest.get("special"):
                special.add(int(key))
            elif int(key) >= size:
                raise UserError(f"{path}: added_tokens_decoder: {key} ({text!r}) is no special token; only special "
                                "ones can be added to a SentencePiece model")
            if int(key) >= size:
                added[text] = int(key)
        return added, special

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


def train_sentencepiece(texts, path, vocab_size: int, **options) -> SentencePieceTokenizer:
    """Train a SentencePiece model of LLaMA's kind on an iterator of texts, write it to `path`, and return it.

    BPE with byte fallback, digits apart, no normalisation (so that text survives the round trip); <unk>, <s>, </s>
    are 0, 1, 2. Fewer than vocab_size pieces come out where the texts do not yield so many. `options` are further
    settings of SentencePiece's trainer, or others than these.
    Raises UserError when vocab_size cannot hold the characters of the texts, or there are no texts.
    """
    import sentencepiece

    model = io.BytesIO()
    defaults = {"model_type": "bpe", "hard_vocab_limit": False, "byte_fallback": True, "split_digits": True,
                "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
                "max_sentence_length": 1 << 20, "minloglevel": 2}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **(defaults | options))
    except RuntimeError as error:
        raise UserError(f"no SentencePiece model of {vocab_size} pieces can be trained for {path}: {error}") from None
    with atomic_write(path, "wb") as file:
        file.write(model.getvalue())
    return SentencePieceTokenizer(path)

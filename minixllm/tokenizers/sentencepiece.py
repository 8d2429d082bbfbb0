"""SentencePiece models (`tokenizer.model`), and training one of LLaMA's kind."""

import io

from minixllm.errors import UserError, expect
from minixllm.files import atomic_write, read_json
from minixllm.tokenizers.base import Tokenizer

SPACE = "▁"  # U+2581, which stands for a space in pieces


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (`tokenizer.model`) with the choices of the tokenizer_config.json beside it, if any.

    The ids are those of the `sentencepiece` library itself. Tokens that the configuration adds after the model's own
    vocabulary (a "<pad>" at 32000) are control tokens: text never gives them.
    Raises UserError: no file, not a SentencePiece model, a special token that does not exist.
    """

    FILE, CLASS, BAD_BYTES = "tokenizer.model", "LlamaTokenizer", "each byte"
    FLAGS = ("add_bos_token", "add_eos_token")

    def __init__(self, path):
        super().__init__(path)
        try:
            self._read_model()
        except (RuntimeError, OSError, ValueError, IndexError):  # a damaged one fails in any of these ways
            raise UserError(f"{self.path}: not a SentencePiece model, or a damaged one") from None
        added, special = self._added_tokens()
        self.vocab_size = max([len(self.texts) - 1, *added.values()]) + 1
        model, ids = self.model, {text: i for i, text in enumerate(self.texts)} | added
        defaults = {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        self.choose_special(ids, {kind: i if i >= 0 else None for kind, i in defaults.items()})
        special = (special | {self.bos_id, self.eos_id, self.pad_id}) - {None, model.unk_id()}
        # If the model holds a special token as "user defined", text would match it. Such a match becomes its bytes.
        self.spelt = {i: [model.piece_to_id(f"<0x{byte:02X}>") for byte in self.texts[i].encode()]
                      for i in special if i < len(self.texts) and not model.is_control(i)}
        self.special_texts = {text for text, i in ids.items() if i in special or i < len(self.texts)
                              and model.is_control(i)} | added.keys()
        for i in special:
            self.pieces.pop(i, None)
        self.prefix, self.suffix = self._around("bos", True), self._around("eos", False)
        self.config = {"unk_token": self.texts[model.unk_id()], "legacy": True} | self.config
        self.set_fingerprint(sorted(added.items()))

    def _read_model(self):
        """Set model, texts (of all its pieces), pieces (their bytes), spaced, trims and adds_space."""
        import sentencepiece

        model = self.model = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes or b"empty")
        self.texts = [model.id_to_piece(i) for i in range(model.vocab_size())]
        self.adds_space = model.normalize("a").startswith(SPACE)
        self.trims = model.normalize(" a") == model.normalize("a")
        self.pieces, spaced = {}, set()
        for i, text in enumerate(self.texts):
            if model.is_byte(i):
                self.pieces[i] = bytes([int(text[3:5], 16)])
            elif i == model.unk_id():
                self.pieces[i] = model.decode([i]).encode()
            elif not model.is_control(i):
                self.pieces[i] = text.replace(SPACE, " ").encode()
                if text.startswith(SPACE) and (self.adds_space or self.trims):
                    spaced.add(i)
        self.spaced = frozenset(spaced)

    def _around(self, kind: str, default: bool) -> list[int]:
        """The special token of this kind, if add_{kind}_token says that it stands beside every text."""
        key, i = f"add_{kind}_token", getattr(self, f"{kind}_id")
        value = self.config.get(key)
        adds = default if value is None else expect(value, bool, f"{self.config_path}: {key}")
        return [i] if adds and i is not None else []

    def _added_tokens(self) -> tuple[dict[str, int], set[int]]:
        """(tokens beyond the model's own, by text; the ids that are special) from added_tokens.json and
        tokenizer_config.json. Raises UserError for a token that contradicts the model's vocabulary.
        """
        path, size = self.path.parent / "added_tokens.json", len(self.texts)
        found = [(f"{path}: {text!r}", text, expect(i, int, f"{path}: {text!r}", least=0, most=2**31), i >= size)
                 for text, i in read_json(path).items()]
        where = f"{self.config_path}: added_tokens_decoder"
        for key, token in expect(self.config.get("added_tokens_decoder") or {}, dict, where).items():
            if not (key.isdecimal() and len(key) <= 10):
                raise UserError(f"{where}: found {key!r}, expected a token id")
            text = expect(expect(token, dict, f"{where}: {key}").get("content"), str, f"{where}: {key}: content")
            found.append((f"{where}: {key}", text, int(key), bool(token.get("special"))))
        added, special = {}, set()
        for where, text, i, is_special in found:
            if (i < size and self.texts[i] != text) or added.get(text, i) != i:
                raise UserError(f"{where}: found {text!r} with the id {i}, expected " + (
                    f"{self.texts[i]!r}, as {self.path.name} has it" if i < size else f"{added[text]}, as elsewhere"))
            if i >= size:
                if not is_special:
                    raise UserError(f"{where}: {i} ({text!r}) is no special token; only special ones can be added to "
                                    "a SentencePiece model")
                added[text] = i
            if is_special:
                special.add(i)
        return added, special

    def encode_text(self, text):
        ids = self.model.encode(text)
        return [byte for i in ids for byte in self.spelt.get(i, (i,))] if self.spelt else ids


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

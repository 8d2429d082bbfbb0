"""BPE over characters with byte fallback: a SentencePiece model of LLaMA's kind, written as a tokenizer.json.

`transformers` 5 saves LLaMA 1 and 2 like that. A space is written as "▁", and a character without a token becomes the
tokens of its UTF-8 bytes, "<0xF0>" and so on.
"""

import re

from minixllm.tokenizers.bpe import JsonBPE

SPACE = "▁"  # U+2581
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DECODER = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
           {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# (normaliser, pre-tokeniser) -> whether a text gets a first space always, when it begins with none, or never
PREFIXES = [
    ([{"type": "Prepend", "prepend": SPACE}, REPLACE], [], "always"),
    ([REPLACE], [], "never"),
    *[([], [{"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}], prefix)
      for scheme, prefix in (("first", "if none"), ("always", "if none"), ("never", "never"))]]


class ByteFallbackBPE(JsonBPE):
    """A BPE with byte fallback: LLaMA 1's and 2's, Mistral v1's and their like."""

    CLASS, BAD_BYTES = "LlamaTokenizer", "each byte"

    def read_steps(self, content):
        normalizer = self.parts(content, "normalizer", "normalizers")
        pre_tokenizer = self.parts(content, "pre_tokenizer", "pretokenizers")
        self.prefix_space = next((prefix for *steps, prefix in PREFIXES if steps == [normalizer, pre_tokenizer]), None)
        if not self.prefix_space:
            self.refuse("normalizer and pre_tokenizer", [normalizer, pre_tokenizer], "those of LLaMA")
        decoder = self.parts(content, "decoder", "decoders")
        if decoder not in (DECODER, [*DECODER, STRIP]):
            self.refuse("decoder", decoder, "LLaMA's")
        self.strips, self.adds_space = STRIP in decoder, self.prefix_space != "never"
        for token in content.get("added_tokens") or ():
            if token["id"] not in self.special:
                self.refuse(f"added_tokens: {token['content']!r}", token, "a special one, as byte_fallback is true")

    def read_pieces(self, model, vocab):
        if model.get("ignore_merges"):
            self.refuse("model.ignore_merges", True, "false, as byte_fallback is true")
        self.byte_ids = [vocab.get(f"<0x{byte:02X}>") for byte in range(256)]
        if None in self.byte_ids:
            self.refuse("model.vocab", f"no <0x{self.byte_ids.index(None):02X}>", "a token for each of the 256 bytes")
        pieces = {i: text.replace(SPACE, " ").encode() for text, i in vocab.items()}
        pieces |= {i: bytes([byte]) for byte, i in enumerate(self.byte_ids)}
        self.spaced = frozenset(i for i, data in pieces.items() if data[:1] == b" ") if self.strips else frozenset()
        self.characters = {text: i for text, i in vocab.items() if len(text) == 1 and i not in self.special}
        # If no token has a space after another character, no merge reaches over the beginning of a word. Then words are
        # merged each by itself, and known words are only looked up.
        self.in_words = not any(re.search(f"[^{SPACE}]{SPACE}", text) for text in vocab)
        return pieces

    def symbols(self, piece):
        ids = []
        for character in piece:
            i = self.characters.get(character)
            ids += [self.byte_ids[byte] for byte in character.encode()] if i is None else [i]
        return ids

    def normalize(self, text):
        text = text.replace(" ", SPACE)
        prefixed = self.prefix_space == "always" or self.prefix_space == "if none" and not text.startswith(SPACE)
        return SPACE + text if text and prefixed else text

    def split(self, text):
        return re.findall(f"{SPACE}*[^{SPACE}]+|{SPACE}+", text) if self.in_words else [text] * bool(text)

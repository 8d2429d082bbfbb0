"""A tokenizer of bytes. Worker processes of the token cache import this module to unpickle it: it imports little."""

import os
import signal
import time

from minixllm.tokenizers.base import Tokenizer


class Bytes:
    """A tokenizer of bytes, ids 3 to 258; pad is eos, as with many a model."""

    vocab_size, bos_id, eos_id, pad_id = 259, 1, 2, 2
    special_texts = {"<s>", "</s>"}
    encode_prompt = Tokenizer.encode_prompt

    def __init__(self, prefix=(1,), suffix=(), fingerprint="bytes"):
        self.prefix, self.suffix, self.fingerprint = list(prefix), list(suffix), fingerprint

    def encode(self, text, add_special_tokens=False):
        ids = [byte + 3 for byte in text.encode()]
        return self.prefix + ids + self.suffix if add_special_tokens else ids

    def decode(self, ids):
        return bytes(i - 3 for i in ids if i > 2).decode()


class Slow(Bytes):
    def encode(self, text, add_special_tokens=False):
        time.sleep(0.05)
        return super().encode(text, add_special_tokens)


class Fatal(Bytes):
    def encode(self, text, add_special_tokens=False):
        os.kill(os.getpid(), signal.SIGKILL)

"""Text <-> token ids: SentencePiece models and byte-level BPE, read from the files Hugging Face users have.

Read `base` first (what a tokenizer offers: `encode`, `encode_prompt`, `decode`, `stream`, `save`, and the ids `bos_id`,
`eos_id`, `pad_id`, None where there is none), then `sentencepiece` and `byte_bpe`. What a user types is only ever text:
"</s>" in it gives ordinary pieces, never the control id.
"""

import re
from pathlib import Path

from minixllm.errors import UserError
from minixllm.files import read_json
from minixllm.tokenizers.base import Tokenizer
from minixllm.tokenizers.byte_bpe import ByteLevelBPE
from minixllm.tokenizers.sentencepiece import SentencePieceTokenizer


def load_tokenizer(directory) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory: tokenizer.model where there is one, else tokenizer.json.

    LLaMA 3's tokenizer.model is no SentencePiece model but a list of "base64 rank"; its tokenizer.json says the same.
    Raises UserError for a SentencePiece model beside a byte-level tokenizer.json: they cannot be the same tokenizer.
    """
    directory = Path(directory)
    sentencepiece, byte_level = directory / "tokenizer.model", directory / "tokenizer.json"
    if sentencepiece.exists():
        with open(sentencepiece, "rb") as file:
            if not (byte_level.exists() and re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(100))):
                decoder = read_json(byte_level).get("decoder")
                if isinstance(decoder, dict) and decoder.get("type") == "ByteLevel":
                    raise UserError(f"{directory}: tokenizer.model is SentencePiece and tokenizer.json byte-level BPE, "
                                    "expected one tokenizer; remove the other model's")
                return SentencePieceTokenizer(sentencepiece)
    if byte_level.exists():
        return ByteLevelBPE(byte_level)
    raise UserError(f"{directory}: holds neither tokenizer.model nor tokenizer.json")

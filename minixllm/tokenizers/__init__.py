"""Text <-> token ids: SentencePiece models and byte pair encoding, read from the files Hugging Face users have.

Read `base` first (what a tokenizer offers: `encode`, `encode_prompt`, `decode`, `stream`, `save`, and the ids `bos_id`,
`eos_id`, `pad_id`, None where there is none), then `sentencepiece`, or `bpe` with its two kinds `byte_bpe` and
`fallback_bpe`. What a user types is only ever text: "</s>" in it gives ordinary pieces, never the control id.
"""

import re
from pathlib import Path

from minixllm.errors import UserError
from minixllm.tokenizers.base import Tokenizer
from minixllm.tokenizers.byte_bpe import ByteLevelBPE
from minixllm.tokenizers.fallback_bpe import ByteFallbackBPE
from minixllm.tokenizers.sentencepiece import SentencePieceTokenizer


def has_tokenizer(directory) -> bool:
    return any((Path(directory) / name).exists() for name in ("tokenizer.model", "tokenizer.json"))


def load_tokenizer(directory) -> Tokenizer:
    """The tokenizer of a Hugging Face model directory: tokenizer.model where there is one, else tokenizer.json.

    LLaMA 3's tokenizer.model is a list of "base64 rank" and no SentencePiece model; its tokenizer.json is read instead.
    Raises UserError for a SentencePiece model beside a byte-level tokenizer.json: they cannot be the same tokenizer.
    """
    sentencepiece, json_file = Path(directory) / "tokenizer.model", Path(directory) / "tokenizer.json"
    if not has_tokenizer(directory):
        raise UserError(f"{directory}: holds neither tokenizer.model nor tokenizer.json")
    # Names of keys are looked for in the bytes: parsing a large file twice would take long.
    content = json_file.read_bytes() if json_file.exists() else b""
    if sentencepiece.exists():
        with open(sentencepiece, "rb") as file:
            is_list_of_ranks = re.match(rb"[A-Za-z0-9+/=]+ \d+\n", file.read(100))
        if not (content and is_list_of_ranks):
            if re.search(rb'"decoder"\s*:\s*{\s*"type"\s*:\s*"ByteLevel"', content):
                raise UserError(f"{directory}: tokenizer.model is SentencePiece and tokenizer.json byte-level BPE, "
                                "expected one tokenizer; remove the other model's")
            return SentencePieceTokenizer(sentencepiece)
    kind = ByteFallbackBPE if re.search(rb'"byte_fallback"\s*:\s*true', content) else ByteLevelBPE
    return kind(json_file)

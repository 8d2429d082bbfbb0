"""Reading config.json into the dataclass of an architecture: every setting checked, none that matters ignored."""

import dataclasses
import sys
import types

from minixllm.errors import UserError

# What would change the model's results if it were set to anything but this, and is not built.
COMMON = {"quantization_config": None, "sliding_window": None, "attention_dropout": 0, "is_encoder_decoder": False,
          "add_cross_attention": False}


def refuse(config: dict, expected: dict) -> None:
    """Raises UserError for a key of `expected` that `config` sets to another value."""
    for key, value in {**COMMON, **expected}.items():
        if config.get(key, value) != value:
            found = repr(config[key])  # of a quantised model, a page
            raise UserError(f"{key}: found {found[:60] + '...' * (len(found) > 60)}, expected "
                            f"{'none' if value is None else repr(value)} (nothing else is supported)")


def read_settings(cls, config: dict):
    """An instance of the dataclass `cls` from the keys of `config` that are its fields, types and ranges checked.

    A field of type int is at least 1, a float above 0; `| None` lets null stand for the default; a token id is any
    whole number (old files have a pad of -1), the eos perhaps a list of them. Raises UserError naming the key, what was
    found and what was expected.
    """
    settings = {}
    for f in dataclasses.fields(cls):
        optional = isinstance(f.type, types.UnionType)
        if f.name not in config:
            if f.default is dataclasses.MISSING:
                raise UserError(f"{f.name}: missing, expected {_EXPECTED[f.type]}")
            continue
        value, kind = config[f.name], f.type.__args__[0] if optional else f.type
        if f.name.endswith("_token_id"):
            ids = value if isinstance(value, list) and f.type == int | list | None else [value]
            if not all(type(i) in (int, type(None)) and abs(i or 0) < 2**31 for i in ids):
                raise UserError(f"{f.name}: found {value!r}, expected a token id")
        elif not (optional and value is None) and not _fits(value, kind):
            raise UserError(f"{f.name}: found {value!r}, expected {_EXPECTED[kind]}")
        settings[f.name] = value
    return cls(**settings)


_EXPECTED = {int: "a whole number of at least 1", float: "a number above 0", bool: "true or false", dict: "an object"}


def _fits(value, kind) -> bool:
    if kind is int:
        return type(value) is int and 1 <= value < 2**31
    if kind is float:
        return type(value) in (int, float) and 0 < value <= sys.float_info.max
    return isinstance(value, kind)

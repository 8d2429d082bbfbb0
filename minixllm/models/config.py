"""Reading config.json into the dataclass of an architecture: every setting checked, none that matters ignored."""

import dataclasses
import types

from minixllm.errors import UserError, expect, found

# Settings of both architectures that would change the model's results, with the only value that is built. Dropouts are
# not among them: they act in training alone, and are off here.
COMMON = {"quantization_config": None, "sliding_window": None, "is_encoder_decoder": False,
          "add_cross_attention": False}
ADVICE = {"quantization_config": "give the original weights: --base nf4 quantises them as they are read"}


def read_settings(cls, config: dict, built: dict | None = None):
    """An instance of the dataclass `cls` from those keys of `config` that are its fields, types and ranges checked.

    A whole number is at least 1, any other number above 0. Where the field's type has `| None`, null stands for the
    default. A token id may be any whole number (old files have a pad of -1), and the eos a list of them.
    built: other keys than COMMON with what is built. Raises UserError naming the key, what was found and expected.
    """
    for key, value in {"model_type": cls.model_type, **COMMON, **(built or {})}.items():
        if config.get(key, value) != value:
            expected = "none" if value is None else repr(value)
            raise UserError(f"{key}: found {found(config[key])}, expected {expected} "
                            f"({ADVICE.get(key, 'nothing else is supported')})")
    settings = {}
    for field in dataclasses.fields(cls):
        name, optional = field.name, isinstance(field.type, types.UnionType)
        if name not in config:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{name}: missing, expected a value, because it has no default")
            continue
        value, kind = config[name], field.type.__args__[0] if optional else field.type
        settings[name] = value
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) and list in field.type.__args__ else [value]
            if not all(type(i) in (int, type(None)) and abs(i or 0) < 2**31 for i in ids):
                raise UserError(f"{name}: found {found(value)}, expected a token id")
        elif not (optional and value is None):
            expect(value, kind, name, **{int: {"least": 1, "most": 2**31 - 1}, float: {"above": 0}}.get(kind, {}))
    return cls(**settings)

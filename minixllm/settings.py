"""Settings: one dataclass a script, read from flags and from a TOML recipe.

    @dataclass
    class Settings:
        learning_rate: float = setting(1e-4, "peak learning rate", above=0)

    settings = parse(Settings, argv)     # --learning-rate 3e-4, --config recipe.toml, --help

A flag beats the recipe, the recipe beats the default. An unknown flag or key is an error that names the nearest one.
"""

import argparse
import contextlib
import dataclasses
import difflib
import os
import re
import sys
import tomllib
import types
from pathlib import Path

from minixllm.errors import UserError, expect, found

STOPPED = 130  # the exit status of a run that a signal ended early: not 0, for there is no trained model yet
HUGE = 10**15  # no number may be larger: what is computed from it must not overflow


def setting(default, help: str, choices=(), above: float | None = None, least: float | None = None,
            most: float | None = None, positional: bool = False):
    """A dataclass field with its meaning. A list default makes a flag that takes several values.

    A number must be above `above` or at least `least`, and at most `most`. positional: it is given without a flag.
    """
    bounds = {"above": above, "least": least, "most": HUGE if most is None else most}
    metadata = {"help": help, "choices": choices, "bounds": bounds, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(cls, argv=None, embedded: dict | None = None, needs=("model", "data"), description: str | None = None,
          prog: str | None = None):
    """An instance of the dataclass `cls` from `argv` (sys.argv[1:] when None).

    `embedded` holds the values that replace the defaults in the embedded default run, that is when none of the
    settings `needs` is given by flag or recipe; --help shows both. Raises UserError for whatever the user got wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    embedded = embedded or {}
    parser = Parser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--config", metavar="RECIPE.toml", help="a TOML file of these settings; flags beat it")
    for field in fields.values():
        _add_flag(parser, field, embedded)
    flags = vars(parser.parse_args(sys.argv[1:] if argv is None else argv))

    recipe = _read_recipe(flags.pop("config"), fields) if "config" in flags else {}
    for name, value in flags.items():
        if type(value) in (int, float):  # argparse has made it
            expect(value, type(value), f"--{name.replace('_', '-')}", **fields[name].metadata["bounds"])
    alone = not any(name in recipe | flags for name in needs)
    values = {}
    for layer in (embedded if alone else {}, recipe, flags):  # each beats those before it
        if "epochs" in layer:
            values.pop("steps", None)  # the two name one thing
        values |= layer
    return cls(**values)


def run(main) -> None:
    """Run a script's `main(argv)` and end the process with the status that it returns, or 0.

    For what a user can mend (a UserError, a full disk, too little memory, a lost process) one line on stderr and the
    status 2; after Ctrl-C STOPPED.
    """
    script, status = Path(sys.argv[0]).name, 0
    guard, several = contextlib.nullcontext(), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        from minixllm.distributed import explain_lost_peers  # which imports torch: the building of data does without

        guard = explain_lost_peers("this run")
        script += f" (rank {os.environ.get('RANK', 0)})"
    try:
        with guard:
            status = main(sys.argv[1:]) or 0
        sys.stdout.flush()
    except Exception as error:
        if (said := _mendable(error)) is None:
            raise
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        # one line (as every UserError's message is), and at once, for other processes may write there, too
        print(f"{script}: error: {UserError(said)}\n", end="", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        status = STOPPED
    if several:
        os._exit(status)  # gloo's threads may hold a tensor still: freed as Python ends, it aborts (pytorch #190489)
    sys.exit(status)


def _mendable(error: Exception) -> str | None:
    """What to say of an error that the user can do something about; None for any other."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, (OSError, UserError)):
        return str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
        return f"not enough memory ({str(error)[:150]}); smaller batches and shorter texts take less, see --help"
    return None


class Parser(argparse.ArgumentParser):
    """argparse, its complaints raised as UserError."""

    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

    def parse_args(self, argv):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            flag = unknown[0].split("=")[0]
            if not flag.startswith("-"):
                raise UserError(f"unexpected argument {flag!r}: every setting is given as --name value")
            raise UserError(f"unknown flag {flag}{_nearest(flag, self._option_string_actions)}; --help lists the flags")
        return known


def _add_flag(parser, field, embedded):
    name, (kind, several) = field.name, _scalar(field)
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    shown = _show(default)
    if name in embedded and embedded[name] != default:
        shown += f"; in the embedded default run: {_show(embedded[name])}"
    options = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
    if field.metadata["choices"]:
        options["choices"] = field.metadata["choices"]
    elif kind is not bool:
        options["metavar"] = kind.__name__.upper()
    if several:
        options |= {"nargs": "+", "action": "extend"}
    if field.metadata["positional"]:
        flag, options["nargs"] = name, "*"
    else:
        flag, options["dest"] = "--" + name.replace("_", "-"), name
    parser.add_argument(flag, **options, help=f"{field.metadata['help']} (default: {shown})".replace("%", "%%"))


def _read_recipe(path, fields) -> dict:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: expected a TOML recipe") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not TOML: {reason}") from None
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise UserError(f"{path}: unknown key {found(key)}{_nearest(name, fields)}")
        values[name] = _checked(f"{path}: {key}", value, fields[name])
    return values


def _checked(where, value, field):
    """A value as the field's type; an int stands for a float, too, and one value for a list of one."""
    kind, several = _scalar(field)
    values = value if several and isinstance(value, list) else [value]
    for item in values:
        expect(item, kind, where, choices=field.metadata["choices"],
               **(field.metadata["bounds"] if kind in (int, float) else {}))
        if kind is str and "\0" in item:
            raise UserError(f"{where}: found {found(item)}, expected text without the character NUL")
    values = [kind(item) for item in values]
    return values if several else values[0]


def _scalar(field):
    """(type, whether a list of it) of a field whose annotation is T, T | None or list[T]."""
    kind = field.type.__args__[0] if isinstance(field.type, types.UnionType) else field.type
    return (kind.__args__[0], True) if isinstance(kind, types.GenericAlias) else (kind, False)


def _nearest(name, names) -> str:
    initials = {"".join(part[0] for part in re.split("[-_]+", each.strip("-"))): each
                for each in sorted(names, key=len)}  # of two the longer: lr is learning_rate and not lora_r
    close = [initials[name.strip("-")]] if name.strip("-") in initials else difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]}?" if close else ""


def _show(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)

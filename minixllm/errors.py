"""Errors a user can mend, and the one check behind "found X, expected Y"."""

import re
import reprlib
import sys

LONGEST = 300  # characters of a message: it is one line, and what stands at its two ends matters most
IN_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "an object",
            list: "a list"}


class UserError(ValueError):
    """A mistake in what the user gave: the message names the file, line or key, what was found and what was expected.

    The scripts print it as one line, without a traceback.
    """

    def __init__(self, message: str):
        message = " ".join(str(message).split())
        if len(message) > LONGEST:  # long paths keep their last two parts, so that what was found and expected stays
            message = re.sub(r"(?<![^\s'\"(])/(?:[^/\s'\"]+/)+(?=[^/\s'\"]+/[^/\s'\"]+)", ".../", message)
        super().__init__(shortened(message, LONGEST))


def shortened(text: str, length: int) -> str:
    """The text, its middle left out where it is longer."""
    return text if len(text) <= length else f"{text[:length // 2 - 3]} ... {text[len(text) - length // 2 + 2:]}"


_excerpt = reprlib.Repr()
_excerpt.maxstring = _excerpt.maxother = _excerpt.maxlong = 80


def found(value) -> str:
    """A value as messages show it: short, however deep or long it is."""
    try:
        return _excerpt.repr(value)
    except ValueError:  # Python does not print whole numbers of over 4,300 digits
        return "a number of thousands of digits"


def expect(value, kind: type, where: str, above: float | None = None, least: float | None = None,
           most: float | None = None, choices=()):
    """`value`, if it is of type `kind`: for JSON, TOML and flags. A bool is no number, and an int is a float, too.

    A number is finite, above `above` or at least `least`, and at most `most`; text is valid Unicode; choices: all that
    it may be. Raises UserError, "{where}: found {value}, expected ...".
    """
    fits = type(value) in ((int, float) if kind is float else (kind,)) and (not choices or value in choices)
    if fits and kind in (int, float):
        fits = (abs(value) <= sys.float_info.max and (above is None or value > above) and (least is None or value >= least)
                and (most is None or value <= most))
    if not fits:
        words = f"one of {', '.join(map(str, choices))}" if choices else IN_WORDS[kind]
        bounds = [f"{word} {bound:,}" for word, bound in (("above", above), ("of at least", least), ("at most", most))
                  if bound is not None]
        raise UserError(f"{where}: found {found(value)}, expected {words} {' and '.join(bounds)}")
    if kind is str:
        check_text(value, where)
    return value


def check_text(text: str, what: str = "text"):
    """Raise UserError where `text` holds half of a surrogate pair, as JSON can spell it: UTF-8 cannot, nor a tokenizer.

    what: how the error names the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character "
                        f"{error.start}, expected valid Unicode") from None

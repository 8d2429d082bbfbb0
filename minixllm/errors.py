"""Errors a user can mend."""


class UserError(ValueError):
    """A mistake in what the user gave: the message names the file, line or key, what was found and what was expected.

    The scripts print it as one line, without a traceback.
    """


def check_text(text: str, what: str = "text"):
    """Raise UserError where `text` holds half of a surrogate pair, as JSON can spell it: UTF-8 cannot, nor a tokenizer.

    what: how the error names the text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character "
                        f"{error.start}, expected valid Unicode") from None

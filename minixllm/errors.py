"""Errors a user can mend, and files that appear whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


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


@contextlib.contextmanager
def atomic_write(path, mode: str = "w"):
    """Open a temporary file beside `path`; it takes that name when the block ends well, and is removed otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(umask := os.umask(0))  # it can only be read by setting it
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno:
            error.filename = error.filename or str(path)  # a full disk does not say where
        raise

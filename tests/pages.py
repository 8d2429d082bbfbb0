"""Pages whose blocks of Python are run: what they print is held to the block that follows them.

    python tests/pages.py docs/method.md        # writes what the blocks print into the page
"""

import contextlib
import io
import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def printed(code: str, line: int, page, names: dict) -> str:
    """What a block prints, run in the namespace `names`; errors show the page's own lines."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile("\n" * line + code, str(page), "exec"), names)
    return output.getvalue()


def blocks(page) -> list[tuple[int, str, str]]:
    """(the line above it, its code, what the page says it prints) of each block of Python."""
    text = Path(page).read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start()) + 1, match[1], match[2] or "") for match in BLOCK.finditer(text)]


def same(found: str, expected: str) -> bool:
    """Whether the texts are equal, but for one unit in the last place of decimals: processors round differently."""
    if NUMBER.sub("0", found) != NUMBER.sub("0", expected):
        return False
    for a, b in zip(NUMBER.findall(found), NUMBER.findall(expected)):
        places = len(b.partition(".")[2])
        if abs(float(a) - float(b)) > (1.01 * 10 ** -places if places else 0):
            return False
    return True


def write(page) -> None:
    names, path = {}, Path(page)

    def filled(match):
        found = printed(match[1], path.read_text(encoding="utf-8").count("\n", 0, match.start()) + 1, page, names)
        return f"```python\n{match[1]}```\n" + (f"\n```text\n{found}```\n" if found else "")

    path.write_text(BLOCK.sub(filled, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])

"""docs/: what a page's Python prints is what the page says, and what its text names is there."""

import ast
import functools
import re

import pytest

from conftest import ROOT
from pages import blocks, printed, same, write

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
NAMED = re.compile(r"\b((?:[a-z_0-9]+/)*[a-z_0-9]+\.py):([A-Za-z_]\w*(?:\.\w+)*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_method_prints_what_it_says():
    names = {}
    for line, code, expected in blocks(ROOT / "docs/method.md"):
        found = printed(code, line, "docs/method.md", names)
        assert same(found, expected), f"docs/method.md, line {line}: printed\n{found}\nexpected\n{expected}"


@functools.cache
def names_in(path) -> set[str]:
    """The functions, classes and constants of a module, and what its classes hold, as Class.name."""
    names = set()

    def collect(body, prefix):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    collect(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    """`file:function` begins at minixllm/, at the root, or, for a file beside one named before, with its name alone."""
    text = page.read_text(encoding="utf-8")
    for file, name in NAMED.findall(text):
        paths = [path for path in (ROOT / "minixllm" / file, ROOT / file) if path.exists()]
        paths = paths or list((ROOT / "minixllm").rglob(file))
        assert len(paths) == 1, f"{page.name}: {file}: found {len(paths)} such files"
        assert name in names_in(paths[0]), f"{page.name}: {file} has no {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Files and, within the pages, headings, as GitHub makes anchors of them."""
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in anchors, f"{page.name}: no heading {anchor} in {target.name}"


def test_a_wrong_number_is_seen_and_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n```python\nx = 2 / 3\n```\n\nb\n\n```python\nprint(f'{x:.3f} of 9')\n```\n\n"
                    "```text\n0.669 of 9\n```\n")
    (_, first, nothing), (line, second, expected) = blocks(page)
    assert nothing == "" and page.read_text().splitlines()[line] == second.strip()
    names = {}
    printed(first, 0, page, names)
    found = printed(second, line, page, names)
    assert found == "0.667 of 9\n" and not same(found, expected)
    write(page)
    assert "```text\n0.667 of 9\n```\n" in page.read_text() and page.read_text().count("\n") == 15
    assert same("0.667 of 9", "0.666 of 9") and not same("0.667 of 9", "0.667 of 8") and not same("1 a", "1 b")

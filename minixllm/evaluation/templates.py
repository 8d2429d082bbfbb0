"""What each benchmark asks, in English and in other languages: the TOML file of templates, the shipped and a user's."""

import functools
import string
import tomllib
from pathlib import Path

from minixllm import languages
from minixllm.errors import UserError, expect, found

SHIPPED = Path(__file__).with_name("instructions.toml")
# The fields that an item fills in, besides {language}, and the keys of a template besides its instruction and input.
FIELDS = {"pawsx": {"sentence1", "sentence2"}, "xcopa": {"premise", "choice1", "choice2", "question"},
          "translation": {"source", "source_language", "target_language"}, "xlsum": {"article"}}
KEYS = {"pawsx": {"yes": list, "no": list}, "xcopa": {"cause": str, "effect": str}}


@functools.cache
def read_templates(path: Path | None = None) -> dict[tuple[str, str], dict]:
    """{(benchmark, language code): {instruction, ...}}: the shipped ones, and over them those of the user's file.

    Raises UserError naming the table and key of what is wrong.
    """
    templates = {} if path is None else dict(read_templates())
    path = Path(path or SHIPPED)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: expected a TOML file of instructions: {reason}") from None
    for benchmark, by_language in table.items():
        if benchmark not in FIELDS or not isinstance(by_language, dict):
            raise UserError(f"{path}: [{benchmark}]: expected one of {', '.join(FIELDS)}")
        for tag, template in by_language.items():
            try:
                code = languages.find(tag).code
            except UserError as error:
                raise UserError(f"{path}: [{benchmark}.{tag}]: {error}") from None
            expect(template, dict, f"{path}: [{benchmark}.{tag}]")
            templates[benchmark, code] = {**templates.get((benchmark, code), {"input": ""}), **template}
            _check(f"{path}: [{benchmark}.{tag}]", templates[benchmark, code], benchmark)
    return templates


def _check(where: str, template: dict, benchmark: str) -> None:
    keys = {"instruction": str, "input": str, **KEYS.get(benchmark, {})}
    if unknown := template.keys() - keys:
        raise UserError(f"{where}: unknown key {found(min(unknown))}, expected {', '.join(keys)}")
    for key, kind in keys.items():
        value = expect(template.get(key), kind, f"{where}: {key}")
        if kind is list and not (value and all(isinstance(text, str) for text in value)):
            raise UserError(f"{where}: {key}: found {found(value)}, expected a list of texts")
    allowed = FIELDS[benchmark] | {"language"}
    for key in ("instruction", "input"):
        try:
            fields = [field for field in string.Formatter().parse(template[key]) if field[1] is not None]
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error} in {template[key]!r}") from None
        for _, name, spec, conversion in fields:
            if spec or conversion:
                raise UserError(f"{where}: {key}: found a format in {template[key]!r}, expected fields alone, such as "
                                "{language}")
            if name not in allowed:
                raise UserError(f"{where}: {key}: unknown field {{{name}}}, expected {', '.join(sorted(allowed))}")

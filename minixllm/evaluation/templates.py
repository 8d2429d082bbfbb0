"""What each benchmark asks, in English and in other languages: the TOML file of templates, the shipped and a user's."""

import functools
import string
import tomllib
from pathlib import Path

from minixllm import languages
from minixllm.errors import UserError, found

SHIPPED = Path(__file__).with_name("instructions.toml")
# what an item fills in, besides {language}
FIELDS = {"pawsx": {"sentence1", "sentence2"}, "xcopa": {"premise", "choice1", "choice2", "question"},
          "translation": {"source", "source_language", "target_language"}, "xlsum": {"article"}}


@functools.cache
def read_templates(path: Path | None = None) -> dict[tuple[str, str], dict]:
    """{(benchmark, language code): {instruction, ...}}: the shipped ones, and over them those of the user's file."""
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
            where = f"{path}: [{benchmark}.{tag}]"
            if not isinstance(template, dict):
                raise UserError(f"{where}: expected a table with an instruction")
            try:
                code = languages.find(tag).code
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            template = {**templates.get((benchmark, code), {"input": ""}), **template}
            for key, kind in _template_keys(benchmark).items():
                value = template.get(key)
                texts = value if kind is list and isinstance(value, list) and value else [value]
                if not isinstance(value, kind) or not all(isinstance(text, str) for text in texts):
                    raise UserError(f"{where}: {key}: found {found(value)}, expected "
                                    + ("a list of texts" if kind is list else "text"))
            if unknown := set(template) - set(_template_keys(benchmark)):
                raise UserError(f"{where}: unknown key {found(min(unknown))}, "
                                f"expected {', '.join(_template_keys(benchmark))}")
            for key in ("instruction", "input"):
                _check_fields(f"{where}: {key}", template[key], FIELDS[benchmark] | {"language"})
            templates[benchmark, code] = template
    return templates


def _template_keys(benchmark: str) -> dict:
    more = {"pawsx": {"yes": list, "no": list}, "xcopa": {"cause": str, "effect": str}}
    return {"instruction": str, "input": str, **more.get(benchmark, {})}


def _check_fields(where: str, text: str, allowed: set) -> None:
    try:
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    except ValueError as error:
        raise UserError(f"{where}: {error} in {text!r}") from None
    if any(spec or conversion for _, _, spec, conversion in fields):
        raise UserError(f"{where}: found a format in {text!r}, expected fields alone, such as {{language}}")
    used = {name for _, name, _, _ in fields}
    if used - allowed:
        raise UserError(f"{where}: unknown field {{{min(used - allowed)}}}, expected {', '.join(sorted(allowed))}")

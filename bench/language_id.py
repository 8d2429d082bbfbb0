"""How often the language identifier behind the off-target rate is right, by language, and what it takes each for.

    python -m bench.language_id NTREX [--write]

NTREX is a folder with a text for each language, {code}.txt or newstest2019-ref.{code}.txt. Prints a row a language;
--write puts the rows into minixllm/evaluation/language_id.tsv, from which reports take their notes.
"""

import collections
import sys
from pathlib import Path

from minixllm.evaluation import benchmark_files, language_id

# What passes for a language because the identifier has no label, or one label, for the two.
PASSES = {"nob": "Nynorsk", "ckb": "Southern Kurdish", "nso": "Southern Sotho", "ara": "Egyptian Arabic",
          "heb": "Biblical Hebrew", "zho_simpl": "Wu, Cantonese", "zho_trad": "Wu, Cantonese"}


def main(folder: str, *flags: str) -> None:
    identifier = language_id.identifier()
    lines = [f"# {identifier.name} on NTREX, up to 500 sentences a language: code, % that pass for it, % told as it;",
             "# where this is below 98, what the rest is told as (%); what else passes for it"]
    texts = {code: path for path, code in benchmark_files.files("translation", Path(folder)).items() if code}
    for code in sorted(identifier.known & {*texts, "zho_trad"} | set(PASSES) & identifier.known):
        sentences = texts[code].read_text(encoding="utf-8").splitlines()[:500] if code in texts else []
        said = collections.Counter(map(identifier.classify, sentences))
        pass_for = sum(identifier.is_in(text, code) for text in sentences)
        share = {other: 100 * count / max(len(sentences), 1) for other, count in said.most_common()}
        told = [f"{share[o]:.0f} % told as {o or 'another'}" for o in share if o != code and share[o] >= 1.5]
        relatives = sorted(set().union(*(r for r in language_id.RELATIVES if code in r)) - {code})
        passes = ", ".join([*relatives, *([PASSES[code]] if code in PASSES else [])])
        figures = f"{100 * pass_for / len(sentences):.1f}\t{share.get(code, 0):.1f}" if sentences else "\t"
        lines.append("\t".join([code, figures, "; ".join([*told, *([f"{passes} passes for it"] if passes else [])])]))
        print(lines[-1], flush=True)
    if "--write" in flags:
        language_id.MEASURED.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""How many held-out answers a model gives exactly: by language and by kind of task."""

from collections import defaultdict
from statistics import fmean


def exact_match(records, answers) -> dict:
    """In percent: {"exact_match": mean over languages, "languages": their number, "by_language": {}, "by_kind": {}}.

    A language's figure is the mean over its kinds of task (`kind` among a record's further fields), each the share of
    answers equal to the record's output; a kind's figure is the mean over its languages.
    """
    hits = defaultdict(list)
    for record, text in zip(records, answers, strict=True):
        hits[record.language, record.extra.get("kind")].append(100.0 * (text.strip() == record.output.strip()))
    by_language, by_kind = defaultdict(list), defaultdict(list)
    for (language, kind), each in hits.items():
        by_language[language].append(fmean(each))
        by_kind[kind].append(fmean(each))
    by_language = {language: fmean(each) for language, each in sorted(by_language.items())}
    return {"exact_match": fmean(by_language.values()), "languages": len(by_language), "items": len(answers),
            "by_language": by_language, "by_kind": {kind: fmean(each) for kind, each in by_kind.items()}}


def describe(result: dict) -> str:
    """The figures in a few lines: the mean, each kind, the best and the worst languages."""
    ranked = sorted(result["by_language"].items(), key=lambda item: -item[1])
    listed = [", ".join(f"{language} {score:.0f}" for language, score in part) for part in (ranked[:8], ranked[-8:])]
    return (f"exact match on {result['items']:,} held-out items: {result['exact_match']:.1f} % averaged over "
            f"{result['languages']} languages ({sum(score == 0 for _, score in ranked)} at 0)\n"
            f"  by kind: {', '.join(f'{kind} {score:.1f}' for kind, score in result['by_kind'].items())}\n"
            f"  best: {listed[0]}\n  worst: {listed[1]}")

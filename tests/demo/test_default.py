"""The embedded default from end to end, `train_sft.py`, `train_dpo.py` and `eval.py` without data, on less of it."""

import json

import pytest

from minixllm.demo import cldr, feedback
from minixllm.languages import FEEDBACK_LANGUAGES
from minixllm.weights.adapters import load

import eval as evaluate
import train_dpo
import train_sft


def shorten(path, every: int):
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[::every]), "utf-8")


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_three_commands(arch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cldr, "VOCABULARY", 3000)
    build, build_feedback = cldr.build, feedback.build

    def little(folder):
        build(folder, records_per_language=20)
        shorten(folder / "test.jsonl", 20)

    def little_feedback(folder, feedback):
        build_feedback(folder, feedback, pairs_each=1)
        shorten(folder / "test.jsonl", 20)
        (folder / "valid.jsonl").write_text((folder / "test.jsonl").read_text("utf-8").replace(
            '"output"', '"chosen"').replace('"instruction":', '"rejected": "?", "instruction":'), "utf-8")

    monkeypatch.setattr(cldr, "build", little)
    monkeypatch.setattr(feedback, "build", little_feedback)

    train_sft.main(["--arch", arch, "--steps", "4", "--warmup-steps", "1"])
    said = capsys.readouterr().out
    assert said.startswith("building the embedded data and its tokenizer, once")
    assert "some of its answers to held-out prompts" in said and "exact match" in said
    assert json.loads((tmp_path / "runs/sft/exact_match.json").read_text())
    assert (tmp_path / "runs/sft/curves.png").exists()
    model, _ = load("runs/sft/model")
    assert type(model).__name__.lower() == arch

    train_dpo.main(["--steps", "2", "--warmup-steps", "1"])
    said = capsys.readouterr().out
    assert said.startswith("building the embedded pairs") and "before   after" in said and "off target" in said
    found = json.loads((tmp_path / "runs/dpo/before-after.json").read_text("utf-8"))
    assert (tmp_path / "runs/dpo/curves.png").exists()
    assert len(found["after"]["answers"]) == found["before"]["questions"] == 44
    assert all(0 <= found[when][name] <= 100 for when in found for name in ("exact match", "off target"))

    if arch == "bloom":  # the ablation's arm
        train_dpo.main(["--steps", "2", "--warmup-steps", "1", "--feedback", "monolingual", "--output", "runs/mono"])
        with open(tmp_path / "runs/cache/feedback-monolingual/train.jsonl", encoding="utf-8") as file:
            languages = {(pair["language"], pair["response_language"]) for pair in map(json.loads, file)}
        assert {(a, b) for a, b in languages if a != "eng"} == {(code, code) for code in FEEDBACK_LANGUAGES}
        mono = json.loads((tmp_path / "runs/mono/before-after.json").read_text("utf-8"))
        asked = {(each["language"], each["response_language"]) for each in mono["after"]["answers"]}
        assert len(asked) == mono["before"]["questions"] == 44 and all(a != b for a, b in asked)
        said = capsys.readouterr().out
        pairs = 29 * 30 + 99
        assert f"pairs: {pairs} kept; left out 0 too long, 0 empty, 0 equal" in said and "44 held out" in said

    evaluate.main(["--limit", "1", "--max-new-tokens", "4"])
    said = capsys.readouterr().out
    table = said.partition("## Scores by resource tier")[2].partition("##")[0]
    assert all(f"{name} stand-in all" in table for name in ("XCOPA", "FLORES(f)", "FLORES(t)", "XL-Sum", "Self-Inst*"))
    assert "| PAWS-X stand-in high" in table and " sft |" in table and " dpo |" in table and "stand-ins" in said
    results = json.loads((tmp_path / "runs/eval/results.json").read_text("utf-8"))
    results = results["benchmarks"]["XL-Sum stand-in"]
    assert results["settings"]["templates"] == "runs/eval/stand-in/instructions.toml"
    for name, source in (("XL-Sum", results["settings"]["templates"]), ("PAWS-X", "as shipped")):
        note = f"{name}: generating mode, instructions in eng: {source}"
        assert note in results["notes"] and note in (tmp_path / "runs/eval/report.md").read_text("utf-8")

"""Settings: flags, recipes, and what is said to a user who mistypes."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from minixllm import settings as settings_module
from minixllm.errors import UserError
from minixllm.settings import parse, setting


@dataclass
class Settings:
    model: str | None = setting(None, "directory of the model")
    data: list[str] = setting([], "files of records")
    learning_rate: float = setting(1e-4, "peak learning rate, 100 % of it", above=0)
    batch_size: int = setting(256, "rows a step", least=1, most=512)
    limit: int | None = setting(None, "rows read", least=0)
    resume: bool = setting(False, "continue")
    dtype: str = setting("auto", "compute type", choices=("auto", "float32"))


def test_defaults_flags_and_recipe(tmp_path):
    assert parse(Settings, []) == Settings()
    flags = ["--data", "a", "b", "--learning-rate", "3e-4", "--resume", "--dtype=float32"]
    assert parse(Settings, flags) == Settings(data=["a", "b"], learning_rate=3e-4, resume=True, dtype="float32")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('data = "x.json"\nbatch-size = 8\nlearning_rate = 1\nresume = true\n')
    assert parse(Settings, ["--config", str(recipe), "--batch-size", "4", "--no-resume"]) == Settings(
        data=["x.json"], batch_size=4, learning_rate=1.0, resume=False)
    assert parse(Settings, ["--model", "caf\udce9"]).model == "caf\udce9"  # a name of a file need not be UTF-8


def test_epochs_and_steps_name_one_thing(tmp_path):
    @dataclass
    class Run:
        model: str | None = setting(None, "a model")
        data: list[str] = setting([], "data")
        epochs: float = setting(3.0, "epochs")
        steps: int | None = setting(None, "steps")

    recipe = tmp_path / "recipe.toml"
    recipe.write_text("steps = 7\n")
    given = ["--config", str(recipe), "--model", "m"]
    assert parse(Run, given).steps == 7 and parse(Run, [*given, "--epochs", "2"]).steps is None
    embedded = {"steps": 9}
    assert parse(Run, [], embedded).steps == 9 and parse(Run, ["--epochs", "2"], embedded).steps is None
    assert parse(Run, ["--config", str(recipe), "--epochs", "2"], embedded).steps is None
    assert parse(Run, ["--epochs", "2", "--steps", "5"], embedded).steps == 5 and embedded == {"steps": 9}


def test_a_list_given_twice_is_longer():
    @dataclass
    class Run:
        model: str | None = setting(None, "a model")
        data: list[str] = setting([], "data")

    assert parse(Run, ["--data", "a", "b", "--data", "c"]).data == ["a", "b", "c"]


def test_embedded_defaults_yield_to_what_is_given(tmp_path):
    embedded = {"batch_size": 2, "learning_rate": 0.01}
    assert parse(Settings, [], embedded) == Settings(batch_size=2, learning_rate=0.01)
    assert parse(Settings, ["--batch-size", "3"], embedded) == Settings(batch_size=3, learning_rate=0.01)
    assert parse(Settings, ["--model", "m"], embedded) == Settings(model="m")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "m"')
    assert parse(Settings, ["--config", str(recipe)], embedded) == Settings(model="m")


def test_help_shows_meaning_and_both_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--help"], {"batch_size": 2})
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate, 100 % of it (default: 0.0001)" in text
    assert "rows a step (default: 256; in the embedded default run: 2)" in text
    assert "--resume, --no-resume" in text and "files of records (default: none)" in text


@pytest.mark.parametrize("argv, said", [
    (["--learning-rat", "1"], ["unknown flag --learning-rat", "did you mean --learning-rate?"]),
    (["--lr", "1"], ["unknown flag --lr", "did you mean --learning-rate?"]),
    (["--lerning_rate=1"], ["unknown flag --lerning_rate", "did you mean --learning-rate?"]),
    (["--batch-size", "many"], ["--batch-size", "'many'", "int"]),
    (["--batch-size"], ["--batch-size"]),
    (["--batch-size", "0"], ["--batch-size: found 0, expected a whole number of at least 1 and at most 512"]),
    (["--batch-size", "513"], ["--batch-size: found 513"]),
    (["--learning-rate", "0"], ["--learning-rate: found 0.0, expected a number above 0"]),
    (["--learning-rate", "nan"], ["--learning-rate: found nan"]),
    (["--learning-rate", "inf"], ["--learning-rate: found inf"]),
    (["--limit", "-1"], ["--limit: found -1, expected a whole number of at least 0"]),
    (["--dtype", "fp8"], ["--dtype", "'fp8'", "auto"]),
    (["--batch-size", "9" * 5000], ["--batch-size", "invalid int value"]),
    (["--limit", "9" * 400], ["--limit: found 999", "expected a whole number of at least 0 and at most"]),
    (["--learning-rate", "1e200"], ["--learning-rate: found 1e+200"]),
    (["--nothing\nat all"], ["unknown flag"]),
    (["records.json"], ["'records.json'", "--name value"]),
    (["--config", "/nowhere.toml"], ["/nowhere.toml", "No such file"]),
])
def test_bad_flags(argv, said):
    with pytest.raises(UserError) as error:
        parse(Settings, argv)
    assert all(part in str(error.value) for part in said) and "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("text, said", [
    ("batch_sise = 3", ["recipe.toml", "unknown key 'batch_sise'", "did you mean batch_size?"]),
    ('batch_size = "3"', ["recipe.toml: batch_size", "found '3'", "expected a whole number"]),
    ("batch_size = true", ["batch_size", "found True, expected a whole number"]),
    ("data = [1]", ["recipe.toml: data: found 1, expected text"]),
    ('dtype = "fp8"', ["dtype: found 'fp8', expected one of auto, float32"]),
    ("resume = 1", ["resume", "found 1, expected true or false"]),
    ("batch_size = 1000", ["recipe.toml: batch_size: found 1000, expected a whole number of at least 1 and"]),
    ("batch_size = = 3", ["recipe.toml", "not TOML", "line 1"]),
    ("[training]\nbatch_size = 3", ["unknown key 'training'"]),
    ("model = " + "[" * 2000, ["recipe.toml: not TOML: nested too deeply"]),
    ("model = " + "[" * 50 + "]" * 50, ["recipe.toml: model: found [[[[[", "expected text"]),
    ("batch_size = " + "9" * 4000, ["recipe.toml: batch_size: found 999", "expected a whole number"]),
    ("batch_size = " + "9" * 5000, ["recipe.toml: not TOML: Exceeds the limit"]),
    ("learning_rate = 1" + "0" * 400, ["learning_rate: found 1000", "expected a number"]),
    ("learning_rate = 1e300", ["recipe.toml: learning_rate: found 1e+300, expected a number above 0"]),
    ('model = "a\\u0000b"', ["model: found 'a\\x00b', expected text without the character NUL"]),
    ('model = "a\0b"', ["recipe.toml: not TOML"]),
    ("model = '\udcff'", ["recipe.toml: not TOML"]),
    (f"{'k' * 5000} = 1", ["recipe.toml: unknown key 'kkk"]),
    ('"a\\nb" = 1', ["recipe.toml: unknown key 'a\\nb'"]),
])
def test_bad_recipes(tmp_path, text, said):
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as error:
        parse(Settings, ["--config", str(recipe)])
    assert all(part in str(error.value) for part in said) and len(str(error.value)) <= 300


@pytest.mark.parametrize("failure, said", [
    ("raise UserError('x.json line 3: not JSON')", "x.json line 3: not JSON"),
    ("open('/dev/full', 'w').write('x' * 100_000)", "[Errno 28] No space left on device"),
    ("open('/nowhere/x', 'w')", "/nowhere/x: No such file or directory"),
    ("import torch; torch.empty(2**50)", "not enough memory ("),
    ("bytearray(2**55)", "not enough memory ()"),
    ("open('/nowhere/' + 'x' * 200 + '\\n' * 200)", "/nowhere/xxx"),
])
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, failure, said):
    script = tmp_path / "script.py"
    script.write_text("from minixllm.settings import run\nfrom minixllm.errors import UserError\n"
                      f"def main(argv):\n    {failure}\nrun(main)\n")
    root = str(settings_module.__file__).rsplit("/", 2)[0]
    environment = {"PYTHONPATH": root, "WORLD_SIZE": "1"}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(f"script.py: error: {said}") and done.stderr.count("\n") == 1
    assert len(done.stderr) < 330


def test_python_ends_as_usual_unless_there_was_a_process_group_of_several(tmp_path):
    """Profilers and coverage write their results as Python ends."""
    script = tmp_path / "script.py"
    script.write_text("import atexit, torch.distributed\nfrom minixllm.settings import run\n"
                      "atexit.register(print, 'ended')\nrun(lambda argv: 3)\n")
    for size, printed in (("1", "ended\n"), ("2", "")):
        environment = {"PYTHONPATH": str(settings_module.__file__).rsplit("/", 2)[0], "WORLD_SIZE": size, "RANK": "0"}
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout) == (3, printed), done.stderr

"""Pictures: drawn from what a run wrote, and none without matplotlib."""

import json
import sys

import numpy as np
import pytest

from minixllm import plots


def run_of(folder, held_out):
    rows = [{"step": step, "loss": 1 / step, "margin": step} for step in range(1, 101)]
    lines = [json.dumps(row) for row in rows] + [json.dumps({"step": 100, "held_out": held_out})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_a_measure_that_is_not_finite_leaves_a_gap(tmp_path):
    run_of(tmp_path, {"loss": None, "margin": None})
    rows = (tmp_path / "metrics.jsonl").read_text().replace('"margin": 50}', '"margin": null}')
    (tmp_path / "metrics.jsonl").write_text(rows)
    plots.curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("held_out, panels", [
    ({}, ["loss"]), ({"loss": 0.5, "loss/deu": 0.6}, ["loss"]), ({"loss": 0.5, "margin": 3.0}, ["loss", "margin"])])
def test_a_panel_for_each_measure(tmp_path, monkeypatch, held_out, panels):
    drawn, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    run_of(tmp_path, held_out)
    plots.curves(tmp_path)
    assert [axes.get_title() for axes in drawn[0].axes] == panels
    training, held = drawn[0].axes[0].lines
    assert training.get_ydata()[0] == 1 and training.get_ydata()[-1] == pytest.approx((1 / 99 + 1 / 100) / 2)
    assert list(held.get_ydata()) == [value for name, value in held_out.items() if name == "loss"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.glob("*.png")] == ["curves.png"]


def test_none_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run_of(tmp_path, {"loss": 0.5})
    plots.curves(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_running_mean():
    values = np.random.default_rng(0).normal(size=250)
    expected = [values[max(0, i - 4):i + 1].mean() for i in range(250)]
    assert plots._running_mean(values) == pytest.approx(expected)

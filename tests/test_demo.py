"""demo.py: what it reports when something is wrong; `.ci/run` runs it on a working installation."""

import sys
from types import SimpleNamespace

import pytest
import torch

import demo
from ddpm_model import DDPMModel
from engine.errors import UserError
from engine.shapes import draw_shapes
from tests.helpers import CPU, exit_code

STATE = SimpleNamespace(device=CPU)


def test_main_reports_failed_checks_and_runs_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    checks = {"broken": lambda _: 1 / 0, "mathematics": demo.check_mathematics}
    monkeypatch.setattr(demo, "CHECKS", checks)
    earlier = tmp_path / "demo_results" / "interpolation.png"
    earlier.parent.mkdir()
    earlier.touch()  # of a run before, whose figures are not this one's
    assert exit_code(demo.main) == 1 and not earlier.exists()
    printed = capsys.readouterr()
    assert "1/2  broken         failed" in printed.out
    assert "2/2  mathematics    passed" in printed.out
    assert "error: 1 of 2 checks failed: broken" in printed.err
    report = (tmp_path / "demo_results" / "report.html").read_text()
    assert "1 of 2 checks failed" in report and "ZeroDivisionError" in report


def test_check_mathematics_notices_another_schedule(monkeypatch):
    exact = demo.exact_alpha_bar
    monkeypatch.setattr(demo, "exact_alpha_bar", lambda *arguments: exact(*arguments) * 0.9999)
    with pytest.raises(UserError, match="alpha-bar of cosine"):
        demo.check_mathematics(STATE)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("q_sample", "q(x_t | x_0)"),
        ("predict_v", "v to x_0"),
        ("predict_start_from_noise", "noise to x_0"),
        ("predict_noise_from_start", "x_0 to noise"),
    ],
)
def test_check_mathematics_notices_a_wrong_conversion(monkeypatch, method, name):
    original = getattr(demo.GaussianDiffusion, method)
    wrong = lambda *arguments: original(*arguments) * 1.001  # noqa: E731
    monkeypatch.setattr(demo.GaussianDiffusion, method, wrong)
    with pytest.raises(UserError, match=name.replace("(", "\\(").split("|")[0]):
        demo.check_mathematics(STATE)


def test_check_interpolation_needs_a_model_with_a_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = draw_shapes(torch.arange(6).numpy(), 16, 0)
    data = SimpleNamespace(images=images)
    model = DDPMModel(**demo.ARCHITECTURE)
    with pytest.raises(UserError, match="no guide"):
        demo.check_interpolation(SimpleNamespace(device=CPU, data=data, model=model))

"""demo.py: what it says when something is wrong. That it passes where all is well, `.ci/run` shows."""

import sys

import pytest
import torch

import demo
from engine.command_line import run


def test_a_failed_check_fails_the_demo_and_the_others_still_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    monkeypatch.setattr(demo, "CHECKS", {"broken": lambda _: 1 / 0, "mathematics": demo.check_mathematics})
    with pytest.raises(SystemExit) as stopped:
        run(demo.main)
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert "1/2  broken         FAILED" in printed.out and "2/2  mathematics    passed" in printed.out
    assert "error: 1 of 2 checks failed: broken" in printed.err
    report = (tmp_path / "demo_results" / "report.html").read_text()
    assert "1 of 2 checks FAILED" in report and "ZeroDivisionError" in report


def test_the_mathematics_would_notice_another_schedule(monkeypatch):
    exact = demo.alpha_bar_of
    monkeypatch.setattr(demo, "alpha_bar_of", lambda schedule, timesteps: exact(schedule, timesteps) * 0.9999)
    with pytest.raises(AssertionError, match="alpha-bar of cosine"):
        demo.check_mathematics(demo.Demo(torch.device("cpu")))


def test_the_mathematics_would_notice_a_wrong_conversion(monkeypatch):
    wrong = demo.GaussianDiffusion.predict_v
    monkeypatch.setattr(demo.GaussianDiffusion, "predict_v", lambda *arguments: wrong(*arguments) * 1.001)
    with pytest.raises(AssertionError, match="v to x_0"):
        demo.check_mathematics(demo.Demo(torch.device("cpu")))

"""A few inputs of each kind of tests/fuzz.py."""

from tests import fuzz
from tests.helpers import needs_no_gpu


@needs_no_gpu
def test_scripts_refuse_damaged_inputs_in_one_line_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not fuzz.fuzz(count=24, seed=7)


def test_judge_notices_tracebacks_and_other_ends():
    assert fuzz.judge(2, "warning: slow\nerror: no such file\n") == "refused"
    assert fuzz.judge(0, "") == "usable"
    assert fuzz.judge("ValueError", "").startswith("traceback")
    assert fuzz.judge(1, "error: failed\n").startswith("exit code 1")
    assert fuzz.judge(2, "error: one\nerror: two\n").startswith("exit code 2 with 2")

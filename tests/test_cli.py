"""engine/cli.py: what a script does when stdout is not what it should be."""

import io
import os

from engine.cli import LOST_READER_EXIT_CODE, Parser, import_from_file, run_script

import pytest

from engine.errors import UserError
from tests.helpers import exit_code


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_run_script_escapes_what_stdout_cannot_encode(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding))
    assert exit_code(lambda: print("run 模型-\udcff: done")) == 0
    assert written.getvalue() == rb"run \u6a21\u578b-\udcff: done" + os.linesep.encode()


@pytest.mark.parametrize(("buffering", "flush"), [(0, True), (-1, True), (-1, False)])
def test_run_script_ends_silently_when_the_reader_of_stdout_is_gone(
    monkeypatch, capsys, buffering, flush
):
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "wb", buffering) as file:
        stdout = io.TextIOWrapper(file, write_through=True)
        monkeypatch.setattr("sys.stdout", stdout)
        assert exit_code(lambda: print("a line", flush=flush)) == LOST_READER_EXIT_CODE
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_run_script_does_not_hide_other_broken_pipes():
    def main():
        raise BrokenPipeError("a worker is gone")

    with pytest.raises(BrokenPipeError, match="a worker"):
        run_script(main)


def test_run_script_answers_a_file_that_cannot_be_read_with_what_to_choose(capsys, tmp_path):
    assert exit_code((tmp_path / "none.txt").read_text) == 2
    line = capsys.readouterr().err
    assert "none.txt). Choose a folder that can be written to, or a file that can be read" in line


def test_parser_tells_arguments_from_flags():
    with pytest.raises(UserError, match=r"^unexpected argument my_images "):
        Parser("").parse_args(["my_images"])
    with pytest.raises(UserError, match=r"^unknown flag --hlp; did you mean"):
        parser = Parser("")
        parser.add_argument("--hip")
        parser.parse_args(["--hlp=3"])


@pytest.mark.parametrize("name", ["mine.py", "io.py"])
def test_import_from_file_takes_dataclasses_and_replaces_no_module(tmp_path, name):
    code = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (tmp_path / name).write_text(f"{code}@dataclass\nclass Mine:\n    size: int = 3\n")
    module, _ = import_from_file(f"{tmp_path / name}:Mine", "--config", "")
    assert module.Mine().size == 3 and __import__("io") is io

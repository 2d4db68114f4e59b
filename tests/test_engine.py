"""engine/__init__.py: what happens before torch is imported."""

import ast
import os
import runpy
import signal
import sys

from engine.cli import run_script

import pytest

from engine import exit_if_importing
from tests.helpers import ROOT

SCRIPTS = [path for path in ROOT.glob("*.py") if "run_script(" in path.read_text("utf-8")]
OPENMP = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def imported_modules(path, with_stdlib: bool = False) -> list[str]:
    """The modules that a file's top level imports, in order."""
    modules = []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module)
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    stdlib = () if with_stdlib else sys.stdlib_module_names
    return [name for name in modules if name.split(".")[0] not in stdlib]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_imports_the_engine_before_all_that_loads_torch(path):
    assert imported_modules(path)[0] == "engine.cli"
    assert imported_modules(ROOT / "engine" / "__init__.py") == []


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({}, ("1000", "1")),
        ({"GOMP_SPINCOUNT": "7", "KMP_BLOCKTIME": "8"}, ("7", "8")),
        ({"OMP_WAIT_POLICY": "active"}, (None, None)),
    ],
)
def test_engine_limits_the_spinning_of_openmp_unless_the_user_did(user, expected, monkeypatch):
    for name in (*OPENMP, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the block sets
        monkeypatch.delenv(name)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "engine" / "__init__.py"))
    assert tuple(map(os.environ.get, OPENMP)) == expected


@pytest.fixture
def sigint():
    """Restores the handler of Ctrl-C."""
    handler = signal.signal(signal.SIGINT, exit_if_importing)
    yield
    signal.signal(signal.SIGINT, handler)


def test_interrupt_exits_at_once_during_an_import_only(sigint, tmp_path, monkeypatch):
    # Like numpy, the module catches whatever its imports raise.
    module = "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept Exception: pass\n"
    (tmp_path / "interrupted.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    exits = []
    monkeypatch.setattr(os, "_exit", lambda code: exits.append(code))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert exits == []
    with pytest.raises(KeyboardInterrupt):  # as the exit is only recorded here
        __import__("interrupted")
    assert exits[0] == 130


def test_main_is_interrupted_as_usual(sigint):
    with pytest.raises(SystemExit, match="130"):
        run_script(lambda: exec("raise KeyboardInterrupt"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# What Python's modules lack on Windows.
NOT_ON_WINDOWS = {
    "os": {"fork", "getuid", "killpg", "register_at_fork", "sched_getaffinity", "statvfs"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer"},
}
MODULES_NOT_ON_WINDOWS = {"fcntl", "grp", "pwd", "resource", "termios"}


def test_windows_has_what_the_files_use():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")):
        assert not MODULES_NOT_ON_WINDOWS & set(imported_modules(path, with_stdlib=True)), path
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                missing = NOT_ON_WINDOWS.get(node.value.id, ())
                assert node.attr not in missing, f"{path}:{node.lineno} {ast.unparse(node)}"


def test_scripts_import_no_matplotlib_before_they_plot():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")):
        modules = {name.split(".")[0] for name in imported_modules(path)}
        assert not modules & {"matplotlib", "tensorboard"}, path

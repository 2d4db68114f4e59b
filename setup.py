"""Installs what training needs, and reports what this machine has.

    python setup.py [--dev]            install the requirements [and those of the tests], report
    python setup.py --check            only report; exit code 1 if something is missing
    python setup.py --torch_index URL  install torch and torchvision from this index (a CUDA build)

Where the system manages this Python (PEP 668), packages go into `.venv` next to this file.
"""

import argparse
import importlib
import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python gets this far
    sys.exit(f"error: Python 3.10 or newer is needed, this is {platform.python_version()}")

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PIP_INSTALL = [sys.executable, "-m", "pip", "install"]
TORCH_PACKAGES = ("torch", "torchvision")
ROW = "  {:<34}{}"  # of the report
MODULES = {"pillow": "PIL", "pytest-xdist": "xdist"}  # whose names differ from the package's


def read_requirements(path: Path) -> dict[str, str]:
    """Returns name to versions, `2.6,<3` for `>=2.6,<3`; follows `-r other.txt`."""
    requirements: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, versions = line.partition("#")[0].replace(" ", "").partition(">=")
        if name.startswith("-r"):
            requirements |= read_requirements(path.parent / name[2:])
        elif name:
            requirements[name] = versions
    return requirements


def find_package(name: str, versions: str) -> tuple[str, str]:
    """Returns a package's installed version and what is wrong with it, empty if none."""

    def release(version: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]

    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "", "not installed"
    minimum, _, limit = versions.partition(",<")
    if release(version) < release(minimum):
        return version, f"{version} is older than {minimum}"
    if limit and release(version) >= release(limit):
        return version, f"{version} is too new, must be older than {limit}"
    return version, ""


def run(command: list[str]) -> None:
    """Runs a command; if it fails, exits with code 1 after repeating its errors."""
    print(f"$ {shlex.join(command)}")
    # stdout stays the terminal, so that pip shows its progress bars.
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    if result.returncode != 0:
        sys.exit(f"error: this command failed:\n  {shlex.join(command)}\n{result.stderr}")


def install(requirements_file: Path, torch_index: str | None) -> None:
    """Installs missing packages with pip; torch and torchvision from `torch_index`."""
    requirements = read_requirements(requirements_file)
    if torch_index:
        # The index is named after its build, and so are its versions: .../cu124 has 2.6.0+cu124.
        build = torch_index.rstrip("/").rpartition("/")[2]
        if not all(find_package(name, "")[0].endswith(f"+{build}") for name in TORCH_PACKAGES):
            specifiers = [f"{name}>={requirements[name]}" for name in TORCH_PACKAGES]
            # Without force, pip keeps another build of the same version.
            run([*PIP_INSTALL, "--force-reinstall", "--index-url", torch_index, *specifiers])
    if any(find_package(*requirement)[1] for requirement in requirements.items()):
        run([*PIP_INSTALL, "-r", str(requirements_file)])
    else:
        print(f"everything in {requirements_file.name} is already installed")


def check_installation(requirements_file: Path, torch_index: str | None) -> int:
    """Reports packages, GPUs and tier; returns 1 if a package is missing or broken."""
    # Packages.
    missing = []
    broken = []
    print(ROW.format("Python", f"{platform.python_version()}  {sys.executable}"))
    for name, versions in read_requirements(requirements_file).items():
        version, problem = find_package(name, versions)
        if problem:
            missing.append(name)
        else:
            try:
                importlib.import_module(MODULES.get(name, name.replace("-", "_")))
            except Exception as error:  # a binary for another version raises more than ImportError
                problem = f"does not import: {type(error).__name__}: {error}".splitlines()[0]
                has_index = torch_index and name in TORCH_PACKAGES
                index = ["--index-url", torch_index] if has_index else []
                requirement = f"{name}>={versions}" if versions else name
                command = [*PIP_INSTALL, "--force-reinstall", *index, requirement]
                broken.append(f"\n  {shlex.join(command)}")
        print(ROW.format(name, problem or version))

    # What to do about them.
    if missing:
        command = [sys.executable, *(arg for arg in sys.argv if arg != "--check")]
        print(f"\nMissing, too old or too new: {', '.join(missing)}. To install:")
        print(f"  {shlex.join(command)}")
        return 1
    if broken:
        print(f"\nTo repair what does not import:{''.join(broken)}")
        return 1

    # Machine.
    import torch

    from config import detect_tier

    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    rows = [f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB" for gpu in gpus]
    print(ROW.format("CUDA of torch", torch.version.cuda or "none, a CPU build"))
    print(ROW.format("GPU", "; ".join(rows) or "none that torch can use (see nvidia-smi)"))
    print(ROW.format("tier", detect_tier().name))
    return 0


def main() -> int:
    """Installs and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    parser.add_argument("--check", action="store_true", help="install nothing, only report")
    parser.add_argument("--torch_index", metavar="URL", help="index of torch and torchvision")
    args, unknown = parser.parse_known_args()
    if unknown:  # perhaps a packaging tool's command, such as `bdist_wheel`
        advice = "See `python setup.py --help`, or `pip install -r requirements.txt`"
        parser.exit(2, f"error: unknown argument {unknown[0]}. {advice}\n")

    # Where pip may not install into this Python, run this script again in .venv.
    marker = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    is_managed = sys.prefix == sys.base_prefix and marker.exists()
    if is_managed and (VENV.exists() or not args.check):
        python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        # pip comes last: without it, creation was interrupted.
        if not args.check and not python.with_name(f"pip{python.suffix}").exists():
            print(f"the system manages this Python, so packages go into {VENV}")
            run([sys.executable, "-m", "venv", str(VENV)])
        return subprocess.run([str(python), *sys.argv]).returncode

    # Install, then check.
    requirements_file = ROOT / ("requirements-dev.txt" if args.dev else "requirements.txt")
    if not args.check:
        install(requirements_file, args.torch_index)
        importlib.invalidate_caches()
    exit_code = check_installation(requirements_file, args.torch_index)
    if exit_code == 0 and not args.check:
        activate = f". {VENV}/bin/activate\n  " if Path(sys.prefix) == VENV else ""
        print(f"\nNext:\n  {activate}python train_optimized.py\n  python demo.py")
    return exit_code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in order with the output of the commands
    sys.exit(main())

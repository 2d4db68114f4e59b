"""Set a machine up to train diffusion models.

    python setup.py                    install what is needed, make the folders, report what is here
    python setup.py --dev              also install what the tests need
    python setup.py --check            install nothing, only report; exit status 1 if something is missing
    python setup.py --torch_index URL  take torch and torchvision from this index (a particular CUDA or CPU build)

Everything goes into the Python that runs this script. Where the system manages that Python (PEP 668), a virtual
environment `.venv` is made next to this file and used instead. This is a plain script, it builds no package.
"""

import argparse
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036 - an older Python parses this file and must be told
    sys.exit(f"setup.py: Python 3.10 or newer is needed, this is {platform.python_version()} ({sys.executable})")

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
FOLDERS = ("checkpoints", "samples", "inference_results", "demo_results", "data")


def parse_args() -> argparse.Namespace:
    """Read the command line; anything unknown, a packaging tool's command included, exits with status 2."""
    parser = argparse.ArgumentParser(
        description="Install what training needs, and report what this machine has.", allow_abbrev=False
    )
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="install nothing, only report")
    action.add_argument("--torch_index", metavar="URL", help="install torch and torchvision from this index first")
    args, unknown = parser.parse_known_args()
    if unknown:
        parser.exit(
            2,
            f"setup.py: unknown argument '{unknown[0]}': this script sets a machine up and builds no package; use "
            "`python setup.py [--dev] [--check | --torch_index URL]` or `pip install -r requirements.txt`\n",
        )
    return args


def externally_managed() -> bool:
    """Whether pip would refuse to install into this Python because the system's packager owns it (PEP 668)."""
    in_venv = sys.prefix != sys.base_prefix
    return not in_venv and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()


def read_requirements(path: Path) -> dict[str, str]:
    """Map each distribution's name to its lowest version, "0" for any. `-r other.txt` lines are followed."""
    minimums: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            minimums |= read_requirements(path.parent / line[3:].strip())
        elif line:
            name, _, minimum = line.partition(">=")
            minimums[name.strip()] = minimum.strip() or "0"
    return minimums


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    from importlib import metadata  # here because Python 3.7 lacks it and should get as far as the message above

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> list[int]:
    """Return the numbers of a version for comparison: "2.6.0+cu124" gives [2, 6, 0]."""
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def unmet(name: str, minimum: str) -> str:
    """Say what is wrong with the installed version of a distribution; empty if nothing is."""
    version = installed_version(name)
    if not version:
        return "not installed"
    return f"{version} is older than {minimum}" if release(version) < release(minimum) else ""


def import_error(name: str) -> str:
    """Import a distribution's module; return what went wrong in one line, empty if nothing did."""
    module = {"pillow": "PIL"}.get(name, name.replace("-", "_"))
    try:
        importlib.import_module(module)
    except Exception as error:  # a mismatched binary fails in many ways besides ImportError
        return f"does not import: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def run(command: list[str]) -> None:
    """Run a command with its output on screen; if it fails, repeat its last errors and exit with status 1."""
    print(f"$ {shlex.join(command)}", flush=True)
    # stdout stays the terminal, which keeps pip's progress bars; pip's reasons are on stderr.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    last_lines: deque[str] = deque(maxlen=10)
    for line in process.stderr:
        sys.stderr.write(line)
        last_lines.append(line)
    if process.wait() != 0:
        sys.exit(f"\nsetup.py: this command failed:\n  {shlex.join(command)}\nbecause:\n  {'  '.join(last_lines)}")


def install(requirements: Path, torch_index: str | None) -> None:
    """Install what is missing from a requirements file with pip, torch from `torch_index` if one is given."""
    pip_install = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    minimums = read_requirements(requirements)
    if torch_index:
        # Such an index is named after its build, which is also the local part of its versions: 2.6.0+cu124.
        build = torch_index.rstrip("/").rpartition("/")[2]
        names = ("torch", "torchvision")
        if not all((installed_version(name) or "").endswith(f"+{build}") for name in names):
            # Forced, because pip holds another build of the same version for good enough.
            specifiers = [f"{name}>={minimums[name]}" for name in names]
            run([*pip_install, "--force-reinstall", "--index-url", torch_index, *specifiers])
    if any(unmet(name, minimum) for name, minimum in minimums.items()):
        run([*pip_install, "-r", str(requirements)])
    else:
        print(f"Everything in {requirements.name} is already installed, pip was not needed.")


def print_row(label: str, value: str) -> None:
    """Print one line of the report."""
    print(f"  {label:<30}{value}")


def report_packages(minimums: dict[str, str]) -> tuple[list[str], list[str]]:
    """Print what is installed; return the names of what is missing or too old, and of what does not import."""
    missing, broken = [], []
    print_row("Python", f"{platform.python_version()}  {sys.executable}")
    for name, minimum in minimums.items():
        absent = unmet(name, minimum)
        failed = "" if absent else import_error(name)
        if absent:
            missing.append(name)
        elif failed:
            broken.append(name)
        print_row(name, absent or failed or installed_version(name))
    return missing, broken


def report_machine() -> None:
    """Print the build of torch, the GPUs, the driver, and the configuration tier that follows from them."""
    import torch

    from config import detect_tier

    print_row("PyTorch build", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            print_row("GPU", f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB")
        print_row("bf16", "yes" if torch.cuda.is_bf16_supported(including_emulation=False) else "no")
    else:
        print_row("GPU", "none that torch can use")
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
        print_row("driver", answer[0])
    print_row("tier", detect_tier().name)


def check(requirements: Path) -> int:
    """Report what this Python and this machine have; return 1 if a requirement is missing or broken, else 0."""
    missing, broken = report_packages(read_requirements(requirements))
    if missing:
        fix = [sys.executable, sys.argv[0], *(["--dev"] if requirements.name == "requirements-dev.txt" else [])]
        print(f"\nMissing: {', '.join(missing)}. To install:\n  {shlex.join(fix)}")
    elif broken:
        fix = [sys.executable, "-m", "pip", "install", "--force-reinstall", *broken]
        print(f"\nBroken: {', '.join(broken)}. To repair:\n  {shlex.join(fix)}")
    else:
        report_machine()
    return 1 if missing or broken else 0


def print_next_commands() -> None:
    """Print what to type next, entering `.venv` first if this ran in it from outside."""
    print("\nNext:")
    if Path(sys.prefix) == VENV and "VIRTUAL_ENV" not in os.environ:
        print(f"  {VENV}\\Scripts\\activate" if os.name == "nt" else f"  source {shlex.quote(str(VENV))}/bin/activate")
    print("  python train_optimized.py\n  python inference.py\n  python demo.py")


def run_in_venv(args: argparse.Namespace) -> int:
    """Run this script again in `.venv`, made first if need be; return its exit status."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # Making an environment ends with pip: without it, it is not there or was left half made.
    if not args.check and not python.with_name(f"pip{python.suffix}").exists():
        print(f"The system manages this Python, so packages go into {VENV}")
        run([sys.executable, "-m", "venv", str(VENV)])
    return subprocess.run([str(python), *sys.argv]).returncode


def main() -> int:
    """Install and report; return the exit status."""
    args = parse_args()
    if externally_managed() and (VENV.exists() or not args.check):
        return run_in_venv(args)
    requirements = ROOT / ("requirements-dev.txt" if args.dev else "requirements.txt")
    if args.check:
        return check(requirements)
    for folder in FOLDERS:
        (ROOT / folder).mkdir(exist_ok=True)
    install(requirements, args.torch_index)
    # Checked in a new process, which sees the packages as the scripts will.
    command = [sys.executable, sys.argv[0], "--check", *(["--dev"] if args.dev else [])]
    status = subprocess.run(command).returncode
    if status == 0:
        print_next_commands()
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # keeps our lines in order with those of the commands we run
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nsetup.py: stopped")

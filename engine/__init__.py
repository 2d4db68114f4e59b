"""What the scripts share. Nothing in here imports a script, `config` or `ddpm_model`.

Scripts import engine.cli first (pyproject.toml sorts it there), so this runs before torch loads.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

# Idle OpenMP threads spin, which takes the cores from other programs, and from each other.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU's runtime, in torch for Linux
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel's and LLVM's, in ms
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # runs on the CPU what MPS lacks


def exit_if_importing(number: int, frame: FrameType | None) -> None:
    """Handles SIGINT: exits during an import, which may catch KeyboardInterrupt."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


_is_script = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent
if _is_script and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, exit_if_importing)  # until engine.cli.run_script

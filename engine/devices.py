"""Devices: the one that everything here runs on, its name and its 16-bit floats."""

import functools

import torch

from engine import distributed

TESTED = ("cpu", "cuda")


def default_device() -> torch.device:
    """Returns this rank's device: its GPU of CUDA (or ROCm), MPS or XPU, else the CPU.

    Initializes the process group if a launcher started several ranks.
    """
    device = distributed.init().device
    if device.type not in TESTED:
        note_untested(device)
    return device


@functools.cache
def note_untested(device: torch.device) -> None:
    """Prints once that nothing here was ever run on such a device."""
    advice = "set ACCELERATE_TORCH_DEVICE=cpu to run on the CPU instead"
    distributed.print0(f"note: this project is untested on {device_name(device)}; {advice}")


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU if the backend knows one, else its type, as `CPU`."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    return device.type.upper()


def amp_dtype(device: torch.device) -> torch.dtype:
    """bf16, or fp16 on a GPU without native bf16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16

"""Devices: the one that training, inference, evaluation and the demo run on, and its name."""

import torch

from engine import distributed


def default_device() -> torch.device:
    """Returns this rank's device: its GPU of CUDA (or ROCm), MPS or XPU, else the CPU.

    Initializes the process group if a launcher started several ranks.
    """
    return distributed.init().device


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU where the backend knows one, else its type, such as `CPU`."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    return device.type.upper()

"""The old import path of `train`; it works for one more release."""

import warnings

from engine.errors import RenamedWarning
from engine.trainer import train as train

warnings.warn("engine.training is now engine.trainer", RenamedWarning, stacklevel=2)

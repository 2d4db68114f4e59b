"""Without a GPU, Triton interprets the kernels; it must be told before it is first imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

"""CUDA graphs: hundreds of kernels launched as one, where launching them one by one takes longer than their work."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

WARM_UP = 3  # passes before the capture, in which cuDNN and Triton choose their kernels


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects garbage before a block and none in it: an older graph that is freed during a capture upsets it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Graph:
    """What a function does on the GPU, captured once and replayed with other values in its inputs.

    work: takes tensors like `inputs`, whose shapes stay, sets the gradients of `parameters` and returns a tensor. Its
    Python code runs now and never again. Raises what CUDA raises for work that cannot be captured.
    """

    def __init__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()):
        self.inputs = [x.clone() for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work(*self.inputs)
                for p in parameters:
                    p.grad = None
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with without_garbage_collection(), torch.cuda.graph(self.graph):
            self.output = work(*self.inputs)
        self.gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output; it and `gradients` are overwritten by the next call."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output

"""CUDA graphs: hundreds of kernels launched as one, where launching them one by one takes longer than their work."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

WARM_UP = 3  # passes before the capture, in which cuDNN and Triton choose their kernels
KEPT = 4  # graphs of one network for different shapes: each holds its memory


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collects garbage before a block and none in it, lest an older graph be freed during a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Graph:
    """What a function does on the GPU, captured once and replayed with other values in its inputs.

    work: takes tensors like `inputs`, whose shapes stay, sets the gradients of `parameters` and returns a tensor. Its
    Python code runs now and never again. What gradients the parameters have stays theirs; the graph's own are in
    `gradients`. Raises what CUDA raises for work that cannot be captured.
    """

    def __init__(self, work: Callable[..., Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()):
        self.inputs = [x.clone() for x in inputs]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
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
        for p, gradient in zip(parameters, before, strict=True):
            p.grad = gradient

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output; it and `gradients` are overwritten by the next call."""
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output


class Replays:
    """A network's outputs without gradients, from a graph for each shape and precision that it is asked for.

    The weights may change where they are; if they move, `clear` must be called. A copy starts without graphs.
    """

    def __init__(self):
        self.graphs: dict[Hashable, Graph] = {}

    def __reduce__(self):
        return Replays, ()

    def clear(self) -> None:
        """Forgets all graphs."""
        self.graphs.clear()

    def __call__(self, network: nn.Module, *inputs: Tensor) -> Tensor:
        """network(*inputs), which lie on a GPU, in autocast's precision where that is on."""
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (network.training, precision, *((x.shape, x.dtype) for x in inputs))
        if key not in self.graphs:
            while len(self.graphs) >= KEPT:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = Graph(network, inputs)
        return self.graphs[key](*inputs).clone()

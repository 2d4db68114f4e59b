"""CUDA graphs: hundreds of kernels launched as one, where launching them one by one takes longer than their work."""

import contextlib
import gc
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 4  # graphs for different networks and shapes: each holds its memory


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
    """What a function does on the GPU, captured and replayed with other values in its inputs.

    work: takes tensors whose shapes stay and returns one. The first call does it kernel by kernel, in which cuDNN and
    Triton choose theirs; the second captures it, and from then on its Python code does not run again. pool: memory
    shared with graphs that never run at the same time. Raises what CUDA raises for work that cannot be captured.
    """

    def __init__(self, work: Callable[..., Tensor], pool: Any = None):
        self.work, self.pool, self.warm = work, pool, False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The output, which the next call overwrites."""
        if not self.warm:
            return self.warm_up(*inputs)
        if self.graph is None:
            self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            with without_garbage_collection(), torch.cuda.graph(graph, pool=self.pool):
                self.output = self.work(*self.inputs)
            self.graph = graph
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output

    def warm_up(self, *inputs: Tensor) -> Tensor:
        """The work, kernel by kernel, on a stream of its own as a capture will be."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            output = self.work(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.warm = True
        return output


class Replays:
    """Outputs of networks without gradients, from a graph for each network, shape and precision asked for.

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
        key = (network, network.training, precision, *((x.shape, x.dtype) for x in inputs))
        if key not in self.graphs:
            while len(self.graphs) >= KEPT:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = Graph(network)
        return self.graphs[key](*inputs).clone()

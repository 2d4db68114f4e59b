"""CUDA graphs: hundreds of kernels launched as one, where launching takes longer than the work."""

import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from engine.gpu_memory import is_out_of_memory

MAX_GRAPHS = 4  # for different networks and shapes; each holds its memory


class GraphCaptureError(RuntimeError):
    """A function could not be captured as a CUDA graph, e.g. because it waits for the GPU."""


class CapturedFunction:
    """Captures a function as a CUDA graph and replays it with new inputs.

    fn: takes tensors of constant shapes and returns one. The first call runs it normally, so that
    cuDNN and Triton choose their kernels; the second captures it; later ones only replay. pool:
    memory shared with graphs that never run at the same time.
    """

    def __init__(self, fn: Callable[..., Tensor], pool: Any = None):
        self.fn = fn
        self.pool = pool
        self.is_warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the output, which the next call overwrites; may raise GraphCaptureError."""
        if not self.is_warm:
            return self.warm_up(*inputs)
        if self.graph is None:
            self.graph = self.capture(*inputs)
        for static, value in zip(self.static_inputs, inputs, strict=True):
            static.copy_(value)
        self.graph.replay()
        return self.static_output

    def warm_up(self, *inputs: Tensor) -> Tensor:
        """Runs the function normally, on a side stream as in a capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            output = self.fn(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.is_warm = True
        return output

    def capture(self, *inputs: Tensor) -> torch.cuda.CUDAGraph:
        """Records the function's kernels without running them."""
        self.static_inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # No garbage collection during the capture: freeing an older graph would break it.
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.static_output = self.fn(*self.static_inputs)
        except Exception as error:
            # Ending a capture in which memory ran out fails, too, and hides the first error.
            cause: BaseException | None = error
            while cause is not None and not is_out_of_memory(cause):
                cause = cause.__context__
            if cause is not None:
                raise cause from None
            raise GraphCaptureError(str(error) or repr(error)) from error
        finally:
            if was_enabled:
                gc.enable()
        return graph


class GraphCache:
    """Runs networks without gradients, each through a CUDA graph for its shapes and precision.

    The weights may change in place; if they move, call `clear`. A copy starts without graphs.
    """

    def __init__(self):
        self.graphs: dict[Hashable, CapturedFunction] = {}

    def __reduce__(self):
        return GraphCache, ()

    def clear(self) -> None:
        """Drops all graphs."""
        self.graphs.clear()

    def __call__(self, network: nn.Module, x: Tensor, t: Tensor, *labels: Tensor) -> Tensor:
        """Returns network(x, t, None, *labels), all on a GPU, under autocast if on."""
        inputs = (x, t, *labels)
        precision = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        key = (network, network.training, precision, *((x.shape, x.dtype) for x in inputs))
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                del self.graphs[next(iter(self.graphs))]
            self.graphs[key] = CapturedFunction(lambda x, t, *labels: network(x, t, None, *labels))
        return self.graphs[key](*inputs).clone()

"""CUDA graphs: hundreds of kernels launched as one, where launching takes longer than the work."""

import functools
import gc
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from engine.denoiser import call_network
from engine.gpu_memory import is_out_of_memory

MAX_GRAPHS = 4  # for different networks and shapes; each holds its memory


class GraphCaptureError(RuntimeError):
    """A function could not be captured as a CUDA graph, e.g. because it waits for the GPU."""


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a GPU that records graphs: the same for all, or they could not share a pool."""
    return torch.cuda.Stream(device)


class CapturedFunction:
    """Captures a function as a CUDA graph and replays it with new inputs.

    fn: takes tensors of constant shapes on one GPU and returns one. The first call runs it
    normally, so that cuDNN and Triton choose their kernels; the second captures it; later ones only
    replay. Python numbers are fixed at capture: what changes between calls must be a tensor that is
    updated in place. pool: memory shared with graphs that never run at the same time.
    """

    def __init__(self, fn: Callable[..., Tensor], pool: Any = None):
        self.fn = fn
        self.pool = pool
        self.is_warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Returns the output, which the next call overwrites; may raise GraphCaptureError."""
        with torch.cuda.device(inputs[0].device):  # where Triton launches and graphs record
            if not self.is_warm:
                return self.warm_up(*inputs)
            if self.graph is None:
                self.graph = self.capture(*inputs)
            for static, value in zip(self.static_inputs, inputs, strict=True):
                static.copy_(value)
            self.graph.replay()
            return self.static_output

    def warm_up(self, *inputs: Tensor) -> Tensor:
        """Runs the function normally, on the stream of the capture."""
        stream = capture_stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            output = self.fn(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.is_warm = True
        return output

    def capture(self, *inputs: Tensor) -> torch.cuda.CUDAGraph:
        """Records the function's kernels without running them."""
        with torch.inference_mode(False):  # later calls outside it write them, too
            self.static_inputs = [x.detach().clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        stream = capture_stream(inputs[0].device)
        # No garbage collection during the capture: freeing an older graph would break it. Nor
        # autocast's cache: the weights in it, cast by earlier calls, are freed at its block's end.
        gc.collect()
        was_enabled = gc.isenabled()
        gc.disable()
        used_cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            # torch.cuda.graph stays on its stream if ending the capture fails.
            with torch.cuda.stream(stream), torch.cuda.graph(graph, self.pool, stream):
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
            torch.set_autocast_cache_enabled(used_cache)
            if was_enabled:
                gc.enable()
        return graph


class GraphCache:
    """Runs networks without gradients, through CUDA graphs.

    Each network has a graph for its shapes and precision. The weights may change in place; if they
    get other storage (`.to`, `assign=True`), call `clear`. A copy starts without graphs.
    """

    def __init__(self):
        self.clear()

    def __reduce__(self):
        return GraphCache, ()

    def clear(self) -> None:
        """Drops all graphs and their memory."""
        self.graphs: dict[Hashable, CapturedFunction] = {}
        self.pool: Any = None

    def __call__(
        self, network: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns network(x, t, None, labels), all on a GPU, under autocast if on.

        If it fails, all graphs are dropped: memory may have run out.
        """
        inputs = (x, t) if labels is None else (x, t, labels)
        precision = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        key = (network, network.training, precision, *((x.shape, x.dtype) for x in inputs))
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.clear()
            # One pool for all, which is safe as no output is read after another graph has run.
            self.pool = self.pool or torch.cuda.graph_pool_handle()
            run = lambda x, t, labels=None: call_network(network, x, t, None, labels)  # noqa: E731
            self.graphs[key] = CapturedFunction(run, self.pool)
        try:
            return self.graphs[key](*inputs).clone()
        except Exception:
            self.clear()
            raise

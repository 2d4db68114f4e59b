"""CUDA graphs without a GPU: what is captured and kept, and a training step that replays them."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_model import DDPMModel
from engine import cuda_graphs
from engine.cuda_graphs import MAX_GRAPHS, CapturedFunction, GraphCache, GraphCaptureError
from engine.errors import FallbackWarning, UserError
from engine.train_step import TrainStep
from tests.helpers import STEP_SETTINGS, make_batch, max_weight_difference


@pytest.fixture
def fake_cuda(monkeypatch) -> SimpleNamespace:
    """Stubs of what CapturedFunction uses of torch.cuda; leaving a failed capture fails, too.

    device, stream: the current ones. replays: the device of each. captures: its pool and device.
    """
    state = SimpleNamespace(device=None, stream=None, replays=[], captures=[])

    @contextlib.contextmanager
    def current(name, value):
        before = getattr(state, name)
        setattr(state, name, value)
        try:
            yield
        finally:
            setattr(state, name, before)

    class FakeCapture:
        def __init__(self, graph, pool, stream):
            state.captures.append((pool, stream.device))
            self.stream = stream

        def __enter__(self):
            state.stream = self.stream

        def __exit__(self, kind, *_):
            if kind is not None:
                raise RuntimeError("capture was invalidated")

    def stream(device=None):
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def graph():
        return SimpleNamespace(replay=lambda: state.replays.append(state.device))

    monkeypatch.setattr(cuda_graphs, "capture_stream", cuda_graphs.capture_stream.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device", partial(current, "device"))
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", partial(current, "stream"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return state


def test_captured_function_tells_capture_memory_and_other_errors_apart(fake_cuda):
    def failing(error):
        calls = []

        def fn(x):
            calls.append(x)
            if error and len(calls) == 2:
                raise error
            return x * 2

        return CapturedFunction(fn)

    x = torch.ones(2)
    captured = failing(None)
    assert torch.equal(captured(x), 2 * x) and captured.graph is None  # the first call is plain
    assert torch.equal(captured(x), 2 * x) and captured.graph is not None
    captured = failing(ValueError("waits for the GPU"))
    captured(x)
    with pytest.raises(GraphCaptureError, match="capture was invalidated"):
        captured(x)
    captured = failing(torch.OutOfMemoryError("too large"))
    captured(x)
    with pytest.raises(torch.OutOfMemoryError, match="too large"):
        captured(x)
    assert fake_cuda.stream is None  # as before, though the capture did not end properly

    def broken(x):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        CapturedFunction(broken)(x)


def test_captured_function_uses_the_device_of_its_inputs(fake_cuda):
    devices = []

    def fn(x):
        devices.append(fake_cuda.device)
        return x * 2

    captured = CapturedFunction(fn)
    second_gpu = torch.device("meta")  # stands in for one
    for _ in range(3):
        captured(torch.ones(2, device=second_gpu))
    assert devices == [second_gpu] * 2  # without a graph, and in the capture
    assert fake_cuda.captures == [(None, second_gpu)] and fake_cuda.replays == [second_gpu] * 2


def test_function_captured_in_inference_mode_takes_inputs_outside_it(fake_cuda):
    captured = CapturedFunction(lambda x: x * 2)
    with torch.inference_mode():
        captured(torch.ones(2))
        captured(torch.ones(2))
    captured(torch.full((2,), 3.0))
    assert captured.static_inputs[0].tolist() == [3, 3]


def test_capture_holds_the_casts_of_autocast(fake_cuda):
    """A cast that an earlier call made is freed when its autocast block ends."""
    casts = []

    class CastCounter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    layer = nn.Linear(2, 3, bias=False)
    captured = CapturedFunction(layer)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with CastCounter():
                captured(x)
        assert torch.is_autocast_cache_enabled()
    assert casts == [layer.weight.shape] * 2


# The cache of a model.


class Network(nn.Module):
    """Doubles x; up to 4 images fit into memory."""

    def forward(self, x, t, previous, labels=None):
        if len(x) > 4:
            raise torch.OutOfMemoryError
        return x * 2


def test_graphs_of_a_cache_share_a_pool_until_one_fails(fake_cuda):
    cache = GraphCache()
    network = Network()

    def run(count):
        return cache(network, torch.ones(count, 1), torch.zeros(count))

    for count in (3, 4):
        outputs = [run(count) for _ in range(3)]
        assert torch.equal(outputs[1], outputs[2]) and outputs[1] is not outputs[2]
    with pytest.raises(torch.OutOfMemoryError):
        run(5)
    assert not cache.graphs and cache.pool is None
    for _ in range(2):
        run(2)
    pools = [pool for pool, _ in fake_cuda.captures]
    assert pools[0] is pools[1] is not pools[2] is cache.pool


def test_cache_holds_few_graphs(fake_cuda):
    cache = GraphCache()
    networks = [Network() for _ in range(MAX_GRAPHS + 1)]
    for network in networks:
        cache(network, torch.ones(1, 1), torch.zeros(1))
    assert [key[0] for key in cache.graphs] == networks[-1:]


def test_cache_rejects_labels_for_an_unconditional_network(fake_cuda):
    with pytest.raises(UserError, match="unconditional"):
        GraphCache()(Network(), torch.ones(1, 1), torch.zeros(1), torch.zeros(1))


# A training step.


def make_step(**changes) -> TrainStep:
    torch.manual_seed(0)
    small = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 50}
    model = DDPMModel(**small, loss_weighting="min_snr")
    return TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | changes)))


class ReplayedFunction:
    """Behaves like CapturedFunction without CUDA: always the same inputs and output tensors."""

    def __init__(self, fn, pool):
        self.fn = fn
        self.inputs = self.output = None

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value)
        output = self.fn(*self.inputs)
        self.output = output.clone() if self.output is None else self.output.copy_(output)
        return self.output


@pytest.mark.parametrize("micro_batch", [32, 8, 12])
def test_step_with_replayed_micro_batches_makes_the_same_update(micro_batch, monkeypatch):
    monkeypatch.setattr("engine.train_step.CapturedFunction", ReplayedFunction)
    plain, replayed = make_step(BATCH_SIZE=micro_batch), make_step(BATCH_SIZE=micro_batch)
    replayed.graphs = {}
    for number in range(3):
        losses = [step(make_batch(), number, 1e-3)[0].item() for step in (plain, replayed)]
        assert losses[0] == losses[1]
    assert max_weight_difference(plain.model, replayed.model) == 0
    sizes = {micro_batch, 32 % micro_batch or micro_batch}
    assert set(replayed.graphs) == {"update", *((size, 32) for size in sizes)}


def test_step_with_replayed_micro_batches_takes_batches_of_several_sizes(monkeypatch):
    monkeypatch.setattr("engine.train_step.CapturedFunction", ReplayedFunction)
    plain, replayed = make_step(), make_step()
    replayed.graphs = {}
    for number, count in enumerate((32, 64, 32)):  # one part, which overwrites the gradient, or two
        losses = [step(make_batch(count), number, 1e-3)[0].item() for step in (plain, replayed)]
        assert losses[0] == losses[1]
    assert max_weight_difference(plain.model, replayed.model) == 0


@pytest.mark.parametrize("key", [8, "update"])
def test_step_continues_without_a_graph_that_cannot_be_captured(key, monkeypatch):
    class FailingFunction(ReplayedFunction):
        def __init__(self, fn, pool):
            super().__init__(fn, pool)
            self.is_failing = isinstance(fn, partial) == (key != "update")

        def __call__(self, *inputs):
            if self.inputs and self.is_failing:
                p = next(step.model.parameters())
                p.grad = torch.ones_like(p)  # left by the failed capture
                raise GraphCaptureError("operation not permitted when stream is capturing")
            return super().__call__(*inputs)

    monkeypatch.setattr("engine.train_step.CapturedFunction", FailingFunction)
    step, reference = make_step(BATCH_SIZE=8), make_step(BATCH_SIZE=8)
    step.graphs = {}
    with pytest.warns(FallbackWarning, match="CUDA graph capture failed .operation not") as caught:
        for number in range(3):
            for made in (step, reference):
                made(make_batch(), number, 1e-3)
    assert len(caught) == 1 and step.graphs is None
    assert max_weight_difference(step.model, reference.model) == 0


def test_step_does_not_catch_errors_of_the_model(monkeypatch):
    def forward(images, t, noise):
        raise RuntimeError("shapes do not match")

    step = make_step()
    step.graphs = {}
    monkeypatch.setattr("engine.train_step.CapturedFunction", ReplayedFunction)
    monkeypatch.setattr(step.model, "forward", forward)
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        step(make_batch(), 0, 1e-3)
    assert step.graphs is not None

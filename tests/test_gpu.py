"""What only a GPU can show. Run with `python -m pytest -m gpu -n 0` on a machine that has one.

The quick ones first, the one that compiles (a minute or two) last.
"""

import gc
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from config import detect_tier, estimate_memory_gib, resolve
from ddpm_model import DDPMModel
from engine import dataloader, metrics, train_step, unet
from engine.cuda_graphs import CapturedFunction, GraphCaptureError, capture_stream
from engine.dataloader import Batch, BatchLoader, ImageDataset
from engine.datasets import load_dataset
from engine.errors import FallbackWarning
from engine.shapes import draw_shapes
from engine.train_step import TrainStep
from engine.trainer import train
from tests.helpers import (
    CPU,
    STEP_SETTINGS,
    UNET_ARCHITECTURES,
    kill_one_rank,
    outputs_and_gradients,
    relative_error,
    save_images,
    torchrun,
    training_arguments,
    unet_pair,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def make_step(
    dim: int = 32,
    dim_mults: tuple[int, ...] = (1, 2, 4, 8),
    device: torch.device = CUDA,
    **changes,
) -> TrainStep:
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=dim, dim_mults=dim_mults).to(device)
    return TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | changes)))


def make_batch(count: int = 32, labels: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(count) if labels else None).to(CUDA)


def train_on_two_gpus(folder: Path, *arguments: str) -> subprocess.Popen:
    return torchrun(folder, "train.py", *training_arguments(*arguments))


def finish(launcher: subprocess.Popen) -> None:
    output, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, output + errors


def losses_of(step: TrainStep, steps: int = 5) -> list[float]:
    return [step(make_batch(), number, 1e-3)[0].item() for number in range(steps)]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_optimizers_on_the_gpu_match_the_cpu(optimizer):
    """Same gradients, fp32 against plain formulas; Muon orthogonalizes in bf16 on the GPU."""
    on_gpu = make_step(OPTIMIZER=optimizer)
    on_cpu = make_step(OPTIMIZER=optimizer, device=CPU)
    start, generator = on_cpu.params.clone(), torch.Generator().manual_seed(1)
    for number in range(4):
        on_cpu.grad.copy_(torch.randn(on_cpu.grad.shape, generator=generator))
        on_gpu.grad.copy_(on_cpu.grad)
        for step in (on_gpu, on_cpu):
            step.lr.fill_(1e-3 * (number + 1))
            step.ema_weight.fill_(0.5)
            step.update(torch.full_like(step.lr, torch.nan if number == 2 else 1.0))
    limit = 1e-5 if optimizer == "adam" else 0.1
    assert relative_error(on_gpu.params.cpu() - start, on_cpu.params - start) < limit
    assert relative_error(on_gpu.ema_params.cpu() - start, on_cpu.ema_params - start) < limit


def test_loader_streams_what_it_holds_on_the_gpu(tmp_path, monkeypatch):
    data = load_dataset("shapes", 16, tmp_path, tmp_path)
    data = ImageDataset(data.images[:640], np.arange(640))
    on_gpu = BatchLoader(data, 64, 0, CUDA, 2)
    assert on_gpu.gpu_data is not None
    monkeypatch.setattr(dataloader, "MAX_GPU_FRACTION", 0.0)
    streamed = BatchLoader(data, 64, 0, CUDA, 2)
    assert streamed.gpu_data is None
    for a, b in zip(on_gpu.epoch(2, 3), streamed.epoch(2, 3), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.device == y.device == on_gpu.gpu_data.images.device and torch.equal(x, y)


def test_step_in_bf16_follows_full_precision(monkeypatch):
    monkeypatch.setattr(train_step, "amp_dtype", lambda device: torch.bfloat16)
    expected = losses_of(make_step())
    assert losses_of(make_step(USE_AMP=True)) == pytest.approx(expected, rel=0.03)


def test_kernels_match_upstream():
    assert unet.triton_kernels
    assert torch.get_float32_matmul_precision() == "highest"
    for architecture in (dict(dim=64), UNET_ARCHITECTURES[1]):
        upstream, fast = unet_pair("cuda", **architecture)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            ours, theirs = map(outputs_and_gradients, (fast, upstream))
        for a, b in zip(ours, theirs, strict=True):
            assert relative_error(a, b) < 2e-5
    upstream, fast = unet_pair("cuda", dim=64)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = outputs_and_gradients(upstream)
    for network in (upstream, fast):
        network.zero_grad()
    ours, theirs = (outputs_and_gradients(network, autocast=True) for network in (fast, upstream))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert relative_error(a, c) < 1.5 * relative_error(b, c)


@pytest.mark.parametrize("tokens", [16, 100, 256, 576])
def test_full_attention_kernels_are_as_exact_as_pytorch_and_repeat_bit_for_bit(tokens, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, tokens, 384), (2, 4, 4, 32), (4, tokens, 128)
    qkv, mem_kv, dy = (2 * torch.randn(shape, generator=generator).to(CUDA) for shape in shapes)

    def attention(function, dtype=torch.bfloat16):
        x, memory = qkv.bfloat16().to(dtype).requires_grad_(), mem_kv.clone().requires_grad_()
        y = function(x, memory)
        y.backward(dy.bfloat16().to(dtype))
        return [y.detach().float(), x.grad.float(), memory.grad]

    kernels = unet.triton_attention.FullAttentionFunction.apply
    ours, again = (attention(kernels) for _ in range(2))
    monkeypatch.setattr(unet, "use_triton", lambda x: False)
    theirs = attention(unet.full_attention)
    exact = attention(unet.full_attention, torch.float64)
    for a, b, c, d in zip(ours, again, theirs, exact, strict=True):
        assert torch.equal(a, b)
        assert relative_error(a, d) < 1.5 * relative_error(c, d)


@pytest.mark.parametrize("count", [100, 3000])
def test_frechet_distance_is_the_cpus(count, monkeypatch):
    rng = np.random.default_rng(0)
    features = rng.standard_normal((2, count, 1280)).astype(np.float32)
    features[1] += 0.1
    statistics = [metrics.feature_statistics(part) for part in features]
    found = metrics.frechet_distance(*statistics)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found == pytest.approx(metrics.frechet_distance(*statistics), rel=1e-9)


def test_sampling_by_graph_generates_the_same_images():
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=32).to(CUDA).eval()
    images = {}
    for use_graph in (False, True):
        model.cuda_graph = use_graph
        with torch.autocast("cuda", torch.bfloat16):
            images[use_graph] = [model.sample(count, steps=6, seed=0) for count in (4, 3, 4)]
    assert len(model.graph_cache.graphs) == 2
    for a, b in zip(images[False], images[True], strict=True):
        assert (a - b).abs().max() < 2e-2


def test_graph_captured_in_inference_mode_replays_outside_it():
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=32).to(CUDA).eval()
    with torch.inference_mode():
        images = model.sample(4, steps=6, seed=0)
    assert (model.sample(4, steps=6, seed=0) - images).abs().max() < 1e-4
    assert model.graph_cache.graphs


class PlainNetwork(nn.Sequential):
    """A network whose weights autocast casts."""

    self_condition = False

    def forward(self, x, t, previous=None):
        return super().forward(x)


def test_graph_captured_under_autocast_replays_in_a_later_block():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 3, 3, padding=1)
    model = DDPMModel(image_size=32, dim=8).eval()
    model.diffusion.model = PlainNetwork(*layers)
    model.to(CUDA)
    images = {}
    for use_graph in (False, True):
        model.cuda_graph = use_graph
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                images[use_graph] = model.sample(4, steps=6, seed=0)
            # Takes the place of the weights that were cast, which are free now.
            with torch.cuda.stream(capture_stream(model.device)):
                [torch.full((128,), torch.nan, device=CUDA) for _ in range(10_000)]
            torch.cuda.synchronize()
    assert model.graph_cache.graphs
    assert (images[False] - images[True]).abs().max() < 2e-2


def test_memory_of_graphs_is_free_after_running_out_of_it():
    def reserved():
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def run_out_of_memory(*_):
        raise torch.OutOfMemoryError

    model = DDPMModel(image_size=32, dim=32).to(CUDA).eval()
    model.sample(1, steps=6, seed=0)  # takes what CUDA's libraries keep
    before = reserved()
    model.sample(64, steps=6, seed=0)
    held = reserved() - before
    model.unet.register_forward_pre_hook(run_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        model.sample(65, steps=6, seed=0)
    assert reserved() - before < held / 2


@two_gpus
def test_model_on_another_gpu_than_the_current_one_samples_the_same_images():
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=32).eval()
    images = []
    for device in ("cuda:0", "cuda:1"):
        model.to(device)
        for use_graph in (False, True):
            model.cuda_graph = use_graph
            images.append(model.sample(4, steps=6, seed=0).cpu())
        assert model.graph_cache.graphs
    assert torch.cuda.current_device() == 0
    for others in images[1:]:
        assert (others - images[0]).abs().max() < 2e-2


def test_class_conditional_model_trains_and_samples_by_graph_as_without():
    classes = {name: 1 for name in "abcd"}
    steps = []
    for use_graph in (False, True):
        torch.manual_seed(0)
        model = DDPMModel(image_size=32, dim=32, class_counts=classes).to(CUDA)
        settings = {"CUDA_GRAPH": use_graph, "USE_AMP": True, "LABEL_DROPOUT": 0.5}
        steps.append(TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | settings))))
    for number in range(5):
        images = make_batch().images
        batch = Batch(images, torch.arange(32, device=CUDA) % 4)
        losses = [step(batch, number, 1e-3)[0].item() for step in steps]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    model = steps[1].model.eval()
    options = dict(steps=4, seed=0, labels=[0, 1, 2, -1], guidance=2.0)
    images = []
    for use_graph in (False, True):
        model.cuda_graph = use_graph
        images.append(model.sample(4, guidance_mode="cfg", **options))
    assert (images[0] - images[1]).abs().max() < 2e-2
    others = model.sample(4, guidance_mode="cfg", **(options | {"labels": 3}))
    assert (images[1] - others).abs().amax(dim=(1, 2, 3)).min() > 0


@pytest.mark.parametrize("micro_batch", [32, 16, 12])
def test_captured_step_computes_what_its_kernels_do_one_by_one(micro_batch):
    settings = dict(BATCH_SIZE=micro_batch, USE_AMP=True)
    plain, captured = make_step(**settings), make_step(CUDA_GRAPH=True, **settings)
    for number in range(5):
        losses = [step(make_batch(), number, 1e-3)[0].item() for step in (plain, captured)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    sizes = {micro_batch, 32 % micro_batch or micro_batch}
    assert set(captured.graphs) == {"update", *((size, 32) for size in sizes)}


def test_captured_step_replays_with_the_labels_of_its_batch():
    class LabeledModel(DDPMModel):
        def forward(self, images, t, noise, labels=None):
            return super().forward(images, t, noise) + labels.float().mean()

    model = LabeledModel(image_size=32, dim=32).to(CUDA)
    step = TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | {"CUDA_GRAPH": True})))
    batch = make_batch(labels=True)
    for number in range(4):
        shifted = Batch(batch.images, batch.labels + 1000 * number)
        loss = step(shifted, number, 0.0)[0].item()
        assert loss == pytest.approx(1000 * number + 15.5, abs=3)
    assert step.graphs


def test_step_continues_without_a_graph_for_a_model_that_waits_for_the_gpu():
    class WaitingModel(DDPMModel):
        def forward(self, images, t, noise):
            assert t.max().item() >= 0
            return super().forward(images, t, noise)

    model = WaitingModel(image_size=32, dim=32).to(CUDA)
    step = TrainStep(model, SimpleNamespace(**(STEP_SETTINGS | {"CUDA_GRAPH": True})))
    with pytest.warns(FallbackWarning, match="CUDA graph capture failed"):
        losses = losses_of(step, 4)
    assert step.graphs is None and np.isfinite(losses).all()


def test_captured_function_out_of_memory_is_no_capture_error():
    def allocate(x):
        if is_large:
            return torch.empty(2**50, device=CUDA)
        return x * 2

    is_large = False
    captured = CapturedFunction(allocate)
    captured(torch.ones(4, device=CUDA))
    is_large = True
    with pytest.raises(torch.OutOfMemoryError):
        captured(torch.ones(4, device=CUDA))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()

    waiting = CapturedFunction(lambda x: x * x.sum().item())
    waiting(torch.ones(4, device=CUDA))
    with pytest.raises(GraphCaptureError):
        waiting(torch.ones(4, device=CUDA))


def test_features_in_fp16_are_those_of_full_precision():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-eval.txt")
    network, shapes = metrics.Lite0(), draw_shapes(np.arange(64), 32, 0)
    exact = metrics.extract_features(network, shapes, CPU)
    half = metrics.extract_features(network.to(CUDA), shapes, CUDA)
    assert np.sqrt(np.square(half - exact).mean()) < 0.1 * exact.std(axis=0).mean()  # bf16: 0.48


def test_step_really_out_of_memory_halves_the_micro_batch():
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * 2**30) / total)
    batch = make_batch(512)
    try:
        step = make_step(dim=64, BATCH_SIZE=512)
        with pytest.warns(FallbackWarning, match="out of memory"):
            loss, _ = step(batch, 0, 1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert step.micro_batch < 512
    reference = make_step(dim=64, BATCH_SIZE=64)
    assert loss.item() == pytest.approx(reference(batch, 0, 1e-3)[0].item(), rel=1e-3)


def test_estimated_memory_is_near_the_peak():
    for amp in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = make_step(dim=64, BATCH_SIZE=128, USE_AMP=amp)
        batch = make_batch(128)
        for number in range(3):
            step(batch, number, 1e-3)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        parameters = sum(p.numel() for p in step.param_views)
        estimate = estimate_memory_gib(64, 32, 128, parameters, amp)
        assert peak / 1.3 < estimate < peak * 1.6, f"amp {amp}: peak {peak:.2f}, not {estimate:.2f}"
        del step, batch


def test_run_on_the_gpu_resumes_and_its_loss_falls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.array(load_dataset("shapes", 16, tmp_path).images)
    flags = {
        "IMAGE_SIZE": 16, "DIM": 32, "DIM_MULTS": (1, 2, 2), "BATCH_SIZE": 64,
        "NUM_SAMPLE_GRIDS": 1, "USE_AMP": True, "GRID_IMAGES": 4, "WARMUP_STEPS": 10,
        "LEARNING_RATE": 1e-3, "EMA_DECAY": 0.95,
    }  # fmt: skip
    config = resolve("shapes", detect_tier(), flags=flags | {"MAX_STEPS": 100, "RUN_NAME": "gpu"})
    final = train(DDPMModel.from_config(config), data, config)
    first = torch.load(final, weights_only=True)["progress"]["best"]
    config = resolve("shapes", detect_tier(), flags=flags | {"MAX_STEPS": 200})
    train(DDPMModel.from_config(config), data, config, resume=final)
    progress = torch.load(final, weights_only=True)["progress"]
    assert progress["step"] == 200 and progress["best"] < first < 0.5  # untrained: 1


@two_gpus
def test_rank_killed_on_a_gpu_ends_the_run_which_resumes_on_one_and_on_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dim", "32", "--use_amp", "--cuda_graph"]
    new = ["--run_name", "killed", "--max_steps", "100000", "--save_every_minutes", "0"]
    save_images(tmp_path)
    kill_one_rank(train_on_two_gpus(tmp_path, *flags, *new), "killed")
    last = tmp_path / "checkpoints/killed/last.pt"
    step = torch.load(last, weights_only=True)["progress"]["step"]
    resume = ["--resume", "killed", "--max_steps"]
    finish(torchrun(tmp_path, "train.py", *resume, str(step + 20), count=1))
    finish(train_on_two_gpus(tmp_path, *flags, *resume, str(step + 40)))
    assert torch.load(last, weights_only=True)["progress"]["step"] == step + 40


@two_gpus
def test_two_gpus_sample_what_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DDPMModel(image_size=32, dim=32).save_model("checkpoints/ddpm_final.pt")
    flags = ["--mode", "batch", "--num_samples", "1000", "--steps", "5", "--format", "npz"]
    for count in (1, 2):
        finish(torchrun(tmp_path, "inference.py", *flags, "--output_dir", str(count), count=count))
    one, two = (
        np.load(next((tmp_path / name).rglob("images.npz")))["images"].astype(int) for name in "12"
    )
    assert len(two) == 1000 and np.abs(one - two).max() <= 1


def test_compiled_fp16_with_loss_scaling_follows_full_precision(monkeypatch):
    levels = (1, 2)  # one with linear attention, one with full: all there is to compile
    exact = losses_of(make_step(dim_mults=levels))
    monkeypatch.setattr(train_step, "amp_dtype", lambda device: torch.float16)
    step = make_step(dim_mults=levels, USE_AMP=True, COMPILE_MODEL=True)
    assert losses_of(step) == pytest.approx(exact, rel=0.03)
    assert step.skipped_updates.item() == 0 and step.use_loss_scaling
    assert step.loss_function is not step.model  # it did not continue without compilation

"""What only a GPU can show. Run with `python -m pytest -m gpu` on a machine that has one.

The quick ones first, the one that compiles (a minute or two) last.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import detect_tier, memory_gib, resolve
from ddpm_model import DDPMModel
from engine import batches, metrics, step, unet
from engine.batches import Batches
from engine.shapes import draw_shapes
from engine.sources import load_images
from engine.training import train
from tests.test_processes import finish, kill_one_of, torchrun, train_with_two
from tests.test_step import SETTINGS
from tests.test_unet import ARCHITECTURES, error, pair, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def make(dim: int = 32, dim_mults: tuple[int, ...] = (1, 2, 4, 8), **changes) -> step.Step:
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=dim, dim_mults=dim_mults).to(CUDA)
    return step.Step(model, SimpleNamespace(**(SETTINGS | changes)))


def images(count: int = 32) -> torch.Tensor:
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).to(
        CUDA
    )


def losses(made: step.Step, steps: int = 5) -> list[float]:
    return [made(images(), number, 1e-3)[0].item() for number in range(steps)]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_optimizers_do_on_the_gpu_what_they_do_on_the_cpu(optimizer):
    """Same gradients, fp32 against plain formulas; Muon's matrices are made orthogonal in bf16 here."""
    made = make(OPTIMIZER=optimizer)
    torch.manual_seed(0)
    other = step.Step(DDPMModel(image_size=32, dim=32), SimpleNamespace(**(SETTINGS | {"OPTIMIZER": optimizer})))
    start, generator = other.weights.clone(), torch.Generator().manual_seed(1)
    for number in range(4):
        other.gradient.copy_(torch.randn(other.gradient.shape, generator=generator))
        made.gradient.copy_(other.gradient)
        for one in (made, other):
            one.rate.fill_(1e-3 * (number + 1))
            one.fresh.fill_(0.5)
            one.update(torch.full_like(one.rate, torch.nan if number == 2 else 1.0))
    change = error(made.weights.cpu() - start, other.weights - start)
    assert change < (1e-5 if optimizer == "adam" else 0.1)
    assert error(made.average.cpu() - start, other.average - start) < (1e-5 if optimizer == "adam" else 0.1)


def test_worker_processes_deliver_what_lies_on_the_gpu(tmp_path, monkeypatch):
    data = load_images("shapes", 16, tmp_path, tmp_path)[:640]
    resident = Batches(data, 64, 0, CUDA, 2)
    assert resident.resident is not None
    monkeypatch.setattr(batches, "GPU_SHARE", 0.0)
    streamed = Batches(data, 64, 0, CUDA, 2)
    assert streamed.resident is None
    for a, b in zip(resident.epoch(2, 3), streamed.epoch(2, 3), strict=True):
        assert a.device == b.device == resident.resident.device and torch.equal(a, b)


def test_bf16_follows_full_precision(monkeypatch):
    monkeypatch.setattr(step, "amp_dtype", lambda device: torch.bfloat16)
    assert losses(make(USE_AMP=True)) == pytest.approx(losses(make()), rel=0.03)


def test_the_kernels_give_what_the_library_gives(monkeypatch):
    assert unet.kernels
    for flags in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(flags, "allow_tf32", False)
    for architecture in (dict(dim=64), ARCHITECTURES[1]):
        library, fast = pair("cuda", **architecture)
        for a, b in zip(results(fast), results(library), strict=True):
            assert error(a, b) < 2e-5
    library, fast = pair("cuda", dim=64)
    exact = results(library)
    for network in (library, fast):
        network.zero_grad()
    for a, b, c in zip(results(fast, autocast=True), results(library, autocast=True), exact, strict=True):
        assert error(a, c) < 1.5 * error(b, c)


def test_sampling_by_graph_draws_the_same_images():
    torch.manual_seed(0)
    model = DDPMModel(image_size=32, dim=32).to(CUDA).eval()
    images = {}
    for model.cuda_graph in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            images[model.cuda_graph] = [model.sample(count, steps=6, seed=0) for count in (4, 3, 4)]
    assert len(model.replays.graphs) == 2
    for a, b in zip(images[False], images[True], strict=True):
        assert (a - b).abs().max() < 2e-2


@pytest.mark.parametrize("micro", [32, 16, 12])
def test_a_captured_step_computes_what_its_kernels_do_one_by_one(micro):
    settings = dict(BATCH_SIZE=micro, USE_AMP=True)
    plain, captured = make(**settings), make(CUDA_GRAPH=True, **settings)
    for number in range(5):
        losses = [made(images(), number, 1e-3)[0].item() for made in (plain, captured)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert set(captured.graphs) == {min(micro, 32), 32 % micro or micro, "update"}


def test_features_in_fp16_are_those_of_full_precision():
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-eval.txt")
    network, shapes = metrics.Lite0(), draw_shapes(np.arange(64), 32, 0)
    exact = metrics.extract(network, shapes, torch.device("cpu"))
    half = metrics.extract(network.to(CUDA), shapes, CUDA)
    assert np.sqrt(np.square(half - exact).mean()) < 0.1 * exact.std(axis=0).mean()  # bf16: 0.48


def test_real_lack_of_memory_halves_the_micro_batch():
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2 * 2**30) / total)
    try:
        made = make(dim=64, BATCH_SIZE=512)
        many = images(512)
        loss, _ = made(many, 0, 1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert made.micro_batch < 512
    reference = make(dim=64, BATCH_SIZE=64)
    assert loss.item() == pytest.approx(reference(many, 0, 1e-3)[0].item(), rel=1e-3)


def test_estimated_memory_is_near_the_peak():
    for amp in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = make(dim=64, BATCH_SIZE=128, USE_AMP=amp)
        many = images(128)
        for number in range(3):
            made(many, number, 1e-3)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        estimate = memory_gib(64, 32, 128, sum(p.numel() for p in made.parameters), amp)
        assert peak / 1.3 < estimate < peak * 1.6, f"amp {amp}: peak {peak:.2f} GiB, estimated {estimate:.2f}"
        del made, many


def test_a_run_on_the_gpu_resumes_and_its_loss_falls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = np.array(load_images("shapes", 16, tmp_path))
    flags = {"IMAGE_SIZE": 16, "DIM": 32, "DIM_MULTS": (1, 2, 2), "BATCH_SIZE": 64, "SAMPLE_GRIDS": 1, "USE_AMP": True}
    flags |= {"NUM_SAMPLES": 4, "WARMUP_STEPS": 10, "LEARNING_RATE": 1e-3, "EMA_DECAY": 0.95}
    config = resolve("shapes", detect_tier(), flags=flags | {"MAX_STEPS": 100, "RUN_NAME": "gpu"})
    final = train(DDPMModel.from_config(config), data, config)
    first = torch.load(final, weights_only=True)["progress"]["best"]
    config = resolve("shapes", detect_tier(), flags=flags | {"MAX_STEPS": 200})
    train(DDPMModel.from_config(config), data, config, resume=final)
    state = torch.load(final, weights_only=True)
    assert state["progress"]["step"] == 200 and state["progress"]["best"] < first < 0.5  # untrained: 1


@two_gpus
def test_a_process_killed_on_a_gpu_ends_the_run_which_goes_on_with_one_and_with_two(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--dim", "32", "--use_amp", "--cuda_graph"]
    kill_one_of(
        train_with_two(*flags, "--run_name", "killed", "--max_steps", "100000", "--save_minutes", "0"), "killed"
    )
    last = tmp_path / "checkpoints/killed/last.pt"
    step = torch.load(last, weights_only=True)["progress"]["step"]
    finish(torchrun(tmp_path, "train.py", "--resume", "killed", "--max_steps", str(step + 20), count=1))
    finish(train_with_two(*flags, "--resume", "killed", "--max_steps", str(step + 40)))
    assert torch.load(last, weights_only=True)["progress"]["step"] == step + 40


@two_gpus
def test_two_gpus_draw_the_set_of_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DDPMModel(image_size=32, dim=32).save_model("checkpoints/ddpm_final.pt")
    for count in (1, 2):
        flags = ["--mode", "batch", "--num_samples", "1000", "--steps", "5", "--format", "npz"]
        finish(torchrun(tmp_path, "inference.py", *flags, "--output_dir", str(count), count=count))
    one, two = (np.load(next((tmp_path / name).rglob("images.npz")))["images"].astype(int) for name in "12")
    assert len(two) == 1000 and np.abs(one - two).max() <= 1


def test_fp16_compiled_and_scaled_follows_full_precision(monkeypatch):
    levels = (1, 2)  # one with linear attention, one with full: all there is to compile
    exact = losses(make(dim_mults=levels))
    monkeypatch.setattr(step, "amp_dtype", lambda device: torch.float16)
    made = make(dim_mults=levels, USE_AMP=True, COMPILE_MODEL=True)
    assert losses(made) == pytest.approx(exact, rel=0.03)
    assert made.skipped.item() == 0 and made.scales
    assert made.network is not made.model  # it did not go on without compilation

"""DDPMModel: defaults, loss against upstream's, files of every version."""

import os
import pickle
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from PIL import Image

from config import resolve
from ddpm_model import DDPMModel
from engine import checkpoints
from engine.cuda_graphs import GraphCaptureError
from engine.dataloader import ImageDataset
from engine.errors import FallbackWarning, RenamedWarning, UserError
from engine.noise_schedule import BETA_SCHEDULES, OBJECTIVES
from engine.samplers import ddim, uniform
from tests.helpers import CPU_TIER, random_images

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 10}
TRAINING_INFO = {"config": {"DIM": 8}, "progress": {"step": 3}}


def small(seed: int = 0, **changes) -> DDPMModel:
    torch.manual_seed(seed)
    return DDPMModel(**(SMALL | changes)).eval()


def guided(**changes) -> DDPMModel:
    """A model with a guide of other weights."""
    model = small(**changes)
    model.snapshot_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


# Construction.


def test_full_attention_is_at_small_resolutions_by_default():
    assert DDPMModel(32, dim=8).architecture["full_attn"] == [False, True, True, True]
    assert DDPMModel(64, dim=8).architecture["full_attn"] == [False, False, True, True]


def test_from_config_passes_every_setting():
    flags = {
        "IMAGE_SIZE": 16, "DIM": 8, "DIM_MULTS": (1, 2, 3), "TIMESTEPS": 30, "DROPOUT": 0.3,
        "SAMPLING_TIMESTEPS": 7, "OBJECTIVE": "pred_x0", "BETA_SCHEDULE": "sigmoid",
        "LOSS_WEIGHTING": "min_snr", "MIN_SNR_GAMMA": 4.0, "SCHEDULE_BASE_SIZE": 32,
        "GUIDANCE": 1.7, "ATTENTION_HEADS": (1, 2, 3), "ATTENTION_DIM": (8, 16, 24),
        "FULL_ATTENTION_MAX_SIZE": 8, "GRADIENT_CHECKPOINTING": True, "SEED": 5, "CHANNELS": 4,
        "GUIDANCE_MODE": "both", "GUIDANCE_MIN_SIGMA": 0.1, "GUIDANCE_MAX_SIGMA": 3.0,
        "CLASS_CONDITIONAL": True, "P_MEAN": -0.5,
    }  # fmt: skip
    config = resolve("folder", CPU_TIER, flags=flags)
    model = DDPMModel.from_config(config, {"a": 2, "b": 3})
    assert model.architecture == {
        "image_size": 16, "dim": 8, "dim_mults": [1, 2, 3], "channels": 4, "timesteps": 30,
        "sampling_timesteps": 7, "objective": "pred_x0", "beta_schedule": "sigmoid",
        "loss_weighting": "min_snr", "min_snr_gamma": 4.0, "schedule_base_size": 32,
        "guidance": 1.7, "dropout": 0.3, "full_attn": [False, True, True],
        "attn_heads": [1, 2, 3], "attn_dim_head": [8, 16, 24], "class_counts": {"a": 2, "b": 3},
        "guidance_mode": "both", "guidance_min_sigma": 0.1, "guidance_max_sigma": 3.0,
        "consistency": False, "p_mean": -0.5,
    }  # fmt: skip
    assert model.unet.checkpointing
    same = DDPMModel.from_config(config, {"a": 2, "b": 3})
    assert all(map(torch.equal, model.parameters(), same.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a positive multiple of 8"),
        ({"timesteps": 10, "sampling_timesteps": 20}, "sampling_timesteps is 20"),
        ({"image_size": 0}, "image_size 0 is not a positive multiple of 8"),
        ({"loss_weighting": "x"}, "loss_weighting is 'x'; choose from"),
        ({"attn_heads": (4, 4, 4)}, "has 3 values, but dim_mults has 4"),
    ],
)
def test_wrong_arguments_raise_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        DDPMModel(**arguments)


def test_model_in_half_precision_is_not_saved(tmp_path):
    with pytest.raises(UserError, match="noise schedule is rounded"):
        small().half().save_model(tmp_path / "half.safetensors")


def test_former_names_work_with_a_warning():
    model = small()
    with pytest.warns(RenamedWarning, match="keep_guide is now snapshot_guide"):
        model.keep_guide()
    assert model.guide is not None
    with pytest.warns(RenamedWarning, match="provenance is now training_info"):
        assert model.provenance is model.training_info
    with pytest.warns(RenamedWarning, match="classes is now class_counts"):
        assert small(classes={"a": 2, "b": 3}).class_names == ("a", "b")
    data = ImageDataset(random_images(3, 8), np.array([0, 1, -1]), ("a", "b"))
    with pytest.warns(RenamedWarning, match="classes is now class_counts"):
        assert data.classes == {"a": 1, "b": 1}
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


# Loss.


@pytest.mark.parametrize("gamma", [0.0, 5.0])
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_matches_upstream(objective, schedule, gamma):
    model = small(
        objective=objective, beta_schedule=schedule, loss_weighting="min_snr", min_snr_gamma=gamma
    )
    images = torch.rand(6, 3, 8, 8)
    noise = torch.randn(6, 3, 8, 8)
    t = torch.tensor([0, 3, 10, 20, 35, 39])
    expected = model.diffusion.p_losses(images * 2 - 1, t, noise=noise)
    torch.testing.assert_close(model(images, t, noise), expected)


@pytest.mark.parametrize("seed", [1, 0])  # of random: with and without self-conditioning
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_with_self_conditioning_matches_upstream(objective, seed):
    model = small(objective=objective, self_condition=True).train()
    images = torch.rand(4, 3, 8, 8)
    noise = torch.randn(4, 3, 8, 8)
    t = torch.tensor([0, 10, 20, 35])
    calls = []
    model.unet.register_forward_hook(lambda *_: calls.append(1))
    losses = []
    gradients = []
    for loss_fn in (
        lambda: model(images, t, noise),
        lambda: model.diffusion.p_losses(images * 2 - 1, t, noise=noise),
    ):
        random.seed(seed)
        loss = loss_fn()
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, model.unet.init_conv.weight)[0])
    assert len(calls) == 2 * (1 + seed)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_validation_with_self_conditioning_is_the_same_each_time():
    model = small(self_condition=True).eval()
    images, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    t = torch.tensor([1, 10, 20, 39])
    losses = {model(images, t, noise).item() for _ in range(8)}
    assert len(losses) == 1


def test_self_conditioning_knows_the_labels():
    model = small(self_condition=True, class_counts={"a": 1, "b": 1})
    seen = []
    model.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[3:]))
    random.seed(1)  # with self-conditioning
    labels = torch.tensor([1, 0])
    model(torch.rand(2, 3, 8, 8), torch.tensor([3, 9]), torch.randn(2, 3, 8, 8), labels)
    assert len(seen) == 2 and all(torch.equal(*each, labels) for each in seen)


# CUDA graphs, without a GPU.


def test_failed_graph_capture_continues_without_graphs():
    model = small()
    x = SimpleNamespace(is_cuda=True)

    def fail(*_):
        raise GraphCaptureError("operation not permitted\nwhen capturing")

    model.graph_cache = fail
    with (
        torch.no_grad(),
        pytest.warns(FallbackWarning, match=r"capture failed \(operation not perm"),
    ):
        assert model._run_network(lambda x, t, previous: x, x, None) is x
    assert not model.cuda_graph and DDPMModel.cuda_graph


def test_errors_of_a_network_are_not_taken_for_failed_captures():
    model = small()

    def fail(*_):
        raise RuntimeError("shapes do not match")

    model.graph_cache = fail
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes do not match"):
        model._run_network(model.unet, SimpleNamespace(is_cuda=True), None)
    assert model.cuda_graph


def test_graphs_are_dropped_when_weights_get_other_storage():
    model = small()
    for change in (model.float, lambda: model.load_state_dict(model.state_dict(), assign=True)):
        model.graph_cache.graphs["network"] = None
        change()
        assert not model.graph_cache.graphs


# Files.


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_load_model_needs_nothing_but_the_file(tmp_path, suffix):
    changes = {"objective": "pred_x0", "dropout": 0.1, "attn_heads": 2, "full_attn": (True, False)}
    changes |= {"schedule_base_size": 32, "class_counts": {"cat": 3, "dog": 1}}
    model = small(**changes)
    model.save_model(tmp_path / f"model{suffix}")
    loaded = DDPMModel.from_file(tmp_path / f"model{suffix}")
    assert loaded.architecture == model.architecture
    assert loaded.class_names == ("cat", "dog") and loaded.class_counts == changes["class_counts"]
    assert torch.equal(loaded.sample(2, seed=0), model.sample(2, seed=0))
    assert [path.name for path in tmp_path.iterdir()] == [f"model{suffix}"]


@pytest.mark.parametrize("with_guide", [False, True])
def test_load_model_takes_the_ema_weights_of_a_run(tmp_path, with_guide):
    raw = small(seed=1)
    ema = guided() if with_guide else small()
    state = {"architecture": raw.architecture, "model": raw.state_dict(), "ema": ema.state_dict()}
    checkpoints.save(tmp_path / "final.pt", state | TRAINING_INFO)
    loaded = small(seed=2).load_model(tmp_path / "final.pt").eval()
    assert loaded.state_dict().keys() == ema.state_dict().keys()
    for name, value in ema.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(loaded.sample(1, seed=0), ema.sample(1, seed=0))
    assert loaded.training_info == TRAINING_INFO


@pytest.mark.parametrize(
    ("name", "compressed"),
    [("model.pt", False), ("model.safetensors", False), ("model.safetensors", True)],
)
def test_save_model_includes_the_guide(name, compressed, tmp_path):
    model = guided(guidance=2.0)
    model.save_model(tmp_path / name, compressed)
    loaded = DDPMModel.from_file(tmp_path / name).eval()
    assert loaded.guidance == 2.0
    assert next(loaded.parameters()).dtype == torch.float32
    expected = model.sample(2, seed=0)
    torch.testing.assert_close(
        loaded.sample(2, seed=0), expected, atol=0.02 if compressed else 0, rtol=0
    )  # fmt: skip
    loaded.training_info = TRAINING_INFO
    small().save_model(tmp_path / name)
    assert loaded.load_model(tmp_path / name).guide is None and not loaded.training
    assert loaded.training_info == {"config": {}, "progress": {}}


def test_load_model_reads_architectures_of_earlier_versions(tmp_path):
    model = small(
        image_size=32, schedule_base_size=64, loss_weighting="min_snr", guidance=1.0,
        guidance_min_sigma=0.2, guidance_max_sigma=5.0, full_attn=(False, True),
        class_counts={"a": 2, "b": 3}, p_mean=-1.2,
    )  # fmt: skip
    path = tmp_path / "old.pt"
    old = dict(model.architecture)
    for name in (
        "loss_weighting", "guidance", "guidance_min_sigma", "guidance_max_sigma", "full_attn",
        "dropout", "attn_heads", "p_mean",
    ):  # fmt: skip
        del old[name]
    old["schedule_size"] = old.pop("schedule_base_size")
    old["classes"] = old.pop("class_counts")
    checkpoints.save(path, {"architecture": old, "model": model.state_dict()})
    loaded = DDPMModel.from_file(path)
    for name in DDPMModel.upgrade_architecture(old):
        assert loaded.architecture[name] == model.architecture[name], name
    assert torch.equal(loaded.sample(1, seed=0), model.sample(1, seed=0))

    del old["schedule_size"]
    old["guidance"] = 0.0  # which meant 1
    checkpoints.save(path, {"architecture": old, "model": model.state_dict()})
    loaded = DDPMModel.from_file(path)
    assert (loaded.architecture["schedule_base_size"], loaded.guidance) == (0, 1)


@pytest.mark.parametrize(
    ("unet", "process"),
    [
        ({}, {"objective": "pred_v", "beta_schedule": "sigmoid"}),
        (
            {"full_attn": (False, True, False)},
            {"objective": "pred_noise", "min_snr_loss_weight": True},
        ),
        ({"self_condition": True}, {"objective": "pred_x0", "beta_schedule": "linear"}),
    ],
)
def test_load_model_reads_checkpoints_of_upstreams_trainer(tmp_path, unet, process):
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 2 * i, 100)).save(tmp_path / f"{i}.png")
    diffusion = GaussianDiffusion(
        Unet(8, dim_mults=(1, 2, 2), **unet), image_size=16, timesteps=30, sampling_timesteps=10,
        **process,
    )  # fmt: skip
    folder = str(tmp_path)
    trainer = Trainer(
        diffusion, folder, results_folder=folder, train_num_steps=2, calculate_fid=False
    )  # fmt: skip
    trainer.train()
    trainer.save(1)
    path = tmp_path / "model-1.pt"
    with pytest.raises(UserError, match=r"its image size\. Say it with --image_size"):
        DDPMModel.from_file(path)
    model = DDPMModel(image_size=16).load_model(path)
    assert model.architecture == DDPMModel.from_file(path, image_size=16).architecture
    assert (model.image_size, model.architecture["objective"]) == (16, process["objective"])

    torch.manual_seed(3)
    expected = trainer.ema.ema_model.eval().sample(2)
    torch.manual_seed(3)
    x = torch.randn(2, 3, 16, 16)
    denoiser = model.denoiser()
    with torch.no_grad():
        *_, (sample, _) = ddim(denoiser, x, uniform(denoiser.alpha_bar, 10), torch.randn_like)
    torch.testing.assert_close((sample + 1) / 2, expected, atol=1e-4, rtol=0)


class Unpickled:
    """Creates a file if it is ever unpickled."""

    def __reduce__(self):
        return (Path("unpickled").touch, ())


@pytest.fixture
def broken_files(tmp_path, monkeypatch) -> list[Path]:
    """Files that are no models, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for suffix in ("pt", "safetensors"):
        small().save_model(f"intact.{suffix}")
        Path(f"cut.{suffix}").write_bytes(Path(f"intact.{suffix}").read_bytes()[:-5000])
    Path("text.pt").write_text("not a checkpoint")
    Path("evil.pt").write_bytes(pickle.dumps(Unpickled()))
    torch.save([1, 2], "list.pt")
    torch.save({"model": {"weight": torch.zeros(2)}}, "other.pt")
    torch.save({"architecture": {"dim": 8}, "model": {}}, "partial.pt")
    intact = torch.load("intact.pt", weights_only=True)
    for name, change in {
        "list-architecture.pt": {"architecture": [8]}, "list-weights.pt": {"model": [8]},
        "list-config.pt": {"config": [8]}, "text-seconds.pt": {"progress": {"seconds": "8"}},
        "text-guidance.pt": {"architecture": intact["architecture"] | {"guidance": "2"}},
        "library.pt": {"architecture": None, "model": {"model.init_conv.weight": torch.ones(1)}},
    }.items():  # fmt: skip
        torch.save(intact | change, name)
    names = set(os.listdir()) - {"intact.pt", "intact.safetensors"}
    return [Path(name) for name in (*names, "missing.pt", "missing.safetensors")]


def test_load_model_names_files_that_are_no_models_and_never_unpickles(broken_files):
    model = small()
    architecture, images = model.architecture, model.sample(1, seed=0)
    for path in broken_files:
        with pytest.raises(UserError, match=path.name.replace(".", r"\.")) as caught:
            model.load_model(path)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=path.name.replace(".", r"\.")):
            DDPMModel.from_file(path)
    assert not Path("unpickled").exists()
    assert model.architecture is architecture  # it stays as it was
    assert torch.equal(model.sample(1, seed=0), images)

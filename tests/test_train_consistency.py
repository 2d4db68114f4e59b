"""train_consistency.py: runs that tune a model, their settings, and the tuned model's samples."""

import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import inference
import train as train_script
import train_consistency
from config import resolve
from ddpm_model import DDPMModel
from engine import checkpoints, plots
from engine.errors import FallbackWarning, UserError
from engine.micro_batch import probe_micro_batch
from engine.run import checkpoint_bytes
from engine.samplers import CONSISTENCY_LEVELS
from engine.train_step import TrainStep
from engine.trainer import train
from tests.forked_script import finish, start_two_ranks
from tests.helpers import (
    CPU_TIER,
    checkpoint_weights,
    max_checkpoint_difference,
    random_images,
    run_script_ok,
    save_images,
    training_arguments,
)
from train_consistency import TUNING, ConsistencyModel

SMALL = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 40, "sampling_timesteps": 2}


def tuned_model(**changes) -> ConsistencyModel:
    torch.manual_seed(0)
    return ConsistencyModel(**SMALL | changes).eval()


def guided_source(**changes) -> DDPMModel:
    """A model whose guide differs from its network."""
    torch.manual_seed(1)
    source, other = (DDPMModel(**SMALL | {"guidance": 2.0} | changes).eval() for _ in range(2))
    source.guide = other.unet
    return source


def configure(**changes):
    flags = {
        "IMAGE_SIZE": 8, "DIM": 8, "DIM_MULTS": (1, 2), "BATCH_SIZE": 16, "GRID_IMAGES": 4,
        "WARMUP_STEPS": 2, "KEEP": 0, "MAX_STEPS": 6, "NUM_SAMPLE_GRIDS": 1, "NUM_WORKERS": 0,
        "FULL_ATTENTION_MAX_SIZE": 16,
    }  # fmt: skip
    tuning = {name: value for name, value in TUNING.items() if name != "MINUTES"}
    return resolve("folder", CPU_TIER, flags=flags | tuning | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder with a finished run `tuned` of 6 steps."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = configure(RUN_NAME="tuned")
        train(guided_model(config), random_images(80, 8), config)
    return folder


@pytest.fixture
def tuned(finished, tmp_path, monkeypatch) -> Path:
    """A working folder with that run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def guided_model(config) -> ConsistencyModel:
    """A model with a teacher, as train_consistency.py starts with."""
    model = ConsistencyModel.from_config(config)
    model.start_from(guided_source(timesteps=config.TIMESTEPS))
    return model


def holds_teacher_once(path: Path) -> bool:
    """Whether the model and its EMA in a checkpoint have a teacher with a guide, the same one."""
    state = checkpoints.load(path)
    storages = [
        {key: value.data_ptr() for key, value in state[name].items() if key.startswith("teacher.")}
        for name in ("model", "ema")
    ]
    return "teacher.guide.final_conv.weight" in storages[0] and storages[0] == storages[1]


def test_tuning_resumes_bit_for_bit(tuned, monkeypatch):
    class Interrupted(ConsistencyModel):
        def set_fraction(self, fraction: float) -> None:
            super().set_fraction(fraction)
            if fraction == 0.5:
                raise KeyboardInterrupt

    config = configure(RUN_NAME="half", MAX_STEPS=6, SAVE_EVERY_MINUTES=0.0)
    interrupted = Interrupted.from_config(config)
    interrupted.start_from(guided_source(timesteps=config.TIMESTEPS))
    with pytest.raises(KeyboardInterrupt):
        train(interrupted, random_images(80, 8), config)
    path = Path("checkpoints/half/last.pt")
    assert checkpoints.load(path)["progress"]["step"] == 3
    train(ConsistencyModel.from_config(config), random_images(80, 8), config, path)
    assert max_checkpoint_difference(path, Path("checkpoints/tuned/final.pt")) == 0
    assert holds_teacher_once(path)
    with pytest.raises(UserError, match="consistency True, which cannot become False"):
        train(DDPMModel.from_config(config), random_images(80, 8), config, path)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with images to train on."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path)
    return tmp_path


def difference_of_runs(a: str, b: str) -> float:
    return max_checkpoint_difference(*(Path("checkpoints", name, "final.pt") for name in (a, b)))


def test_two_ranks_tune_a_labeled_model_as_one_does(folder):
    flags = training_arguments("--class_conditional", "--guide_fraction", "0.5")
    run_script_ok(folder, "train.py", *flags, "--max_steps", "12", "--run_name", "guided")
    tuning = ["--checkpoint", "guided", "--max_steps", "4", "--keep", "0", "--run_name"]
    assert "guided model" in run_script_ok(folder, "train_consistency.py", *tuning, "tuned_by_one")
    output = finish(start_two_ranks(folder, "train_consistency.py", *tuning, "tuned_by_two"))
    assert "2 x CPU" in output and output.count("consistency tuning") == 1
    assert difference_of_runs("tuned_by_one", "tuned_by_two") < 1e-6
    before, after = (
        checkpoint_weights(Path("checkpoints", name, "final.pt"))[
            "diffusion.model.init_conv.weight"
        ]
        for name in ("guided", "tuned_by_two")
    )
    assert (after - before).abs().max() > 1e-4


def configure_script(*flags: str):
    request = train_script.parse_command_line("", {}, flags, TUNING)
    source = DDPMModel.from_file(request.init_from)
    return train_script.configure(request, None, source)


def test_script_tunes_with_the_settings_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = configure(RUN_NAME="mine", DIM=16, DATA_DIR="photos", LR_SCHEDULE="constant", DROPOUT=0.3)
    run.override({"WEIGHT_DECAY": 0.1, "GUIDE_FRACTION": 0.5}, "test")
    train(DDPMModel.from_config(run), random_images(80, 8), run)
    config = configure_script()  # the newest
    same = ("DATASET", "DATA_DIR", "DIM", "DIM_MULTS", "BATCH_SIZE", "WARMUP_STEPS", "USE_AMP")
    assert all(getattr(config, name) == getattr(run, name) for name in same)
    assert {name: getattr(config, name) for name in TUNING} == TUNING
    assert (config.DROPOUT, config.WEIGHT_DECAY, config.GUIDE_FRACTION) == (0, 0, 0)
    assert (config.LR_SCHEDULE, config.RUN_NAME) == ("cosine", "")
    assert (config.EPOCHS, config.MAX_STEPS) == (0, 0)
    config = configure_script("--checkpoint", "mine", "--max_steps", "9", "--batch_size", "4")
    assert (config.MINUTES, config.MAX_STEPS, config.BATCH_SIZE) == (0, 9, 4)
    request = train_script.parse_command_line(
        "", {}, ["--resume", "mine", "--dataset", "auto"], TUNING
    )
    checkpoint = checkpoints.load_training(request.resume)
    with pytest.raises(UserError, match="the script that trained it, or tune it with"):
        train_script.configure(request, checkpoint)
    checkpoint.state["architecture"]["consistency"] = True
    assert train_script.configure(request, checkpoint).DATASET
    with pytest.raises(UserError, match=r"last\.pt .* Resume it with train_consistency\.py"):
        train_script.configure(replace(request, tuning=None), checkpoint)


def test_script_knows_the_images_of_the_pretrained_model_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path / "weights")
    model = DDPMModel(**SMALL, class_counts={"cat": 1, "dog": 1}, guidance_mode="both")
    model.save_model("weights/cifar10.safetensors")
    for flags in ((), ("--checkpoint", "weights/cifar10.safetensors")):
        config = configure_script(*flags)
        assert (config.DATASET, config.IMAGE_SIZE, config.DIM) == ("cifar10", 8, 8)
        assert config.CLASS_CONDITIONAL and config.GUIDANCE_MODE == "both"
    kept = {"guidance": 2.5, "guidance_min_sigma": 0.2, "guidance_max_sigma": 3.0, "p_mean": -0.5}
    DDPMModel(**SMALL, **kept, schedule_base_size=16).save_model("other.safetensors")
    with pytest.raises(UserError, match="does not name its training images"):
        configure_script("--checkpoint", "other.safetensors")
    config = configure_script("--checkpoint", "other.safetensors", "--dataset", "shapes")
    # The teacher is guided as samples are.
    assert kept == {name: getattr(config, name.upper()) for name in kept}
    assert (config.DIM, config.SCHEDULE_BASE_SIZE) == (8, 16)
    assert not config.CLASS_CONDITIONAL


@pytest.fixture
def on_gpu(monkeypatch) -> SimpleNamespace:
    """What train.py takes for a process on a GPU."""
    dist = SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    monkeypatch.setattr(train_script.distributed, "session", lambda *_: nullcontext(dist))
    return dist


@pytest.fixture
def predictions(monkeypatch) -> list[int]:
    """The number of images in each prediction by a teacher."""
    counts, predict = [], ConsistencyModel.predict_by_teacher

    def record(model: ConsistencyModel, labels: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        counts.append(len(x))
        return predict(model, labels, x, t)

    monkeypatch.setattr(ConsistencyModel, "predict_by_teacher", record)
    return counts


@pytest.fixture(params=["--checkpoint", "--resume"])
def dry_run(request, tuned, monkeypatch) -> Callable[..., None]:
    """A dry run of train_consistency.py with more flags: of a new run, or of a resumed one."""
    guided_source().save_model("guided.safetensors")
    reference = {"--checkpoint": "guided.safetensors", "--resume": "tuned"}[request.param]
    flags = ["--dataset", "shapes", "--max_steps", "9", "--warmup_steps", "2", "--batch_size", "16"]
    flags += ["--grid_images", "4", "--keep", "0", "--dry_run"]

    def run(*more: str) -> None:
        monkeypatch.setattr("sys.argv", ["", request.param, reference, *flags, *more])
        train_consistency.main()

    return run


def test_dry_run_measures_the_step_with_its_teacher(dry_run, predictions):
    dry_run()
    assert len(predictions) >= 2


def test_memory_search_measures_the_step_with_its_teacher(
    dry_run, on_gpu, predictions, monkeypatch
):
    searched = []

    def search(model, config, images) -> int:
        predictions.clear()
        micro, _ = probe_micro_batch(model, config, 1.0)
        searched.extend(predictions)
        return micro

    monkeypatch.setattr(train_script, "find_micro_batch", search)
    dry_run("--auto_micro_batch")
    assert len(searched) >= 2


@pytest.mark.parametrize("dry_run", ["--checkpoint"], indirect=True)
def test_memory_search_is_left_out_on_several_ranks(dry_run, on_gpu):
    on_gpu.num_processes = 2
    with pytest.warns(FallbackWarning, match="^auto_micro_batch is for a single GPU; continuing"):
        dry_run("--auto_micro_batch")


@pytest.mark.parametrize("dry_run", ["--checkpoint"], indirect=True)
def test_guidance_without_a_teacher_is_named(dry_run):
    DDPMModel(**SMALL).save_model("guided.safetensors")  # it is not
    with pytest.warns(FallbackWarning, match="^guidance is for tuning with a teacher; continuing"):
        dry_run("--guidance", "3")


@pytest.mark.parametrize("dry_run", ["--checkpoint"], indirect=True)
def test_guide_fraction_of_tuning_is_named_and_saves_no_guide(dry_run, capsys):
    DDPMModel(**SMALL).save_model("guided.safetensors")
    with pytest.warns(FallbackWarning, match="^guide_fraction is not for tuning; continuing"):
        dry_run("--guide_fraction", "0.5")
    assert re.search(r"GUIDE_FRACTION +0\.0 +tuning", capsys.readouterr().out)


def test_estimated_size_of_a_checkpoint_has_the_teacher_once(tuned):
    config = configure()
    size = checkpoint_bytes(TrainStep(guided_model(config), config))
    written = (tuned / "checkpoints/tuned/final.pt").stat().st_size
    assert size == pytest.approx(written, rel=0.15)


def test_tuned_model_is_not_guided_again_and_its_file_holds_the_teacher_once(tuned):
    path = tuned / "checkpoints/tuned/final.pt"
    assert holds_teacher_once(path)
    with pytest.raises(UserError, match=r"is tuned already\. Name the model to tune"):
        configure_script("--checkpoint", str(path))
    model = DDPMModel.from_file(path)
    assert model.guide is None and not any("teacher" in key for key in model.state_dict())
    classes = {"cat": 1, "dog": 1}
    model = tuned_model(class_counts=classes, guidance=2.0, guidance_mode="cfg")
    assert model.count_nfe(*model.sampling_plan()) == 2


def test_teacher_without_a_guide_is_not_resumed_in_a_mode_that_needs_one():
    classes = {"cat": 1, "dog": 1}
    source = DDPMModel(**SMALL, class_counts=classes)
    tuned = tuned_model(class_counts=classes, guidance=2.0, guidance_mode="cfg")
    tuned.start_from(source)
    for mode in ("autoguidance", "both"):
        resumed = tuned_model(class_counts=classes, guidance=2.0, guidance_mode=mode)
        with pytest.raises(UserError, match=f"no guide, which {mode} needs. Resume with"):
            resumed.load_state_dict(tuned.state_dict())


def test_tuning_resumed_with_guidance_1_has_no_teacher():
    tuned = tuned_model(guidance=2.0)
    tuned.start_from(guided_source())
    resumed = tuned_model(guidance=1.0)
    resumed.load_state_dict(tuned.state_dict())
    assert resumed.teacher.unet is None and resumed.teacher.guide is None
    assert torch.equal(resumed.unet.init_conv.weight, tuned.unet.init_conv.weight)


def test_model_file_of_a_tuned_model_leaves_out_the_teacher(tmp_path):
    tuned = tuned_model(guidance=2.0)
    tuned.start_from(guided_source())
    tuned.save_model(tmp_path / "model.safetensors")
    weights = checkpoints.load_safetensors(tmp_path / "model.safetensors")[1]
    assert weights.keys() == DDPMModel.from_file(tmp_path / "model.safetensors").state_dict().keys()
    assert any(name.startswith("teacher.") for name in tuned.state_dict())


def test_teacher_is_given_labels_of_its_own_classes_only():
    pets, none = {"cat": 1, "dog": 1}, {}
    for of_model, of_data in (({"car": 1, "dog": 1}, pets), (none, pets), (pets, none)):
        source = guided_source(class_counts=of_model)
        tuned = tuned_model(class_counts=of_data, guidance=2.0)
        with pytest.raises(UserError, match=r"other classes, .* Tune without one: --guidance 1"):
            tuned.start_from(source)
        alone = tuned_model(class_counts=of_data, guidance=1.0)
        alone.start_from(source)
        assert alone.teacher.unet is None
    tuned = tuned_model(guidance=2.0)
    tuned.start_from(guided_source())
    with pytest.raises(UserError, match=r"has no classes\. Drop --class_conditional"):
        tuned_model(class_counts=pets, guidance=2.0).load_state_dict(tuned.state_dict())


def test_grids_have_one_step_above_two(tuned):
    grid = np.asarray(Image.open(tuned / "samples/tuned/final.png"))
    model = DDPMModel.from_file(tuned / "checkpoints/tuned/final.pt")
    images = [model.sample(4, seed=range(4), steps=steps) for steps in (1, 2)]
    assert np.array_equal(grid, plots.grid(torch.cat(images), 2))


def test_tuned_model_is_known_from_its_file(tuned, monkeypatch, capsys):
    flags = ["--seeds", "0-1", "--batch_size", "2"]
    for steps in ([], ["--steps", "1"]):
        monkeypatch.setattr("sys.argv", ["inference.py", *flags, *steps])
        inference.main()
    printed = capsys.readouterr().out
    assert "consistency, 2 steps, 2 NFE" in printed and "consistency, 1 steps, 1 NFE" in printed
    assert len(list(Path("inference_results").glob("samples-*-consistency-[12]-*"))) == 2
    monkeypatch.setattr("sys.argv", ["inference.py", *flags, "--mode", "all", "--image", "0"])
    inference.main()
    printed = capsys.readouterr().out
    assert "cannot interpolate: left out" in printed and "inpaint:" in printed


def test_images_of_noise_levels_and_spacings_are_reproduced_from_their_pngs(tuned, monkeypatch):
    def infer(*flags: str) -> tuple[Path, np.ndarray]:
        monkeypatch.setattr("sys.argv", ["inference.py", "--output_dir", flags[0], *flags[1:]])
        inference.main()
        (path,) = Path(flags[0]).glob("samples-*/000003.png")
        return path, np.asarray(Image.open(path), int)

    model = DDPMModel.from_file("checkpoints/tuned/final.pt")
    for name, flags, options, label in (
        ("own", ["--noise_levels", "80,3"], {"noise_levels": (80, 3)}, "2-80-3-seeds"),
        ("measured", ["--steps", "2"], {"steps": 2}, "2-seeds"),
        ("named", ["--spacing", "karras"], {"spacing": "karras"}, "2-karras-seeds"),
    ):
        path, image = infer(name, "--seeds", "3", *flags)
        expected = plots.to_bytes(model.sample(1, seed=3, **options)[0])
        assert np.abs(image - expected).max() <= 1
        assert f"consistency-{label}" in str(path)
        with monkeypatch.context() as patch:
            patch.setitem(CONSISTENCY_LEVELS, 2, (80, 30.0))  # of another version
            _, again = infer(f"{name}_again", "--from_png", str(path))
        assert np.array_equal(again, image)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--noise_levels", "80,high"], "noise_levels is '80,high', but must be numbers like"),
        (["--noise_levels", ""], "noise_levels is '', but must be numbers like 80,0.8"),
        (["--noise_levels", "80,0.8,2"], "noise_levels is 80,0.8,2, but must decrease from 80"),
        (["--noise_levels", "80,0.8", "--steps", "2"], "--noise_levels says what --steps would"),
        (["--noise_levels", "80", "--spacing", "karras"], "what --spacing would. Drop one of them"),
    ],
)
def test_wrong_noise_levels_are_reported_before_sampling(tuned, monkeypatch, flags, message):
    monkeypatch.setattr("sys.argv", ["inference.py", "--output_dir", "none", *flags])
    with pytest.raises(UserError, match=message):
        inference.main()
    assert not Path("none").exists()


def test_models_refuse_samplers_that_do_not_suit_them():
    model, plain = tuned_model(), DDPMModel(**SMALL)
    with pytest.raises(UserError, match="this model has no sampler unipc; choose from consistency"):
        model.sample(1, sampler="unipc")
    with pytest.raises(UserError, match="this model has no sampler consistency"):
        plain.sample(1, sampler="consistency")
    with pytest.raises(UserError, match="steps is 9, but must be at most 8"):
        model.sample(1, steps=9)
    with pytest.raises(UserError, match="noise_levels has 9, but must have 1 to 8"):
        model.sample(1, noise_levels=range(89, 80, -1))
    with pytest.raises(UserError, match="noise_levels has 0, but must have 1 to 8"):
        model.sample(1, noise_levels=())
    with pytest.raises(UserError, match="noise_levels has 2, but steps is 3"):
        model.sample(1, steps=3, noise_levels=(80, 1))
    with pytest.raises(UserError, match="noise_levels is for consistency-tuned models"):
        plain.sample(1, noise_levels=(80, 1))
    with pytest.raises(UserError, match="cannot interpolate"):
        model.interpolate(torch.rand(3, 8, 8), torch.rand(3, 8, 8))
    with pytest.raises(UserError, match="needs a model of objective pred_v"):
        tuned_model(objective="pred_noise")
    with pytest.raises(UserError, match=r"sampling_timesteps is 9, but .* at most 8"):
        tuned_model(sampling_timesteps=9)

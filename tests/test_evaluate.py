"""evaluate.py: real runs of the command, what it samples and compares, and what it writes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from ddpm_model import DDPMModel
from engine import checkpoints, metrics, plots
from engine.checkpoints import sha256
from engine.dataloader import Batch, ImageDataset
from engine.datasets import load_dataset
from engine.errors import FallbackWarning, UserError
from engine.image_source import ReadOptions
from engine.shapes import draw_shapes
from tests.helpers import CPU, MeanColors, exit_code

pytest.importorskip("efficientnet_lite_pytorch", reason="needs requirements-eval.txt")


def save_shapes(folder: str, numbers: range) -> None:
    """Saves shapes of these numbers as PNGs of 16 px."""
    Path(folder).mkdir(exist_ok=True)
    for i, image in zip(numbers, draw_shapes(np.array(numbers), 16, 0), strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(f"{folder}/{i:03d}.png")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder: shapes in real/ and others/, two checkpoints of one run."""
    monkeypatch.chdir(tmp_path)
    save_shapes("real", range(24))
    save_shapes("others", range(30, 44))
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    for name, seconds, bias in (("early", 60.0, 0.5), ("late", 150.0, 0.0)):
        torch.manual_seed(0)
        model = DDPMModel(16, dim=8, dim_mults=(1, 2), timesteps=60, sampling_timesteps=3)
        with torch.no_grad():
            model.unet.final_conv.bias.fill_(bias)
        state = {"architecture": model.architecture, "model": model.state_dict(), "config": config}
        state["progress"] = {"seconds": seconds, "images": 1000 * seconds}
        checkpoints.save(Path(f"checkpoints/run/{name}.pt"), state)
    return tmp_path


def run_evaluate(monkeypatch, *arguments: str) -> int:
    """Runs evaluate.py in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    return exit_code(evaluate.main)


def no_network(url: str) -> Path:
    raise UserError("no network here")


# Real runs.


def test_main_writes_table_json_and_figures(folder, monkeypatch, capsys):
    paths = ["checkpoints/run/late.pt", "checkpoints/run/early.pt"]
    load = checkpoints.load
    loaded = []
    monkeypatch.setattr(checkpoints, "load", lambda path: loaded.append(str(path)) or load(path))
    monkeypatch.setattr(metrics, "find_inception", no_network)
    flags = ["--num_samples", "6", "--seed", "3", "--steps", "2", "--sampler", "heun"]
    assert run_evaluate(monkeypatch, "--checkpoint", *paths, *flags) == 0
    printed = capsys.readouterr()
    assert loaded == [*paths, paths[1]]  # the others are checked before any is sampled
    assert "warning: FID failed (no network here); continuing without it" in printed.err
    assert "FD-Lite0" in printed.out

    stem = "results/evaluate-run-late-and-1-more-heun-2-seeds-3-8-6-vs-real"
    report = json.loads(Path(f"{stem}.json").read_text())
    expected = {"images": 24, "image_size": 16, "dataset": "folder"}
    assert expected.items() <= report["reference"].items()
    late, early = report["evaluations"]
    assert late["sha256"] == sha256(Path(paths[0]))
    assert (late["nfe"], late["seeds"], late["num_samples"]) == (1, "3-8", 6)
    assert (late["trained_seconds"], early["trained_seconds"]) == (150, 60)
    for name in ("nearest", "loss", "curve"):
        assert Image.open(f"{stem}-{name}.png").width > 300

    # The score is that of the images that the API samples.
    images = DDPMModel.from_file(paths[0]).sample(6, seed=3, steps=2, sampler="heun")
    images = (images * 255).round().byte().numpy()
    real = load_dataset("folder", 16, Path("real"), progress=False).images
    statistics = [
        metrics.feature_statistics(metrics.extract_features(metrics.Lite0(), each, CPU))
        for each in (images, real)
    ]
    distance = metrics.frechet_distance(*statistics)
    assert late["scores"]["FD-Lite0"] == pytest.approx(distance, rel=1e-3)


def test_report_names_the_file_that_was_sampled_though_the_run_goes_on(folder, monkeypatch):
    path = Path("checkpoints/run/early.pt")
    before = sha256(path)
    generate = evaluate.batch_generate

    def go_on(*arguments, **options) -> torch.Tensor:
        path.unlink()
        return generate(*arguments, **options)

    monkeypatch.setattr(metrics, "find_inception", no_network)
    monkeypatch.setattr(evaluate, "batch_generate", go_on)
    flags = ["--num_samples", "2", "--steps", "1"]
    assert run_evaluate(monkeypatch, "--checkpoint", str(path), *flags) == 0
    (report,) = Path("results").glob("*.json")
    assert json.loads(report.read_text())["evaluations"][0]["sha256"] == before


def test_main_scores_images_with_inception_weights_from_a_file(folder, monkeypatch):
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = inception.FeatureExtractorInceptionV3
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)  # Inception alone
    with monkeypatch.context() as untrained:
        untrained.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        untrained.setattr(network, "load_state_dict", lambda *_: None)
        torch.save(network("inception", ["2048"]).state_dict(), "weights.pth")
    np.savez("some.npz", images=draw_shapes(np.arange(3, 9), 16, 0).transpose(0, 2, 3, 1))
    save_shapes("few", range(6))
    flags = ["--images", "some.npz", "--dataset", "folder", "--data_dir", "few"]
    assert run_evaluate(monkeypatch, *flags, "--inception_weights", "weights.pth") == 0
    report = json.loads(Path("results/evaluate-some-6-vs-few.json").read_text())
    (row,) = report["evaluations"]
    scores = row["scores"]
    # FID is defined by other weights.
    assert "FID" not in scores and scores["FD-Inception"] > 0
    # Half of each set is in the other.
    assert 0.5 <= scores["precision"] <= 1 and 0.5 <= scores["recall"] <= 1
    assert 1 <= scores["IS"] < 1.5 and abs(scores["KID"]) < 0.1


def test_data_dir_alone_is_where_the_training_images_are_now(folder):
    settings = evaluate.EvaluationSettings(data_dir="others")
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "real"}
    arguments = (3, 16, 16), Path("run.pt")
    data, reference = evaluate.load_real_images(settings, config, *arguments)
    assert (len(data), reference["data_dir"]) == (14, "others")
    with pytest.raises(UserError, match=r"others, which has no cifar10\. Add --dataset folder for"):
        evaluate.load_real_images(settings, config | {"DATASET": "cifar10"}, *arguments)


def test_real_images_are_read_from_their_folder_as_the_run_reads_them(monkeypatch):
    def load_dataset(name, size, folder, *, options) -> ImageDataset:
        read.append((name, folder, options))
        raise UserError("stop")

    monkeypatch.setattr(evaluate, "load_dataset", load_dataset)
    read = []
    config = {"DATASET": "folder", "DATA_DIR": "photos", "VALUE_RANGE": "0,4095", "FRAMES": "all"}
    for settings in ({}, {"dataset": "cifar10"}):  # which is not in the run's folder
        settings = evaluate.EvaluationSettings(**settings)
        with pytest.raises(UserError, match="stop"):
            evaluate.load_real_images(settings, config, (1, 8, 8), Path("a"))
    assert read == [
        ("folder", Path("photos"), ReadOptions(1, "0,4095", "all")),
        ("cifar10", Path("data"), ReadOptions(3, "0,4095", "all")),
    ]


def test_training_images_have_the_channels_of_the_model(monkeypatch):
    def load_dataset(*_, options) -> ImageDataset:
        channels.append(options.channels)
        raise UserError("stop")

    monkeypatch.setattr(evaluate, "load_dataset", load_dataset)
    channels = []
    for dataset in ("folder", "hf:user/name", "shapes"):
        config = {"DATASET": dataset, "DATA_DIR": "data", "CHANNELS": 0}
        with pytest.raises(UserError, match="stop"):
            evaluate.load_real_images(evaluate.EvaluationSettings(), config, (1, 8, 8), Path("a"))
    assert channels == [1, 1, 3]


class Careless:
    def __reduce__(self):
        return (Path("unpickled").touch, ())


VS_REAL = ["--dataset", "folder", "--data_dir", "real"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "nowhere.pt"], "--checkpoint nowhere.pt: no such checkpoint"),
        (["--checkpoint", "a.pt", "--images", "real"], "Choose one"),
        (["--images", "real", "--guidance", "2"], "--images and --guidance cannot be combined"),
        (["--images", "", *VS_REAL], "--images is empty"),
        (["--image_size", "8"], "late.pt is for images of 16 px. Drop --image_size 8"),
        (["--images", "nowhere", *VS_REAL], "nowhere is not a folder"),
        (["--images", "real"], "real has no training data. Set --dataset and --data_dir"),
        (["--images", "real", "--dataset", "cifar11"], "did you mean cifar10?"),
        (["--images", "bytes.npz", *VS_REAL], "bytes.npz is damaged"),
        (["--images", "planes.npz", *VS_REAL], "should hold images (N, H, W)"),
        (["--images", "one.npz", *VS_REAL], "need at least 2 images, got 1"),
        (["--inception_weights", "careless.pth"], "careless.pth does not hold the weights of"),
        (["--inception_weights", "others.pth"], "others.pth does not hold the weights of weights-"),
        (["--inception_weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--steps", "61"], "steps is 61, but"),
    ],
)
def test_main_reports_bad_input_in_one_line(folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(metrics, "find_inception", no_network)
    Path("bytes.npz").write_bytes(b"PK not a zip")
    np.savez("planes.npz", images=np.zeros((2, 3, 16, 16)))
    np.savez("one.npz", images=np.zeros((1, 16, 16, 3), np.uint8))
    torch.save(Careless(), "careless.pth")
    torch.save({"weight": torch.zeros(1)}, "others.pth")
    assert run_evaluate(monkeypatch, *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert not Path("unpickled").exists() and not Path("results").exists()


def test_main_without_the_optional_packages_says_what_to_install(folder, monkeypatch, capsys):
    for name in ("efficientnet_lite_pytorch", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_evaluate(monkeypatch) == 2
    assert capsys.readouterr().err.splitlines() == [
        "warning: FID failed (torch-fidelity is not installed. Run `pip install -r "
        "requirements-eval.txt`); continuing without it",
        "warning: FD-Lite0 failed (efficientnet-lite-pytorch is not installed. Run `pip install -r "
        "requirements-eval.txt`); continuing without it",
        "error: no feature network. Run `pip install -r requirements-eval.txt`",
    ]


def test_main_samples_more_images_with_a_gpu(folder, monkeypatch):
    counts = []
    monkeypatch.setattr(evaluate, "evaluate", lambda settings, *_: counts.append(settings))
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(evaluate, "default_device", lambda device=device: torch.device(device))
        assert run_evaluate(monkeypatch) == 0
    assert [settings.num_samples for settings in counts] == [10_000, 50_000]


def test_main_accepts_the_former_flag_of_the_seed(folder, monkeypatch, capsys):
    assert run_evaluate(monkeypatch, "--seeds", "3", "--checkpoint", "nowhere.pt") == 2
    assert "warning: --seeds is now --seed" in capsys.readouterr().err


# What is compared with what, on mean colors.


def bias_and_count(model: DDPMModel, batch: Batch) -> tuple[list[int], list[float]]:
    """Stands in for the loss by timestep: tells which model and how many images it is given."""
    return [0, 59], [1 + model.unet.final_conv.bias.mean().item(), float(len(batch.images))]


@pytest.fixture
def evaluate_colors(folder, monkeypatch):
    """Evaluates both checkpoints by mean colors; returns the report and what is plotted."""
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(metrics, "loss_by_timestep", bias_and_count)
    plotted = {}

    def evaluate_colors(*arguments: str) -> dict:
        for name in ("save_fd_over_time", "save_loss_by_timestep", "captioned_grid"):

            def keep(*values, name=name, **_):
                plotted[name] = values
                return Image.new("L", (1, 1))

            monkeypatch.setattr(plots, name, keep)
        paths = ["checkpoints/run/late.pt", "checkpoints/run/early.pt"]
        flags = ["--num_samples", "4", *arguments]
        assert run_evaluate(monkeypatch, "--checkpoint", *paths, *flags) == 0
        (path,) = Path("results").glob("*.json")
        return json.loads(path.read_text()) | plotted

    return evaluate_colors


def test_evaluate_plots_each_checkpoints_minutes_and_distances(evaluate_colors):
    report = evaluate_colors("--seed", "3")
    late, early = report["evaluations"]
    scores = [row["scores"]["FD-Colors"] for row in (late, early)]
    assert scores[0] != scores[1]
    minutes, distances, path = report["save_fd_over_time"]
    assert minutes == [2.5, 1.0] and distances == {"FD-Colors": scores} and "curve" in path.name
    timesteps, losses, _ = report["save_loss_by_timestep"]
    assert timesteps == [0, 59] and losses == {"run-late": [1, 2], "run-early": [1.5, 2]}
    assert (late["trained_images"], early["trained_images"]) == (150_000, 60_000)
    images, captions = report["captioned_grid"]
    assert captions[:4] == ["seed 3", "seed 4", "seed 5", "seed 6"]
    expected = DDPMModel.from_file("checkpoints/run/early.pt").sample(4, seed=3)  # the last
    np.testing.assert_allclose(images[:4], expected, atol=0.51 / 255)


def test_evaluate_compares_with_an_explicit_data_set(evaluate_colors):
    report = evaluate_colors("--dataset", "folder", "--data_dir", "others")
    assert (report["reference"]["data_dir"], report["reference"]["images"]) == ("others", 14)
    # The validation split is still that of the training images.
    assert report["save_loss_by_timestep"][1]["run-late"][1] == 2


def test_images_and_real_ones_are_resized_and_each_report_is_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    for first, name in enumerate(("a", "b", "b")):  # the third time, b has other images
        Path(name).mkdir(exist_ok=True)
        images = draw_shapes(np.arange(first, first + 6), 16, 0).transpose(0, 2, 3, 1)
        np.savez(f"{name}/images.npz", images=images)
        for _ in range(2):  # the second time, the report is of the same inputs
            flags = ["--images", f"{name}/images.npz", *VS_REAL, "--image_size", "8"]
            assert run_evaluate(monkeypatch, *flags) == 0
    assert "note: of 6 images, Fréchet distances are too high" in capsys.readouterr().out
    paths = sorted(Path("results").glob("*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    assert [report["inputs"] for report in reports] == [
        [f"{n}/images.npz"] for n in ("a", "b", "b")
    ]
    assert [path.stem.removeprefix(paths[0].stem) for path in paths] == ["", "_2", "_3"]
    assert reports[0]["reference"]["image_size"] == 8


def test_evaluate_warns_without_the_validation_split(evaluate_colors, capsys):
    Path("real").rename("moved")
    report = evaluate_colors("--dataset", "folder", "--data_dir", "others")
    assert "warning: loading the validation split failed (" in capsys.readouterr().err
    assert "save_loss_by_timestep" not in report


def test_validation_images_are_exactly_the_validation_split(monkeypatch):
    numbers = np.arange(200, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(numbers, (200, 3, 4, 4))
    labels = np.arange(200) % 2
    loaded = []

    def load(*arguments, options, use_labels):
        loaded.append((*arguments, options.channels, use_labels))
        return ImageDataset(images, labels, ("cat", "dog")) if use_labels else ImageDataset(images)

    monkeypatch.setattr(evaluate, "load_dataset", load)
    config = {"DATASET": "folder", "IMAGE_SIZE": 4, "DATA_DIR": "dir", "CHANNELS": 1}
    info = {"config": config}
    model = SimpleNamespace(training_info=info, image_shape=(3, 4, 4), class_names=())
    batch = evaluate.validation_batch(model)
    assert batch.images[:, 0, 0, 0].tolist() == list(range(0, 200, 20)) and batch.labels is None
    assert loaded == [("folder", 4, Path("dir"), 1, False)]
    model.class_names = ("cat", "dog")
    assert evaluate.validation_batch(model).labels.tolist() == [0] * 10  # every 20th has label 0
    for name, value in (("class_names", ("dog", "cat")), ("image_shape", (1, 4, 4))):
        setattr(model, name, value)
        with pytest.warns(FallbackWarning, match=r"shape and classes are \(\(3, 4, 4\), \('cat',"):
            assert evaluate.validation_batch(model) is None


def test_images_that_changed_since_the_training_have_no_validation_split(folder):
    path = Path("checkpoints/run/late.pt")
    data = load_dataset("folder", 16, Path("real"), progress=False)
    state = checkpoints.load(path) | {"data": {"fingerprint": data.fingerprint()}}
    checkpoints.save(path, state)
    model = DDPMModel.from_file(path)
    assert len(evaluate.validation_batch(model).images) == 2
    Image.new("RGB", (16, 16)).save("real/0.png")
    with pytest.warns(FallbackWarning, match="the images have changed since the training"):
        assert evaluate.validation_batch(model) is None


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (4, "RGBA")])
def test_gray_and_rgba_models_are_compared_with_images_of_their_channels(
    folder, monkeypatch, channels, mode
):
    Path("own").mkdir()
    for i in range(24):
        Image.new("LA", (16, 16), (10 * i, 9 * i)).convert(mode).save(f"own/{i}.png")
    config = {"DATASET": "folder", "IMAGE_SIZE": 16, "DATA_DIR": "own", "CHANNELS": channels}
    sizes = {"dim": 8, "dim_mults": (1, 2), "timesteps": 60, "sampling_timesteps": 3}
    model = DDPMModel(16, channels=channels, **sizes)
    state = {"architecture": model.architecture, "model": model.state_dict(), "config": config}
    checkpoints.save(Path("checkpoints/own.pt"), state)
    compared = []
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(
        evaluate.reporting, "plot_nearest_neighbors",
        lambda samples, _, real, *__: compared.append((samples, real)) or Image.new("L", (1, 1)),
    )  # fmt: skip
    flags = ["--checkpoint", "checkpoints/own.pt", "--num_samples", "4"]
    assert run_evaluate(monkeypatch, *flags) == 0
    ((samples, real),) = compared
    assert samples.shape == (4, channels, 16, 16) and real.shape == (24, channels, 16, 16)
    report = json.loads(Path("results/evaluate-own-unipc-3-4-vs-own.json").read_text())
    assert np.isfinite(report["evaluations"][0]["scores"]["FD-Colors"])
    assert Path("results/evaluate-own-unipc-3-4-vs-own-loss.png").exists()


@pytest.mark.parametrize(
    ("other", "kind"),
    [({"channels": 1}, "((1, 16, 16), ())"), ({"class_counts": {"a": 1}}, "((3, 16, 16), ('a',))")],
)
def test_models_of_other_images_or_classes_are_evaluated_apart(
    folder, monkeypatch, capsys, other, kind
):
    model = DDPMModel(16, dim=8, dim_mults=(1, 2), timesteps=60, sampling_timesteps=3, **other)
    model.save_model("other.pt")
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(evaluate, "sample_images", None)  # refused before anything is sampled
    paths = ["checkpoints/run/late.pt", "other.pt"]
    assert run_evaluate(monkeypatch, "--num_samples", "2", "--checkpoint", *paths) == 2
    error = f"other.pt makes images of shape and classes {kind}, but checkpoints/run/late.pt of"
    assert error in capsys.readouterr().err


def test_models_of_the_same_name_have_a_loss_each(evaluate_colors):
    for folder, name in (("a", "early"), ("b", "late")):
        path = Path(f"{folder}/run/step.pt")
        checkpoints.save(path, checkpoints.load(Path(f"checkpoints/run/{name}.pt")))
    plotted = evaluate_colors("--checkpoint", "a/run/step.pt", "b/run/step.pt")
    _, losses, _ = plotted["save_loss_by_timestep"]
    assert losses.keys() == {"run-step", "b/run/step.pt"}


def test_steps_that_a_later_model_cannot_take_are_refused_before_sampling(
    folder, monkeypatch, capsys
):
    DDPMModel(16, dim=8, dim_mults=(1, 2), timesteps=9, sampling_timesteps=3).save_model("other.pt")
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(evaluate, "sample_images", None)
    paths = ["checkpoints/run/late.pt", "other.pt"]
    assert run_evaluate(monkeypatch, "--steps", "20", "--checkpoint", *paths) == 2
    assert "error: steps is 20, but" in capsys.readouterr().err


def test_scores_that_cannot_be_written_are_printed(folder, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "results/some.json")

    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    monkeypatch.setattr(checkpoints, "write_text", full)
    assert run_evaluate(monkeypatch, "--num_samples", "2") != 0
    printed = capsys.readouterr()
    assert "error: No space left on device (results/some.json)" in printed.err
    assert "run-late " in printed.out


class ScoredColors(MeanColors, metrics.Inception):
    """An Inception network for isinstance."""

    title = "FID"

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.name, self.batch_sizes = "scored", []


def test_score_images_compares_features_with_each_networks_reference(monkeypatch):
    def inception_scores(network, features, real_features):
        assert isinstance(network, ScoredColors)
        return {"features": features, "real": real_features}

    monkeypatch.setattr(metrics, "inception_scores", inception_scores)
    images, real = draw_shapes(np.arange(9), 8, 0), draw_shapes(np.arange(9, 29), 8, 0)
    colors, scored = MeanColors(), ScoredColors()
    features = metrics.extract_features(colors, real, CPU)
    plain, shifted = (metrics.feature_statistics(features + offset) for offset in (0, 1))
    expected = metrics.feature_statistics(metrics.extract_features(colors, images, CPU))
    references = {colors: plain, scored: shifted}
    row = evaluate.score_images(images, references, None, None, CPU)
    scores = row["scores"]
    distances = [metrics.frechet_distance(expected, each) for each in (plain, shifted)]
    assert [scores["FD-Colors"], scores["FID"]] == distances
    np.testing.assert_array_equal(scores["features"], expected.features)
    np.testing.assert_array_equal(scores["real"], features + 1)


def test_checkpoint_that_is_replaced_before_its_turn_is_evaluated_as_it_is_then(
    evaluate_colors, monkeypatch
):
    early = Path("checkpoints/run/early.pt")
    sample = evaluate.sample_images

    def go_on(*arguments):
        checkpoints.link_or_copy(early.with_name("late.pt"), early)
        return sample(*arguments)

    monkeypatch.setattr(evaluate, "sample_images", go_on)
    late, replaced = evaluate_colors()["evaluations"]
    assert replaced["sha256"] == late["sha256"] and replaced["scores"] == late["scores"]


def test_checkpoint_that_is_replaced_while_it_is_read_is_an_error(folder, monkeypatch, capsys):
    early = Path("checkpoints/run/early.pt")
    load = evaluate.load_model

    def go_on(*arguments):
        model = load(*arguments)
        checkpoints.link_or_copy(early.with_name("late.pt"), early)
        return model

    monkeypatch.setattr(evaluate, "load_model", go_on)
    assert run_evaluate(monkeypatch, "--num_samples", "2", "--checkpoint", str(early)) == 2
    assert f"error: {early} was replaced while it was read" in capsys.readouterr().err


def test_checkpoint_that_is_named_twice_is_evaluated_once(evaluate_colors):
    path = "checkpoints/run/late.pt"
    assert len(evaluate_colors("--checkpoint", path, path)["evaluations"]) == 1


# Sampling.


@pytest.fixture
def sample_images(tmp_path, monkeypatch):
    """sample_images of a small model with a guide: batch_generate's arguments, and the details."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "dim": 8, "dim_mults": (1, 2), "timesteps": 60}
    model = DDPMModel(**sizes, sampling_timesteps=3, guidance=3.0, guidance_max_sigma=5.0)
    model.snapshot_guide()
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights")

    def sample_images(**settings):
        arguments = {}

        def batch_generate(model, total, batch, seed, sampler, steps, **options):
            arguments.update(total=total, batch=batch, seed=seed, sampler=sampler, steps=steps)
            arguments.update(options, amp=torch.is_autocast_enabled("cpu"))
            return torch.linspace(0, 1, 3).reshape(1, 3, 1, 1).expand(total, 3, 16, 16)

        monkeypatch.setattr(evaluate, "batch_generate", batch_generate)
        settings = evaluate.EvaluationSettings(**{"num_samples": 5, "seed": 7} | settings)
        images, details = evaluate.sample_images(model, path, settings)
        assert images[:, :, 2, 3].tolist() == [[0, 128, 255]] * 5 and images.dtype == np.uint8
        return arguments, details

    sample_images.model, sample_images.path = model, path
    return sample_images


def test_sample_images_uses_the_models_steps_and_guidance_by_default(sample_images):
    model = sample_images.model
    arguments, details = sample_images()
    plan = model.sampling_plan("unipc", 3, "karras")
    assert (arguments["steps"], arguments["guidance"], arguments["amp"]) == (3, None, False)
    assert (arguments["total"], arguments["batch"], arguments["seed"]) == (5, 64, 7)
    expected = {"steps": 3, "guidance": 3.0, "seeds": "7-11", "use_amp": False}
    assert expected.items() <= details.items()
    assert details["nfe"] == model.count_nfe(*plan) > model.count_nfe(*plan, 1.0)
    assert details["checkpoint"] == str(sample_images.path)


def test_sample_images_uses_explicit_settings(sample_images):
    settings = {"steps": 4, "guidance": 1.0, "use_amp": True, "spacing": "uniform"}
    settings |= {"sampler": "heun", "guidance_mode": "both"}
    settings |= {"guidance_min_sigma": 0.1, "guidance_max_sigma": 3.0}
    arguments, details = sample_images(batch_size=2, **settings)
    expected = {"steps": 4, "guidance": 1.0, "batch": 2, "amp": True, "sampler": "heun"}
    expected |= {"spacing": "uniform", "guidance_mode": "both", "guidance_min_sigma": 0.1}
    assert expected.items() <= arguments.items()
    assert details | settings == details
    plan = sample_images.model.sampling_plan("heun", 4, "uniform")
    assert details["nfe"] == sample_images.model.count_nfe(*plan, 1.0)


def test_sample_images_by_ddpm_takes_all_timesteps(sample_images):
    arguments, details = sample_images(sampler="ddpm")
    assert arguments["steps"] == details["steps"] == 60


def test_sample_images_without_a_guide_has_guidance_1(sample_images):
    sample_images.model.guide = None
    assert sample_images(guidance=2.5)[1]["guidance"] == 1.0


def test_sample_images_takes_the_classes_that_rank_0_chose(sample_images, monkeypatch):
    monkeypatch.setattr(evaluate.distributed, "broadcast_object", lambda _: [1, 0, 1, 0, 1])
    assert sample_images()[0]["labels"] == [1, 0, 1, 0, 1]


# Classes.


class OneColor(MeanColors):
    """A network of another number of features."""

    title = "FD-One"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images)[:, :1]


@pytest.fixture
def conditional(tmp_path, monkeypatch) -> DDPMModel:
    """A model of two classes of gray levels, in the working folder with those images."""
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(0).integers(0, 20, 300)
    for i, value in enumerate(values):
        name, level = ("bright", 200) if i % 4 == 0 else ("dark", 50)
        (tmp_path / "real" / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (int(level + value),) * 3).save(f"real/{name}/{i:03d}.png")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "dim": 8, "dim_mults": (1, 2), "timesteps": 60}
    model = DDPMModel(**sizes, sampling_timesteps=8, class_counts={"bright": 1, "dark": 1})
    config = {"DATASET": "folder", "IMAGE_SIZE": 8, "DATA_DIR": "real"}
    state = {"architecture": model.architecture, "model": model.state_dict(), "config": config}
    checkpoints.save(Path("checkpoints/run/final.pt"), state)
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: [MeanColors()])
    return model


def test_main_scores_classes_sampled_in_the_references_proportions(
    conditional, monkeypatch, capsys
):
    def batch_generate(model, total, *_, labels, **options):  # every third dark image is bright
        is_bright = labels == 0
        is_bright[np.flatnonzero(labels == 1)[::3]] = True
        return torch.where(torch.tensor(is_bright), 0.8, 0.2)[:, None, None, None].expand(
            -1, 3, 8, 8
        )

    monkeypatch.setattr(evaluate, "batch_generate", batch_generate)
    networks = [OneColor("one"), MeanColors()]  # classes are scored by the last
    monkeypatch.setattr(evaluate, "load_feature_networks", lambda *_: networks)
    flags = ["--num_samples", "80", "--guidance_mode", "cfg", "--guidance", "3"]
    assert run_evaluate(monkeypatch, *flags) == 0
    (path,) = Path("results").glob("*.json")
    report = json.loads(path.read_text())
    (row,) = report["evaluations"]
    bright, dark = row["classes"]
    assert (bright["class"], bright["samples"], dark["samples"]) == ("bright", 21, 59)
    assert (bright["accuracy"], dark["accuracy"]) == (1.0, 0.661)  # 39 of 59
    assert bright["real accuracy"] == dark["real accuracy"] == 1.0
    assert bright["distance"] < dark["distance"]
    assert row["scores"]["class accuracy"] == 0.75  # 60 of 80
    assert report["reference"]["class accuracy"] == 1.0
    assert (row["guidance_mode"], row["guidance"]) == ("cfg", 3.0)
    table = capsys.readouterr().out
    assert ["dark", "59", "0.661", "1"] in [line.split()[:4] for line in table.splitlines()]


def test_main_without_the_models_classes_in_the_reference_warns(conditional, monkeypatch, capsys):
    Path("real/dark").rename("real/dim")
    assert run_evaluate(monkeypatch, "--num_samples", "4") == 0
    expected = "(its classes are not the model's); continuing without scores by class"
    assert expected in capsys.readouterr().err
    (path,) = Path("results").glob("*.json")
    assert "classes" not in json.loads(path.read_text())["evaluations"][0]

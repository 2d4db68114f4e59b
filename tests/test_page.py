"""engine/page.py: turns, replaced checkpoints, what may be asked for, PNGs and uploads."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import app
import inference
from engine import page, page_html, plots
from engine.errors import UserError
from engine.page import ModelKeeper, PageImage, Plan, Request, Session, Turns
from inference import InferenceSettings
from tests import small_models
from tests.helpers import exit_code
from tests.small_models import CONTROLS, last_x_t, plan_of, save_model

SMALL = small_models.SMALL | {"sampling_timesteps": CONTROLS["steps"]}


def samples_of(plan: Plan) -> torch.Tensor:
    *_, (_, x, _) = plan.trajectory()
    return (x / 2 + 0.5).clamp(0, 1)


def save_png(image: PageImage, path: str) -> Path:
    """Writes an image as the browser's download does."""
    png = page.resolve_input(image.data_uri).getvalue()
    Path(path).write_bytes(png)
    return Path(path)


# Turns and requests.


def test_turns_are_taken_in_order():
    turns, order, threads = Turns(), [], []

    def take(name: int) -> None:
        with turns.turn():
            order.append(name)

    with turns.turn():
        for name in range(3):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            while len(turns.waiting) + len(order) < name + 2:
                time.sleep(0.001)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2]


def test_superseded_request_ends_and_others_continue(served):
    session = Session()
    first = plan_of(served, session.start("samples"))
    states = first.trajectory()
    next(states)
    second = plan_of(served, session.start("samples"))
    session.start("panel")
    with pytest.raises(page.SupersededError):
        list(states)
    torch.testing.assert_close(
        samples_of(second), served.model.sample(2, seed=[3, 7], sampler="ddim", guidance=1.5)
    )


def test_request_ends_when_its_time_is_over(served, monkeypatch):
    plan = plan_of(served)
    monkeypatch.setattr(page.time, "monotonic", lambda: time.perf_counter() + 1e9)
    with pytest.raises(UserError, match="Ask for fewer images or steps"):
        samples_of(plan)
    assert served.model.sample(1, seed=[0]).shape[0] == 1  # of no request, it has no time limit
    monkeypatch.undo()
    assert not served.model.turns.waiting


# The checkpoint.


def test_keeper_loads_a_replaced_checkpoint_and_keeps_the_model_if_it_cannot(served):
    keeper = ModelKeeper(lambda: served.path, app.load_shared_model)
    before = keeper.refresh()
    assert keeper.refresh() is before
    save_model(str(served.path), seed=1)
    after = keeper.refresh()
    assert after.version == 2 and after.sha256 != before.sha256
    assert not torch.equal(samples_of(plan_of(before)), samples_of(plan_of(after)))
    served.path.write_bytes(b"half a file")
    assert keeper.refresh() is after
    assert str(served.path) in keeper.problem
    served.path.unlink()
    assert keeper.refresh() is after
    save_model(str(served.path))
    assert keeper.refresh().sha256 == before.sha256 and not keeper.problem


def test_keeper_never_takes_the_checksum_of_another_file(served):
    replacements = []

    def load(path: Path):
        model = app.load_shared_model(path)
        if replacements:
            save_model(str(path), seed=replacements.pop())
        return model

    keeper = ModelKeeper(lambda: served.path, load)
    save_model(str(served.path), seed=1)
    replacements.append(2)
    before = keeper.refresh()
    assert before.version == 1 and keeper.problem.endswith("was replaced while it was read")
    after = keeper.refresh()
    assert after.version == 2 and after.sha256 == page.sha256(served.path)
    assert torch.equal(after.model.unet.init_conv.weight, load(served.path).unet.init_conv.weight)


def test_keeper_refuses_to_start_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        ModelKeeper(lambda: tmp_path / "none.pt", app.load_shared_model)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OSError("stale")])
def test_keeper_tells_of_a_passing_failure_and_loads_again(served, error):
    failures = []

    def load(path: Path):
        if failures:
            raise failures.pop()
        return app.load_shared_model(path)

    keeper = ModelKeeper(lambda: served.path, load)
    save_model(str(served.path), seed=1)
    failures.append(error)
    assert keeper.refresh().version == 1 and keeper.problem == str(error)
    assert keeper.refresh().version == 2 and not keeper.problem


@pytest.mark.parametrize(
    ("architecture", "sampler", "steps", "maximum"),
    [({}, "unipc", 4, 40), ({"consistency": True, "sampling_timesteps": 2}, "consistency", 2, 8)],
)
def test_controls_offer_what_the_model_can(architecture, sampler, steps, maximum):
    updates = page.control_updates(app.SharedModel(**SMALL | architecture))
    assert updates["sampler"]["value"] == sampler
    assert updates["steps"] == {"value": steps, "maximum": maximum}


@pytest.mark.parametrize(
    ("architecture", "has_guide", "is_shown"),
    [({}, False, False), ({}, True, True), ({"consistency": True}, True, False),
     ({"class_counts": {"cat": 1, "dog": 1}}, False, False),
     ({"class_counts": {"cat": 1, "dog": 1}, "guidance_mode": "cfg"}, False, True)],
)  # fmt: skip
def test_guidance_is_shown_where_it_has_an_effect(architecture, has_guide, is_shown):
    model = app.SharedModel(**SMALL | architecture)
    if has_guide:
        model.snapshot_guide()
    assert page.control_updates(model)["guidance"]["visible"] is is_shown


# What may be asked for.


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"seeds": "0-36"}, "at most 36 images"),
        ({"seeds": "../../etc/passwd"}, "must look like"),
        ({"seeds": "1," * 350}, "seeds has 700 characters, but may have at most 684"),
        ({"steps": 0}, "steps is 0, but must be between 1 and 100"),
        ({"steps": 101}, "must be between 1 and 100"),
        ({"steps": None}, "must be between 1 and 100"),
        ({"seeds": None}, "seeds or classes are missing"),
        ({"classes": None}, "seeds or classes are missing"),
        ({"steps": float("nan")}, "must be between 1 and 100"),
        ({"guidance": 0}, "guidance is 0.0, but must be at least 1"),
        ({"guidance": 1e9}, "guidance is 1000000000.0"),
        ({"guidance": "x"}, "guidance is 'x', but must be a number"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"sampler": "evil.py:run"}, "no such sampler or class"),
        ({"classes": ["cat"]}, "no such sampler or class"),
    ],
)
def test_plan_refuses_what_the_page_does_not_offer(served, controls, message):
    with pytest.raises(UserError, match=message):
        plan_of(served, **controls)


@pytest.mark.parametrize("mask", ["0" * 63, "0" * 65, "2" * 64, None, 7, ["0"] * 64])
def test_mask_must_be_of_the_size_of_the_model(mask):
    with pytest.raises(UserError, match="mask is not 8x8"):
        page.parse_mask(mask, 8)


def test_mask_is_read_in_rows():
    assert page.parse_mask("0" * 8 + "1" * 56, 8).nonzero()[0].tolist() == [1, 0]


def test_newly_chosen_image_has_no_mask_and_one_other_stays():
    session = Session()
    for name in "abc":
        session.mask = torch.ones(8, 8)
        session.choose(PageImage(torch.rand(3, 8, 8), name, {}))
        assert session.mask is None
    assert [image.caption for image in session.chosen] == ["c", "b"]


# PNGs and uploads.


def test_png_of_a_sample_restores_its_settings(served):
    plan = plan_of(served)
    _, sample = plan.attach_settings(samples_of(plan))
    session = Session()
    path = save_png(sample, "a.png")
    controls = page.take_upload(session, path, served.model, InferenceSettings)
    assert controls == {
        "seeds": "7", "classes": [], "sampler": "ddim", "steps": 4, "guidance": 1.5,
        "strength": 0.5,
    }  # fmt: skip
    assert torch.equal(session.chosen[0].image, sample.image)
    del controls["strength"]
    assert session.chosen[0].settings["sha256"] == served.sha256
    again = plan_of(served, **controls)
    assert torch.equal(again.attach_settings(samples_of(again))[0].image, sample.image)


def test_seeds_of_an_upload_are_as_many_as_the_page_takes(served):
    seeds = [10**18 - 1 - 2 * i for i in range(40)]
    settings = plan_of(served).settings | {"seeds": seeds}
    path = save_png(PageImage(torch.rand(3, 8, 8), "upload", settings), "a.png")
    controls = page.take_upload(Session(), path, served.model, InferenceSettings)
    del controls["strength"]
    assert plan_of(served, **controls).seeds == seeds[:36]


@pytest.mark.parametrize("change", [{"seeds": [3, 7]}, {"use_amp": True}])
def test_trajectory_of_what_the_page_cannot_repeat_is_refused(served, change):
    plan = plan_of(served)
    with pytest.raises(UserError, match="only single images, without mixed precision"):
        plan.repeat(plan.settings | {"seeds": [3]} | change)


@pytest.mark.parametrize("mode", ["vary", "inpaint"])
def test_png_of_a_derived_image_restores_its_source(served, mode, monkeypatch):
    source = PageImage(torch.rand(3, 8, 8), "upload", {})
    mask = torch.arange(64).reshape(8, 8) % 3 == 0
    options = {"strength": 0.8} if mode == "vary" else {"mask": mask}
    derived = plan_of(served).edit(mode, 1, source, options)[0]
    path = save_png(derived, "a.png")
    session = Session()
    controls = page.take_upload(session, path, served.model, InferenceSettings)
    assert torch.equal(session.chosen[0].image, source.image)
    assert session.panel == mode.capitalize()
    if mode == "inpaint":
        assert torch.equal(session.mask, mask)
        options = {"mask": session.mask}
    else:
        options = {"strength": controls["strength"]}
    del controls["strength"]
    again = plan_of(served, **controls).edit(mode, 1, session.chosen[0], options)[0]
    assert torch.equal(again.image, derived.image)

    # inference.py makes the same image from it.
    monkeypatch.setattr("sys.argv", ["inference.py", "--from_png", str(path)])
    assert exit_code(inference.main) == 0
    (made,) = Path("inference_results").glob("*/*/000003.png")
    assert Image.open(made).tobytes() == Image.open(path).tobytes()


def test_png_of_a_class_restores_the_class(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_model("checkpoints/ddpm_final.pt", class_counts={"cat": 3, "dog <b>": 5})
    served = ModelKeeper(lambda: path, app.load_shared_model).refresh()
    plan = plan_of(served, seeds="0-2", classes=["dog <b>", "cat"])
    images = plan.attach_settings(samples_of(plan))
    assert [p.caption for p in images] == ["seed 0, dog <b>", "seed 1, cat", "seed 2, dog <b>"]
    assert "<b>" not in page_html.chosen_images(images[:1])
    upload = save_png(images[2], "a.png")
    controls = page.take_upload(Session(), upload, served.model, InferenceSettings)
    assert controls["classes"] == ["dog <b>"] and controls["seeds"] == "2"

    # Its trajectory and variations are of the class, too.
    shown = app.Page(ModelKeeper(lambda: path, app.load_shared_model))
    film = shown.show_trajectory(Session(chosen=images[:1]), Request())
    np.testing.assert_allclose(last_x_t(film), plots.to_bytes(images[0].image), atol=1)
    plan = plan_of(served, seeds="0", classes=["dog <b>"])
    (varied,) = plan.edit("vary", 1, images[1], {"strength": 1.0})
    options = {"sampler": "ddim", "guidance": 1.5, "labels": 1, "seed": 0}
    expected = served.model.vary(images[1].image, 1.0, 1, **options)[0]
    torch.testing.assert_close(varied.image, expected, atol=0.6 / 255, rtol=0)

    # Without a class chosen, each seed has the one that DDPMModel.sample gives it.
    plan = plan_of(served, seeds="0-2")
    images = served.model.sample(3, seed=[0, 1, 2], sampler="ddim", guidance=1.5)
    torch.testing.assert_close(samples_of(plan), images)
    assert all(p.settings["classes"] for p in plan.attach_settings(images))


def test_upload_of_another_image_is_cropped_and_changes_no_control(served):
    Image.new("RGB", (30, 20), (255, 0, 0)).save("own.png")
    session = Session()
    assert page.take_upload(session, Path("own.png"), served.model, InferenceSettings) == {}
    assert session.chosen[0].image[:, 4, 4].tolist() == [1, 0, 0]


def test_upload_never_names_a_file_of_the_server(served):
    plan = plan_of(served)
    source = PageImage(torch.rand(3, 8, 8), "upload", {})
    varied = plan.edit("vary", 1, source, {"strength": 0.5})[0]
    Image.new("L", (8, 8), 255).save("secret.png")
    stored = varied.settings | {"mode": "inpaint", "image": "secret.png", "mask": "secret.png"}
    path = save_png(PageImage(varied.image, "upload", stored), "a.png")
    session = Session()
    page.take_upload(session, path, served.model, InferenceSettings)
    assert session.mask is None and torch.equal(session.chosen[0].image, varied.image)


def test_upload_sets_controls_within_their_bounds_with_a_notice(served):
    settings = plan_of(served).settings | {"steps": 1000, "guidance": None}
    path = save_png(PageImage(torch.rand(3, 8, 8), "upload", settings), "a.png")
    notices = []
    controls = page.take_upload(
        Session(), path, served.model, InferenceSettings, notices.append
    )  # fmt: skip
    assert controls["steps"] == SMALL["timesteps"] and "steps 1000" in notices[0]
    assert controls["guidance"] == served.model.guidance


def test_upload_that_fails_changes_nothing(served):
    source = PageImage(torch.rand(3, 8, 8), "upload", {})
    mask = torch.ones(8, 8, dtype=torch.bool)
    image = plan_of(served).edit("inpaint", 1, source, {"mask": mask})[0]
    damaged = image.settings | {"mask": plots.PNG_DATA_URI + "AAAA"}
    path = save_png(PageImage(image.image, "upload", damaged), "a.png")
    session = Session(chosen=[source])
    with pytest.raises(UserError, match="mask"):
        page.take_upload(session, path, served.model, InferenceSettings)
    assert session.chosen == [source] and session.panel == "Vary"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": "evil.py:run"}, "sampler that this page does not offer"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"seeds": ["1"]}, "the upload sets seeds"),
        ({"mode": "rm"}, "mode is 'rm'"),
    ],
)
def test_upload_with_other_settings_is_refused(served, change, message):
    settings = plan_of(served).settings | change
    path = save_png(PageImage(torch.rand(3, 8, 8), "upload", settings), "a.png")
    with pytest.raises(UserError, match=message):
        page.take_upload(Session(), path, served.model, InferenceSettings)


def test_upload_of_no_image_is_refused_without_the_servers_path(served):
    path = Path("some/folder/a.png")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"<script>")
    with pytest.raises(UserError, match="cannot be read as an image") as error:
        page.take_upload(Session(), path, served.model, InferenceSettings)
    assert "folder" not in str(error.value)

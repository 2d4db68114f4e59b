"""app.py: turns, replaced checkpoints, what the page takes and returns; the page itself."""

import json
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import app
import inference
from engine import page, page_html, plots
from engine.errors import UserError
from engine.page import ModelKeeper, PageImage, Plan, Request, ServedModel, Session, Turns
from inference import InferenceSettings
from tests.helpers import exit_code

SMALL = {
    "image_size": 8, "dim": 8, "dim_mults": (1,), "attn_heads": 1, "attn_dim_head": 16,
    "timesteps": 40, "sampling_timesteps": 4,
}  # fmt: skip
CONTROLS = {"seeds": "3,7", "classes": [], "sampler": "ddim", "steps": 4, "guidance": 1.5}


def save_model(path: str, seed: int = 0, **architecture) -> Path:
    """Writes a small model with a guide of other weights."""
    torch.manual_seed(seed)
    model = app.SharedModel(**SMALL | architecture)
    model.snapshot_guide()
    for p in model.unet.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.save_model(path)
    return Path(path)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restored after a test: app.import_gradio sets these."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")


@pytest.fixture
def served(tmp_path, monkeypatch) -> ServedModel:
    """A model in a new working folder."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # app.start sets it
    monkeypatch.chdir(tmp_path)
    path = save_model("checkpoints/ddpm_final.pt")
    return ModelKeeper(lambda: path, app.load_shared_model).refresh()


def plan_of(served: ServedModel, request: Request | None = None, **controls) -> Plan:
    values = (CONTROLS | controls).values()
    return Plan.of_controls(served, request or Request(), InferenceSettings, *values)


def samples_of(plan: Plan) -> torch.Tensor:
    *_, (_, x, _) = plan.trajectory()
    return (x / 2 + 0.5).clamp(0, 1)


def save_png(image: PageImage, path: str) -> Path:
    """Writes an image as the browser's download does."""
    png = page.resolve_input(image.data_uri).getvalue()
    Path(path).write_bytes(png)
    return Path(path)


def last_x_t(film: str) -> np.ndarray:
    """The last image of a trajectory's film, without the x_0 next to it."""
    last = film.split('src="')[-1].split('"')[0]
    return np.asarray(Image.open(page.resolve_input(last)), int)[:, :8]


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


def test_sliders_have_the_bounds_of_the_settings(served):
    pytest.importorskip("gradio")
    app.import_gradio()
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    shown.build()
    sliders = shown.controls["guidance"], shown.controls["strength"]
    assert [(s.minimum, s.maximum) for s in sliders] == [(1, 10), (0.001, 1)]


def test_poll_resets_only_controls_that_a_new_checkpoint_changes(served):
    pytest.importorskip("gradio")
    app.import_gradio()
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    shown.header = "header"
    shown.controls = {name: name for name in CONTROLS}
    session = Session()
    assert shown.poll(session).keys() == {"header", *CONTROLS} - {"seeds"}
    save_model(str(served.path), seed=1)
    assert shown.poll(session).keys() == {"header"}
    save_model(str(served.path), class_counts={"cat": 3})
    assert shown.poll(session).keys() == {"header", "classes"}


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


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDA error: out of memory")]
)
def test_memory_that_runs_out_is_shown(error, monkeypatch):
    shown = []
    monkeypatch.setattr(app, "gr", SimpleNamespace(Warning=shown.append))
    with app.Page(None).errors_shown():
        raise error
    with pytest.raises(RuntimeError, match="shapes"), app.Page(None).errors_shown():
        raise RuntimeError("shapes do not match")
    assert shown == ["out of memory. Ask for fewer images"]


# What may be asked for.


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"seeds": "0-36"}, "at most 36 images"),
        ({"seeds": "../../etc/passwd"}, "must look like"),
        ({"seeds": "1," * 300}, "seeds has 600 characters, but may have at most 400"),
        ({"steps": 0}, "steps is 0, but must be between 1 and 100"),
        ({"steps": 101}, "must be between 1 and 100"),
        ({"steps": float("nan")}, "must be between 1 and 100"),
        ({"guidance": 0}, "guidance is 0.0, but must be at least 1"),
        ({"guidance": 1e9}, "guidance is 1000000000.0"),
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


def test_panels_edit_the_newest_image_and_end_at_it(served, monkeypatch):
    edited, ends = [], []

    def edit(plan: Plan, mode: str, count: int, source: PageImage, options: dict) -> list:
        edited.append((mode, count, source.caption, options))
        return []

    monkeypatch.setattr(Plan, "edit", edit)
    monkeypatch.setattr(
        app.SharedModel, "interpolate",
        lambda model, a, b, count, steps: ends.extend((a, b)) or torch.zeros(count, 3, 8, 8),
    )  # fmt: skip
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    older, newest = (PageImage(torch.rand(3, 8, 8), name, {}) for name in ("older", "newest"))
    mask = torch.arange(64).reshape(8, 8) < 8
    session = Session(chosen=[newest, older], mask=mask)
    for panel in (shown.vary, shown.inpaint, shown.interpolate):
        panel(session, Request(), 0.8, *CONTROLS.values())
    assert edited == [
        ("vary", 8, "newest", {"strength": 0.8}),
        ("inpaint", 4, "newest", {"mask": mask}),
    ]
    assert ends[0] is older.image and ends[1] is newest.image
    assert f'data-mask="{"1" * 8}{"0" * 56}"' in shown.show_chosen(session)[2]


# PNGs.


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


def test_trajectory_ends_in_the_png_of_inference(served, monkeypatch):
    settings = ["--sampler", "ddim", "--spacing", "uniform", "--eta", "1", "--seeds", "3"]
    monkeypatch.setattr("sys.argv", ["inference.py", *settings, "--guidance_mode", "autoguidance"])
    assert exit_code(inference.main) == 0
    (path,) = Path("inference_results").rglob("000003.png")
    session = Session()
    notices = []
    page.take_upload(session, path, served.model, InferenceSettings, notices.append)
    assert "spacing uniform, eta 1.0, guidance_mode autoguidance" in notices[0]
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    film = shown.show_trajectory(session, Request())
    np.testing.assert_allclose(last_x_t(film), np.asarray(Image.open(path)), atol=1)


@pytest.mark.parametrize("change", [{"mode": "vary"}, {"sha256": "of another model"}])
def test_trajectory_is_of_samples_of_this_model_only(served, change):
    image = PageImage(torch.rand(3, 8, 8), "", plan_of(served).settings | change)
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    assert "only they start" in shown.show_trajectory(Session(chosen=[image]), Request())


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


# gradio.


def test_controls_are_passed_in_the_order_of_plans(served):
    pytest.importorskip("gradio")
    app.import_gradio()
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    blocks = shown.build()
    names = {shown.controls[name]._id: name for name in CONTROLS}
    orders = [
        [names[each._id] for each in fn.inputs if each._id in names] for fn in blocks.fns.values()
    ]
    assert list(CONTROLS) in orders
    assert all(order == list(CONTROLS) for order in orders if len(order) > 1)


def test_run_shown_first_is_the_newest_and_only_changes_are_sent(served, monkeypatch):
    pytest.importorskip("gradio")
    app.import_gradio()
    history = SimpleNamespace(
        find_runs=lambda: ["new", "old"], run_version=lambda name: (name,),
        grids_version=lambda name: [name], summarize_run=lambda version, _: {"run": version[0]},
        plot_run=lambda version: version[0], run_grids=lambda name: [],
    )  # fmt: skip
    monkeypatch.setattr(app, "run_history", history)
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    outputs = ("run", "run_state", "run_curve", "run_grids")
    for name in outputs:
        setattr(shown, name, name)
    session = Session()
    for asked, found, sent in ((None, "new", 4), ("new", "new", 2), ("old", "old", 4)):
        updates = shown.follow(session, asked)
        assert updates["run"]["value"] == found and found in updates["run_state"]
        assert [*updates] == [*outputs[:sent]]


def test_checkpoint_flag_takes_a_run_and_suggests_the_nearest(served, monkeypatch):
    path = save_model("checkpoints/my_run/last.pt")

    def refuse(find, load):
        raise UserError(f"found {find()}")

    monkeypatch.setattr(page, "ModelKeeper", refuse)
    found = f"found {path}"
    for name, message in ((str(path), found), ("my_run", found), ("my_ran", "did you mean my_run")):
        with pytest.raises(UserError, match=message):
            app.start(app.AppSettings(checkpoint=name))


def test_start_passes_on_the_address_and_limits_uploads(served, monkeypatch):
    pytest.importorskip("gradio")
    app.import_gradio()
    launched = {}

    def launch(blocks, **options) -> tuple[None, str, str]:
        launched.update(options)
        return None, "local", "public"

    monkeypatch.setattr(app.gr.Blocks, "launch", launch)
    checkpoint = str(served.path)
    blocks, url = app.start(
        app.AppSettings(checkpoint=checkpoint, host="0.0.0.0", port=80, share=True)
    )
    expected = {"server_name": "0.0.0.0", "server_port": 80, "share": True}
    assert launched | expected | {"max_file_size": "10mb"} == launched and url == "public"
    assert (blocks.delete_cache, Image.MAX_IMAGE_PIXELS) == ((600, 600), 10_000_000)
    app.start(app.AppSettings(checkpoint=checkpoint))
    assert (launched["server_name"], launched["share"]) == ("127.0.0.1", False)


def test_missing_gradio_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["app.py"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert exit_code(app.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "pip install -r requirements-app.txt" in line


@pytest.fixture
def url(served, monkeypatch):
    """The address of a page on a free port."""
    pytest.importorskip("gradio")
    app.import_gradio()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks, url = app.start(app.AppSettings(checkpoint=str(served.path), port=port))
    yield url.rstrip("/")
    blocks.close()


def call(url: str, event: str, data: list, event_data: dict | None = None) -> str:
    """Sends an event as the browser does; returns what the server answers."""
    config = json.load(urllib.request.urlopen(f"{url}/config"))
    (fn, *_) = [d["id"] for d in config["dependencies"] if [t[1] for t in d["targets"]] == [event]]
    body = {"fn_index": fn, "data": data, "session_hash": "visitor", "event_data": event_data}
    request = urllib.request.Request(
        f"{url}/gradio_api/queue/join", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    urllib.request.urlopen(request).read()
    answers = urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash=visitor")
    return next(line.decode() for line in answers if b"process_completed" in line)


def test_page_serves_no_file_of_the_server(url):
    Image.new("RGB", (8, 8)).save("secret.png")
    path = str(Path("secret.png").resolve())
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    assert '"success":false' in call(url, "upload", [None, file])
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{url}/gradio_api/file={path}")


def test_page_ignores_images_and_masks_that_are_not_there(url):
    assert '"success":true' in call(url, "pick", [None], {"grid": "samples", "index": 7})
    assert '"success":true' in call(url, "paint", [None], {"mask": "1"})


def test_busy_port_is_one_line(url, served):
    port = int(url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}") as error:
        app.start(app.AppSettings(checkpoint=str(served.path), port=port))
    assert "\n" not in str(error.value)


def test_page_in_a_browser(url, served):
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium")
    ready = ".images button:not([disabled])"
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        visitors = [browser.new_context().new_page() for _ in range(2)]
        elsewhere = []
        for visitor in visitors:
            visitor.on("request", lambda request: elsewhere.append(request.url))
            visitor.goto(url)
            visitor.wait_for_selector(ready)
        one, other = visitors

        # An invalid value is one visitor's; a valid one is sampled.
        seeds = one.get_by_label("Seeds")
        seeds.fill("x")
        seeds.press("Enter")
        one.wait_for_selector("text=must look like")
        assert not other.query_selector("text=must look like")
        seeds.fill("3,7")
        seeds.press("Enter")
        one.wait_for_function(f"document.querySelectorAll('{ready}').length == 2")

        # A click chooses, varies and offers a PNG with its settings.
        one.click(".images button[data-index='1']")
        one.wait_for_selector(".panel .images button")
        with one.expect_download() as download:
            one.click(".chosen a")
        assert json.loads(plots.read_png_metadata(download.value.path()))["seeds"] == [7]

        # Everyone is told of a replaced checkpoint.
        save_model(str(served.path), seed=1)
        for visitor in visitors:
            visitor.wait_for_selector("text=The checkpoint has changed")
        browser.close()
    assert not [u for u in elsewhere if not u.startswith((url, "data:", "blob:"))]

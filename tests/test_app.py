"""app.py: what users see of their own and other users' events, and the page in gradio."""

import json
import shutil
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import app
import inference
from engine import page, plots
from engine.errors import UserError
from engine.page import ModelKeeper, PageImage, Plan, Request, Session
from inference import InferenceSettings
from tests.helpers import exit_code
from tests.small_models import CONTROLS, last_x_t, plan_of, save_model


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Restored after a test: app.import_gradio sets these."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")


# What a user's events show.


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


def test_image_chosen_while_the_model_loads_does_not_change_what_is_inpainted(served, monkeypatch):
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    older, newest = (PageImage(torch.rand(3, 8, 8), name, {}) for name in ("older", "newest"))
    mask = torch.arange(64).reshape(8, 8) < 8
    session = Session(chosen=[older], mask=mask)
    edited = []

    def plan(*_) -> SimpleNamespace:
        session.choose(newest)
        return SimpleNamespace(edit=lambda *arguments: edited.append(arguments) or [])

    monkeypatch.setattr(shown, "plan", plan)
    shown.inpaint(session, Request(), 0.5)
    assert edited == [("inpaint", 4, older, {"mask": mask})]


def test_trajectory_ends_in_the_png_of_inference(served, monkeypatch):
    settings = ["--sampler", "ddim", "--spacing", "uniform", "--eta", "1", "--seeds", "3"]
    settings += ["--guidance_mode", "autoguidance", "--guidance_min_sigma", "0"]  # the first: own
    monkeypatch.setattr("sys.argv", ["inference.py", *settings])
    assert exit_code(inference.main) == 0
    (path,) = Path("inference_results").rglob("000003.png")
    session = Session()
    notices = []
    page.take_upload(session, path, served.model, InferenceSettings, notices.append)
    assert "spacing uniform, eta 1.0, guidance_min_sigma 0.0 of the upload" in notices[0]
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    film = shown.show_trajectory(session, Request())
    np.testing.assert_allclose(last_x_t(film), np.asarray(Image.open(path)), atol=1)


@pytest.mark.parametrize("change", [{"mode": "vary"}, {"sha256": "of another model"}])
def test_trajectory_is_of_samples_of_this_model_only(served, change):
    image = PageImage(torch.rand(3, 8, 8), "", plan_of(served).settings | change)
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    assert "only they start" in shown.show_trajectory(Session(chosen=[image]), Request())


# gradio.


def test_sliders_have_the_bounds_of_the_settings(served):
    pytest.importorskip("gradio")
    app.import_gradio()
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    shown.build()
    sliders = shown.controls["guidance"], shown.controls["strength"]
    assert [(s.minimum, s.maximum) for s in sliders] == [(1, 10), (0.001, 1)]


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


def test_page_of_a_run_follows_its_checkpoints(served, monkeypatch):
    save_model("checkpoints/my_run/step_0000001.pt")
    finders = []
    monkeypatch.setattr(page, "ModelKeeper", lambda find, load: finders.append(find) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        app.start(app.AppSettings(checkpoint="my_run"))
    path = save_model("checkpoints/my_run/last.pt")
    assert finders[0]() == path


def test_chosen_images_of_another_size_are_named(served):
    shown = app.Page(ModelKeeper(lambda: served.path, app.load_shared_model))
    shown.panels = {"Vary": ("output", pytest.fail)}
    session = Session(chosen=[PageImage(torch.rand(3, 16, 16), "seed 0", {})])
    assert "another image size" in shown.show_panel(session, 0.8)["output"]
    session.choose(PageImage(torch.rand(3, 8, 8), "seed 1", {}))  # the other is dropped
    assert session.what_to_choose(served.model) == "" and len(session.chosen) == 1


def test_start_passes_on_the_address_and_limits_uploads(served, monkeypatch):
    pytest.importorskip("gradio")
    app.import_gradio()
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")  # as if Ghostscript were installed
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
    assert not EpsImagePlugin.has_ghostscript()
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


def test_emptied_and_extreme_numbers_reach_the_page(url):
    for value in (None, 1e9):
        controls = CONTROLS | {"steps": value, "guidance": value}
        assert '"success":true' in call(url, "input", [None, value, *controls.values()])


def test_busy_port_is_one_line(url, served):
    port = int(url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}") as error:
        app.start(app.AppSettings(checkpoint=str(served.path), port=port))
    assert "\n" not in str(error.value) and str(error.value).endswith("Change --host or --port")


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

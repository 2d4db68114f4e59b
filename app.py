"""A page in the browser to sample from a checkpoint and to follow a run.

    pip install -r requirements-app.txt
    python app.py                                    the newest checkpoint, http://127.0.0.1:7860
    python app.py --checkpoint weights/cifar10.safetensors
    python app.py --host 0.0.0.0                     for the local network; --share: for everyone

The page takes only numbers, names that it offers, and images, which it deletes within 20 minutes.
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from engine.cli import Parser, run_script  # first: sets what torch reads

import torch
from PIL import EpsImagePlugin, Image

from ddpm_model import DDPMModel, unnormalize
from engine import checkpoints, page, page_html, run_history
from engine.devices import default_device
from engine.errors import UserError
from engine.gpu_memory import is_out_of_memory
from engine.page import MAX_STEPS, Plan, Request, Session
from engine.samplers import DEFAULT_SAMPLER, SAMPLERS
from engine.settings import Setting, Settings
from inference import InferenceSettings

ROOT = Path(__file__).resolve().parent
gr: Any = None  # gradio, once import_gradio has been called
NUM_VARIATIONS, NUM_INPAINTED = 8, 4
NUM_FRAMES = 12  # of an interpolation
INTERPOLATION_STEPS = 60
PREVIEW_SECONDS = 0.2
POLL_SECONDS = 3
MAX_UPLOAD = "10mb"
MAX_PIXELS = 20_000_000  # of an uploaded image


class AppSettings(Settings):
    """Which model the page shows, and to whom."""

    checkpoint = Setting(None, "a checkpoint file, or a run", type_=str, auto="always the newest")
    host = Setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port = Setting(7860, "port to listen on", min=1, max=65535)
    share = Setting(False, "also make a public gradio.live link, valid for 72 hours")


class SharedModel(page.SharingMixin, DDPMModel):
    """A model that several users use at once."""


def load_shared_model(path: Path) -> SharedModel:
    """Loads a checkpoint onto the default device."""
    return SharedModel.from_file(path).to(default_device()).eval()


class Page:
    """What happens on the users' events. Each method returns what the page then shows."""

    def __init__(self, keeper: page.ModelKeeper):
        self.keeper = keeper

    @contextmanager
    def errors_shown(self) -> Iterator[None]:
        """Shows an error to the user who caused it, and to nobody else."""
        try:
            yield
        except page.SupersededError:
            pass
        except UserError as error:
            gr.Warning(html.escape(str(error)))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            gr.Warning("out of memory. Ask for fewer images")

    def plan(self, request: Request, *controls: Any) -> Plan:
        """Returns what the controls ask for; UserError if the page does not offer it."""
        return Plan.of_controls(self.keeper.refresh(), request, InferenceSettings, *controls)

    # Samples.

    def sample(self, session: Session, *controls: Any) -> Iterator[tuple[str, str]]:
        """Samples images, showing the predicted x_0 while it runs."""
        with self.errors_shown():
            request = session.start("samples")
            plan = self.plan(request, *controls)
            start = shown = time.monotonic()
            for t, _, x_0 in plan.trajectory():
                if t >= 0 and time.monotonic() - shown > PREVIEW_SECONDS:
                    shown = time.monotonic()
                    images = [(page.image_uri(image), "") for image in unnormalize(x_0)]
                    yield page_html.image_grid(images), page_html.note(f"timestep {t}")
            request.check()
            session.images["samples"] = plan.attach_settings(unnormalize(x_0))
            seconds = time.monotonic() - start
            yield self.grid(session, "samples"), page_html.note(f"sampled in {seconds:.1f} s")

    def grid(self, session: Session, name: str) -> str:
        """Returns the images of a grid, the chosen ones framed."""
        images = [(p.data_uri, p.caption) for p in session.images.get(name, [])]
        return page_html.image_grid(images, [p.data_uri for p in session.chosen])

    def choose(self, session: Session, event: gr.EventData) -> tuple[str, str, str]:
        """Makes the clicked image the newest of the chosen ones."""
        images = session.images.get(str(event.grid), [])
        if type(event.index) is int and 0 <= event.index < len(images):
            session.choose(images[event.index])
        return self.show_chosen(session)

    def show_chosen(self, session: Session) -> tuple[str, str, str]:
        """Returns the samples, the chosen images and the canvas to paint on."""
        canvas = page_html.canvas(session.chosen[0], session.mask) if session.chosen else ""
        return self.grid(session, "samples"), page_html.chosen_images(session.chosen), canvas

    def take_upload(self, session: Session, path: str) -> dict[Any, Any]:
        """Chooses an uploaded image; a PNG of ours also restores the controls."""
        with self.errors_shown():
            model = self.keeper.refresh().model
            options = {"notify": lambda text: gr.Info(html.escape(text))}
            values = page.take_upload(session, Path(path), model, InferenceSettings, **options)
            updates = {self.controls[name]: value for name, value in values.items()}
            updates |= dict(zip(self.chosen_outputs, self.show_chosen(session), strict=True))
            return updates | {self.tabs: gr.update(selected=session.panel)}
        return gr.skip()

    def take_mask(self, session: Session, event: gr.EventData) -> None:
        """Takes the mask that was painted."""
        with self.errors_shown():
            session.mask = page.parse_mask(event.mask, self.keeper.refresh().model.image_size)

    # Panels: what is made from the chosen images.

    def open_panel(self, session: Session, event: gr.SelectData, *controls: Any) -> dict[Any, str]:
        """Renders the panel whose tab was clicked."""
        session.panel = event.value
        return self.show_panel(session, *controls)

    def show_panel(self, session: Session, strength: float, *controls: Any) -> dict[Any, str]:
        """Renders the open panel."""
        panel = session.panel if session.panel in self.panels else "Vary"
        output, render = self.panels[panel]
        if advice := session.what_to_choose(self.keeper.refresh().model):
            return {output: page_html.note(advice)}
        with self.errors_shown():
            request = session.start("panel")
            result = render(session, request, strength, *controls)
            request.check()
            return {output: result}
        return gr.skip()

    def vary(self, session: Session, request: Request, strength: float, *controls: Any) -> str:
        """Variations of the newest chosen image."""
        plan = self.plan(request, *controls)
        options = InferenceSettings.check({"strength": strength}, "the page")
        session.images["vary"] = plan.edit("vary", NUM_VARIATIONS, session.chosen[0], options)
        return self.grid(session, "vary")

    def inpaint(self, session: Session, request: Request, _: float, *controls: Any) -> str:
        """The newest chosen image, filled in where it was painted over."""
        source, mask = session.chosen[0], session.mask  # until the plan is made, both may change
        if mask is None or not mask.any():
            return page_html.note("Paint over the part to fill in.")
        plan = self.plan(request, *controls)
        session.images["inpaint"] = plan.edit("inpaint", NUM_INPAINTED, source, {"mask": mask})
        return self.grid(session, "inpaint")

    def interpolate(self, session: Session, request: Request, *_: Any) -> str:
        """Frames between the two chosen images."""
        if len(session.chosen) < 2:
            return page_html.note("Choose a second image.")
        end, start = (chosen.image for chosen in session.chosen)
        model = self.keeper.refresh().model.serve(request)
        images = model.interpolate(start, end, NUM_FRAMES, steps=INTERPOLATION_STEPS)
        captions = (f"{i / (NUM_FRAMES - 1):.2f}" for i in range(NUM_FRAMES))
        frames = zip(map(page.image_uri, images), captions, strict=True)
        return page_html.film([*frames], loop=True)

    def show_trajectory(self, session: Session, request: Request, *_: Any) -> str:
        """The trajectory of the newest chosen image: x_t and the predicted x_0."""
        settings = session.chosen[0].settings
        if settings.get("mode") != "samples" or settings["sha256"] != self.keeper.refresh().sha256:
            return page_html.note("Choose one of the samples: only they start from noise.")
        class_names = [settings["classes"]] if settings["classes"] else []
        controls = (settings[name] for name in ("sampler", "steps", "guidance"))
        plan = self.plan(request, str(settings["seeds"][0]), class_names, *controls)
        plan.repeat(settings)
        return page_html.film([
            (page.image_uri(unnormalize(torch.cat([x_t[0], x_0[0]], dim=-1))), f"t = {max(t, 0)}")
            for t, x_t, x_0 in plan.trajectory()
        ])  # fmt: skip

    # Model and runs, checked every POLL_SECONDS.

    def poll(self, session: Session) -> dict[Any, Any]:
        """Shows a new model; controls whose update stays the same keep the user's values."""
        served = self.keeper.refresh()
        if self.keeper.problem != session.problem:
            session.problem = self.keeper.problem
            if session.problem:
                gr.Warning(html.escape(f"{session.problem}; continuing with the previous model"))
        if served.version == session.model_version:
            return gr.skip()
        if session.model_version:
            gr.Info("The checkpoint has changed: the new model is used from now on.")
        session.model_version = served.version
        updates = page.control_updates(served.model)
        changed = {n: gr.update(**u) for n, u in updates.items() if u != session.updates.get(n)}
        session.updates = updates
        shown = {self.controls[name]: update for name, update in changed.items()}
        return shown | {self.header: page_html.describe_model(served)}

    def follow(self, session: Session, name: str | None) -> dict[Any, Any]:
        """Shows a run, by default the newest; curve and grids each only if it changed."""
        runs = run_history.find_runs()
        if not runs:
            return {self.run_state: page_html.note("No run yet: run train_optimized.py.")}
        name = name if name in runs else runs[0]
        version = run_history.run_version(name)
        shown = {
            self.run: gr.update(choices=runs, value=name),
            self.run_state: page_html.tiles(run_history.summarize_run(version, time.time())),
        }
        if version != session.run_version:
            session.run_version = version
            shown[self.run_curve] = page_html.curve(run_history.plot_run(version))
        version = run_history.grids_version(name)
        if version != session.grids_version:
            session.grids_version = version
            shown[self.run_grids] = page_html.film(run_history.run_grids(name), autoplay=False)
        return shown

    # Layout.

    def build(self) -> Any:
        """Returns the page as gradio's Blocks."""
        with gr.Blocks(title="DDPM", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
            session = gr.State(Session())
            self.header = gr.HTML()
            with gr.Tab("Sample"):
                self.build_samples()
            with gr.Tab("Follow a run") as tab:
                self.build_run()
            self.wire(blocks, session, tab)
        return blocks

    def build_samples(self) -> None:
        """Lays out the sampling tab."""
        limits = {name: (s.min, s.max) for name, s in InferenceSettings.settings().items()}
        # Samples, controls, chosen images.
        with gr.Row():
            with gr.Column(scale=3, min_width=340):
                self.samples = gr.HTML(js_on_load=page_html.PICK % "samples")
                self.status = gr.HTML()
            with gr.Column(scale=2, min_width=300):
                with gr.Row(equal_height=True):
                    seeds = gr.Textbox("0-15", label="Seeds, like 0-15 or 3,7", scale=3)
                    self.dice = gr.Button("New seeds", scale=1, min_width=130)
                self.controls = {
                    "seeds": seeds,
                    "classes": gr.Dropdown([], multiselect=True, label="Classes", visible=False),
                    "sampler": gr.Dropdown(list(SAMPLERS), value=DEFAULT_SAMPLER, label="Sampler"),
                    "steps": gr.Slider(1, MAX_STEPS, step=1, label="Steps"),
                    "guidance": gr.Slider(*limits["guidance"], step=0.1, label="Guidance"),
                }
                self.chosen = gr.HTML(page_html.chosen_images([]))
                self.upload = gr.UploadButton("Upload an image", file_types=["image"])
        # Panels for the chosen images.
        with gr.Tabs(elem_classes="panel") as self.tabs:
            with gr.Tab("Vary", id="Vary"):
                strength = gr.Slider(*limits["strength"], 0.5, step=0.001, label="Strength")
                self.controls["strength"] = strength
                self.varied = gr.HTML(js_on_load=page_html.PICK % "vary")
            with gr.Tab("Inpaint", id="Inpaint"), gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self.canvas = gr.HTML(js_on_load=page_html.PAINT)
                with gr.Column(scale=3, min_width=320):
                    self.inpainted = gr.HTML(js_on_load=page_html.PICK % "inpaint")
            with gr.Tab("Interpolate", id="Interpolate"):
                self.between = gr.HTML(js_on_load=page_html.PLAY)
            with gr.Tab("From noise", id="From noise"):
                self.noise = gr.HTML(js_on_load=page_html.PLAY)
        # Output and method of each panel.
        self.panels = {
            "Vary": (self.varied, self.vary),
            "Inpaint": (self.inpainted, self.inpaint),
            "Interpolate": (self.between, self.interpolate),
            "From noise": (self.noise, self.show_trajectory),
        }

    def build_run(self) -> None:
        """Lays out the tab that follows a run."""
        self.run = gr.Dropdown([], label="Run")
        self.run_state = gr.HTML()
        with gr.Row():
            with gr.Column(min_width=340):
                self.run_curve = gr.HTML()
            with gr.Column(min_width=340):
                self.run_grids = gr.HTML(js_on_load=page_html.PLAY)

    def wire(self, blocks: Any, session: Any, run_tab: Any) -> None:
        """Connects the users' events with what they do."""
        controls = self.controls
        sampling = [controls[name] for name in ("seeds", "classes", "sampler", "steps", "guidance")]
        self.chosen_outputs = [self.samples, self.chosen, self.canvas]
        panels = [output for output, _ in self.panels.values()]
        quiet = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}
        sample = {"fn": self.sample, "inputs": [session, *sampling]}
        sample |= quiet | {"outputs": [self.samples, self.status]}
        panel = quiet | {"fn": self.show_panel, "outputs": panels, "show_progress": "minimal"}
        panel["inputs"] = [session, controls["strength"], *sampling]

        # Every change samples again.
        on_change = [controls[name].input for name in ("classes", "sampler", "steps", "guidance")]
        gr.on([*on_change, controls["seeds"].submit], **sample).then(**panel)
        new_seeds = self.dice.click(page.new_seeds, controls["seeds"], controls["seeds"], **quiet)
        new_seeds.then(**sample).then(**panel)
        controls["strength"].input(**panel)

        # Chosen images and panels.
        for grid in (self.samples, self.varied, self.inpainted):
            grid.pick(self.choose, session, self.chosen_outputs, **quiet).then(**panel)
        self.canvas.paint(self.take_mask, session, None, **quiet).then(**panel)
        self.tabs.select(self.open_panel, panel["inputs"], panels, **quiet)
        outputs = [*controls.values(), *self.chosen_outputs, self.tabs]
        uploaded = self.upload.upload(self.take_upload, [session, self.upload], outputs, **quiet)
        uploaded.then(**sample).then(**panel)

        # The model, now and every POLL_SECONDS; a run while its tab is open.
        poll = {"fn": self.poll, "inputs": session, "outputs": [self.header, *sampling[1:]]} | quiet
        blocks.load(**poll).then(**sample)
        gr.Timer(POLL_SECONDS).tick(**poll)
        shown = [self.run, self.run_state, self.run_curve, self.run_grids]
        follow = {"fn": self.follow, "inputs": [session, self.run], "outputs": shown} | quiet
        timer = gr.Timer(POLL_SECONDS, active=False)
        timer.tick(**follow)
        self.run.input(**follow)
        run_tab.select(**follow)
        run_tab.select(lambda: gr.Timer(active=True), None, timer, **quiet)


def import_gradio() -> None:
    """Imports gradio without its telemetry; raises UserError if it is not installed."""
    global gr
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio as gr
    except ImportError as error:
        advice = "Install it with `pip install -r requirements-app.txt`"
        raise UserError(f"app.py needs gradio, but: {error}. {advice}") from error
    gr.Slider.preprocess = lambda _, value: value  # ours is checked; None, of an empty box, fails


def start(settings: AppSettings) -> tuple[Any, str]:
    """Starts the server; returns gradio's Blocks and the address."""
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses more than twice that
    EpsImagePlugin.gs_binary = False  # of an upload in PostScript, it would run the program
    find = partial(checkpoints.newest_checkpoint, notify=False)
    if settings.checkpoint is not None:
        find = partial(checkpoints.resolve_checkpoint, settings.checkpoint)
    blocks = Page(page.ModelKeeper(find, load_shared_model)).build()
    script = (ROOT / "app.js").read_text(encoding="utf-8")
    blocks.queue(max_size=100, default_concurrency_limit=16, api_open=False)
    try:
        _, url, public_url = blocks.launch(
            server_name=settings.host, server_port=settings.port, share=settings.share,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css_paths=ROOT / "app.css", head=f"{page_html.MARGIN}<script>{script}</script>",
            max_file_size=MAX_UPLOAD, prevent_thread_lock=True, quiet=True, footer_links=[],
            ssr_mode=False, run_history=False, enable_monitoring=False,
        )  # fmt: skip
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise UserError(f"cannot listen on {where} ({error}). Change --host or --port") from error
    return blocks, public_url or url


def main(description: str | None = __doc__) -> None:
    """Starts the page and waits for Ctrl-C."""
    parser = Parser(description)
    AppSettings.add_flags(parser)
    settings = AppSettings(**AppSettings.given(parser.parse_args()))
    import_gradio()
    blocks, url = start(settings)
    print(f"{url} (Ctrl-C stops)", flush=True)
    blocks.block_thread()


if __name__ == "__main__":
    run_script(main)

"""What app.py needs besides gradio: turns at the model, and what users chose."""

import copy
import itertools
import json
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import inference_jobs as jobs
from engine import plots
from engine.checkpoints import sha256
from engine.denoiser import GUIDANCE_OPTIONS
from engine.errors import UserError, short_reason
from engine.generation import State
from engine.input_images import is_embedded, read_image_for, read_mask, resolve_input
from engine.labels import labels_in_proportion, parse_classes
from engine.samplers import MAX_CONSISTENCY_STEPS
from engine.sampling_settings import choose_sampling, guidance_kwargs, plan_kwargs
from engine.settings import Settings

MAX_IMAGES = 36  # of a request
MAX_STEPS = 100
MAX_SECONDS = 120.0
MAX_TEXT = 19 * MAX_IMAGES  # characters of the seeds: of as many, with 18 digits


class SupersededError(Exception):
    """The same user has asked for something newer."""


class Turns:
    """Lets threads run one at a time, in the order in which they asked."""

    def __init__(self):
        self.waiting: deque[object] = deque()
        self.changed = threading.Condition()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block that one thread at a time runs."""
        ticket = object()
        with self.changed:
            self.waiting.append(ticket)
            self.changed.wait_for(lambda: self.waiting[0] is ticket)
        try:
            yield
        finally:
            with self.changed:
                self.waiting.popleft()
                self.changed.notify_all()


class Request:
    """What a user asked for; it ends when a newer request supersedes it or its time is up."""

    def __init__(self):
        self.is_superseded = False
        self.deadline = time.monotonic() + MAX_SECONDS

    def check(self) -> None:
        """Raises SupersededError, or UserError after MAX_SECONDS."""
        if self.is_superseded:
            raise SupersededError
        if time.monotonic() > self.deadline:
            reason = f"that took longer than {MAX_SECONDS:.0f} seconds"
            raise UserError(f"{reason}. Ask for fewer images or steps")


class SharingMixin:
    """Lets several users use a DDPMModel at once: forward passes take turns."""

    turns = Turns()  # of all models, which share the device
    request: Request | None = None  # without one, work has no time limit

    def serve(self, request: Request) -> nn.Module:
        """Returns a view of this model whose work ends with a request."""
        view = copy.copy(self)
        view.request = request
        return view

    def _run_network(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.turns.turn():
            if self.request:
                self.request.check()
            return super()._run_network(*args, **kwargs)


@dataclass(frozen=True)
class ServedModel:
    """A model and where it came from. version: counts the models of a page."""

    model: nn.Module
    path: Path
    sha256: str
    version: int


class ModelKeeper:
    """Holds the model of a checkpoint and loads it again when the file is exchanged.

    find: returns the path of the checkpoint. load: loads it. problem: why the newest file could not
    be loaded, which is tried again, or nothing. Raises UserError if the first one cannot be loaded.
    """

    def __init__(self, find: Callable[[], Path], load: Callable[[Path], nn.Module]):
        self.find = find
        self.load = load
        self.lock = threading.Lock()
        self.served: ServedModel | None = None
        self.signature: tuple[Any, ...] = ()
        self.problem = ""
        if self.refresh() is None:
            raise UserError(self.problem)

    def refresh(self) -> ServedModel:
        """Returns the checkpoint's model, or the one before if it cannot be loaded."""
        with self.lock:
            try:
                path = self.find()
                signature = signature_of(path)
                if signature != self.signature:
                    version = self.served.version + 1 if self.served else 1
                    served = ServedModel(self.load(path), path, sha256(path), version)
                    if signature_of(path) != signature:  # the checksum may be of another file
                        raise UserError(f"{path} was replaced while it was read")
                    self.served = served
                    self.signature = signature
                self.problem = ""
            except (UserError, OSError, RuntimeError, MemoryError) as error:
                self.problem = short_reason(error)
            return self.served


def signature_of(path: Path) -> tuple[Any, ...]:
    """Returns a file's path and what changes when it is replaced."""
    status = path.stat() if path.is_file() else None
    return path, status and (status.st_mtime_ns, status.st_size, status.st_ino)


# Images.


@dataclass
class PageImage:
    """An image (C, H, W), in multiples of 1/255 as its PNG has it, and how it was made."""

    image: Tensor
    caption: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.image = (self.image.float().cpu().clamp(0, 1) * 255).round() / 255
        text = json.dumps(self.settings) if self.settings else ""
        self.data_uri = plots.png_data_uri(plots.encode_png(plots.to_image(self.image), text))


@dataclass
class Plan:
    """What the controls ask for: seeds, their classes, and options of the model's methods."""

    model: nn.Module
    seeds: list[int]
    labels: list[int] | None  # of the seeds, if the model has classes and some were chosen
    options: dict[str, Any]  # sampler, steps, guidance
    settings: dict[str, Any]  # as inference.py stores them

    @classmethod
    def of_controls(
        cls, served: ServedModel, request: Request, settings_class: type[Settings], seeds: str,
        class_names: list[str], sampler: str, steps: float, guidance: float | None,
    ) -> "Plan":  # fmt: skip
        """Checks what the controls ask for; guidance None: the model's own.

        settings_class: of inference.py. Raises UserError for what the page does not offer.
        """
        # What the page offers.
        model = served.model.serve(request)
        if not isinstance(seeds, str) or not isinstance(class_names, list):  # a control was cleared
            raise UserError("seeds or classes are missing. Reload the page")
        if not isinstance(steps, (int, float)) or not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps is {steps}, but must be between 1 and {MAX_STEPS}")
        if len(seeds) > MAX_TEXT:
            raise UserError(f"seeds has {len(seeds)} characters, but may have at most {MAX_TEXT}")
        has_classes = set(class_names) <= set(model.class_names)
        if not has_classes or sampler not in model.supported_samplers:
            raise UserError("this model has no such sampler or class. Reload the page")
        # Options, seeds and labels.
        guidance = model.guidance if guidance is None else guidance
        options = {"sampler": sampler, "steps": int(steps), "guidance": guidance}
        options = settings_class.check(options, "the page")
        numbers = jobs.parse_seeds(seeds, MAX_IMAGES)
        chosen = [model.class_names.index(name) for name in class_names]
        labels = [label for _, label in zip(numbers, itertools.cycle(chosen), strict=False)]
        # As inference.py stores them.
        settings = settings_class(**options, checkpoint=str(served.path)).as_dict()
        settings |= choose_sampling(model, settings)
        settings |= {"seeds": numbers, "sha256": served.sha256}
        del settings["num_samples"]
        return cls(model, numbers, labels or None, options, jobs.complete_settings(settings))

    def repeat(self, settings: dict[str, Any]) -> None:
        """Takes over what a sample's PNG stores besides the controls; UserError if it cannot."""
        if len(settings["seeds"]) > 1 or settings["use_amp"]:
            raise UserError("the page repeats only single images, without mixed precision")
        sampler = settings["sampler"]
        eta = {"eta": settings["eta"]} if sampler == "ddim" else {}
        self.options |= plan_kwargs(settings, sampler) | guidance_kwargs(settings) | eta

    def trajectory(self) -> Iterator[State]:
        """Yields t, x_t and the predicted x_0, from noise to image, like DDPMModel.sample."""
        if self.labels is None and self.model.class_names:
            counts = self.model.class_counts.values()
            self.labels = labels_in_proportion(self.seeds, counts).tolist()
        return self.model.sample_states(self.seeds, labels=self.labels, **self.options)

    def edit(self, mode: str, count: int, source: PageImage, options: dict) -> list[PageImage]:
        """Calls the model's method `mode`, which starts from an image, for `count` seeds."""
        self.seeds = self.seeds[:count]
        self.labels = self.labels and self.labels[:count]
        arguments = self.options | {"labels": self.labels} | options
        method = getattr(self.model, mode)
        images = method(source.image, batch_size=len(self.seeds), seed=self.seeds, **arguments)
        if "mask" in options:
            options = {"mask": image_uri(options["mask"][None].float())}
        self.settings |= {"mode": mode, "image": source.data_uri} | options
        return self.attach_settings(images)

    def attach_settings(self, images: Tensor) -> list[PageImage]:
        """Returns images (B, C, H, W), one per seed, with settings to reproduce each."""
        page_images = []
        for i, (image, seed) in enumerate(zip(images, self.seeds, strict=True)):
            settings = self.settings | {"seeds": [seed]}
            caption = f"seed {seed}"
            if self.labels:
                settings["classes"] = self.model.class_names[self.labels[i]]
                caption += f", {settings['classes']}"
            page_images.append(PageImage(image, caption, settings))
        return page_images


@dataclass
class Session:
    """What one user sees: images by grid, the chosen ones, running requests by task."""

    images: dict[str, list[PageImage]] = field(default_factory=dict)
    chosen: list[PageImage] = field(default_factory=list)  # the newest first, at most two
    mask: Tensor | None = None  # (H, W), not 0 where the newest is to be inpainted
    panel: str = "Vary"
    requests: dict[str, Request] = field(default_factory=dict)
    model_version: int = 0
    updates: dict[str, Any] = field(default_factory=dict)  # of the controls, by the model
    problem: str = ""
    run_version: Any = None
    grids_version: Any = None

    def start(self, task: str) -> Request:
        """Returns a new request, which supersedes the task's previous one."""
        if task in self.requests:
            self.requests[task].is_superseded = True
        self.requests[task] = Request()
        return self.requests[task]

    def choose(self, image: PageImage) -> None:
        """Makes an image the newest of the two that are chosen; both have its shape."""
        older = [each for each in self.chosen[:1] if each.image.shape == image.image.shape]
        self.chosen = [image, *older]
        self.mask = None

    def what_to_choose(self, model: nn.Module) -> str:
        """Returns what the user has to choose before a model can change it, or nothing."""
        if not self.chosen:
            return "Choose an image first."
        if all(chosen.image.shape == model.image_shape for chosen in self.chosen):
            return ""
        return "Choose other images: these are of a model with another image size or channels."


def control_updates(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns what the controls offer with a model: by name, arguments of gradio's update."""
    names = list(model.class_names)
    has_weaker = model.guide is not None or (model.guidance_mode == "cfg" and bool(names))
    is_tuned = model.is_consistency_tuned  # guidance is in its weights
    max_steps = MAX_CONSISTENCY_STEPS if is_tuned else MAX_STEPS
    max_steps = min(model.num_timesteps, max_steps)
    return {
        "classes": {"choices": names, "value": [], "visible": bool(names)},
        "sampler": {"choices": list(model.supported_samplers), "value": model.default_sampler},
        "steps": {"value": min(model.sampling_timesteps, max_steps), "maximum": max_steps},
        "guidance": {"value": model.guidance, "visible": has_weaker and not is_tuned},
    }


def take_upload(
    session: Session, path: Path, model: nn.Module, settings_class: type[Settings],
    notify: Callable[[str], None] = print,
) -> dict[str, Any]:  # fmt: skip
    """Chooses an uploaded image, and returns values of the controls by name.

    A PNG of ours restores what it was made from and the controls, with at most MAX_IMAGES seeds; a
    notice names settings that the page lacks. settings_class: of inference.py. Raises UserError,
    and changes nothing, for what is no image.
    """
    try:
        image = read_image_for(model, path)
        has_settings = bool(plots.read_png_metadata(path))
        settings = jobs.read_png_settings(path, settings_class) if has_settings else {}
    except UserError as error:
        raise UserError(str(error).replace(str(path), "the upload")) from error
    if not settings:
        session.choose(PageImage(image, "upload", {}))
        return {}
    if settings["sampler"] not in model.supported_samplers:
        raise UserError("the upload was made with a sampler that this page does not offer")

    # The sources of variations and inpainted images are in their settings; never a path.
    mode = settings["mode"]
    mask = None
    files = {n: settings[n] for n in ("mask", "image") if is_embedded(settings[n])}
    if "image" in files:
        image = read_image_for(model, resolve_input(files["image"]))
    if mode == "inpaint" and len(files) == 2:
        mask = read_mask(*map(resolve_input, files.values()), model.image_size)

    # The controls, and what they cannot restore.
    has_classes = model.class_names and settings["classes"]
    labels = parse_classes(settings["classes"], model.class_names) if has_classes else []
    offered = control_updates(model)
    max_steps = offered["steps"]["maximum"]
    controls = {
        "seeds": format_seeds(settings["seeds"][:MAX_IMAGES]),
        "classes": [model.class_names[label] for label in labels],
        "sampler": settings["sampler"], "strength": settings["strength"],
        "steps": min(settings["steps"] or model.sampling_timesteps, max_steps),
        "guidance": settings["guidance"] or offered["guidance"]["value"],
    }  # fmt: skip
    own = settings_class.values() | {"sampler": settings["sampler"], "steps": settings["steps"]}
    own |= choose_sampling(model, own) | {"steps": controls["steps"]}
    names = ["steps", "spacing", "noise_levels", "eta", "use_amp", "resamples"]
    lost = [f"{n} {settings[n]}" for n in names if settings[n] and settings[n] != own[n]]
    for name in GUIDANCE_OPTIONS[1:]:  # None: the model's own
        if settings[name] not in (None, model.architecture[name]):
            lost.append(f"{name} {settings[name]}")
    if lost:
        notify(f"the page does not restore {', '.join(lost)} of the upload")

    session.choose(PageImage(image, "upload", settings if mode == "samples" else {}))
    session.mask = mask
    session.panel = {"vary": "Vary", "inpaint": "Inpaint"}.get(mode, session.panel)
    return controls


def new_seeds(seeds: str) -> str:
    """Returns the same number of consecutive seeds, from a random one on."""
    try:
        count = len(jobs.parse_seeds(seeds[:MAX_TEXT], MAX_IMAGES))
    except UserError:
        count = 16
    first = random.SystemRandom().randrange(1_000_000)
    return format_seeds(range(first, first + count))


def format_seeds(seeds: Sequence[int]) -> str:
    """Returns seeds as parse_seeds reads them."""
    is_span = len(seeds) > 1 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"{seeds[0]}-{seeds[-1]}" if is_span else ",".join(map(str, seeds))


def image_uri(image: Tensor) -> str:
    """Returns an image (C, H, W) in [0, 1] as the data URI of a PNG."""
    return plots.png_data_uri(plots.encode_png(plots.to_image(image)))


def parse_mask(text: Any, size: int) -> Tensor:
    """Parses a mask's pixels in rows, `1` where to inpaint: bool (size, size)."""
    if not isinstance(text, str) or len(text) != size**2 or set(text) - {"0", "1"}:
        raise UserError(f"the mask is not {size}x{size} pixels. Paint it again")
    return torch.tensor([pixel == "1" for pixel in text]).reshape(size, size)

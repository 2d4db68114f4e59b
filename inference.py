"""Draws images with a trained model.

    python inference.py                                    16 samples from the newest checkpoint
    python inference.py --mode all                         one of everything below
    python inference.py --sampler dpmpp_2m --steps 15 --seeds 0-63
    python inference.py --from_png inference_results/.../000007.png      draws that picture again
    torchrun --nproc_per_node=4 inference.py --mode batch --num_samples 50000      shared out over 4 GPUs

Modes: samples; interpolate (between two images); progressive (the way from noise to image); batch (thousands, goes
on where it was killed); compare (samplers by step counts); vary (variations of an image); inpaint (paints part anew).
Results go to inference_results/<mode>-.../, each picture with the settings that made it, and summary.json.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from ddpm_model import DDPMModel, to_unit
from engine import checkpoints, plots
from engine.command_line import Parser, Setting, run
from engine.drawing import (
    Job,
    digest,
    fitting_batch,
    load_sampler,
    own_folder,
    parse_seeds,
    psnr,
    read_mask,
    read_picture,
    settings_of,
)
from engine.errors import UserError
from engine.processes import from_first, join, say_once, together
from engine.samplers import SAMPLER, SAMPLERS, SPACING, SPACINGS, groups
from engine.sources import load_images

RESULTS = Path("inference_results")
CHUNK = 256  # images in a part of an .npz that is being made
COMPARED_STEPS = (5, 10, 20, 50)


def batch_generate(
    model: DDPMModel,
    total_samples: int = 1000,
    batch_size: int = 32,
    seed: int = 0,
    sampler: str | Callable | None = None,
    steps: int | None = None,
    **options: Any,
) -> Tensor:
    """Draws many images, batch by batch, with a progress bar: (total_samples, C, H, W) in [0, 1] on the CPU.

    Image i comes from seed + i, whatever the batch size. sampler, steps and options as in DDPMModel.sample. Where
    several processes have come together (torch.distributed), all must call this: each draws its share of the batches
    and returns all images, the same that one process draws.
    """
    several = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
    batches = groups(range(seed, seed + total_samples), batch_size)
    parts = {}
    with tqdm(total=sum(map(len, batches[::world])), unit="image", desc="sampling", disable=rank > 0) as bar:
        for i in range(rank, len(batches), world):
            some = batches[i]
            parts[i] = model.sample(len(some), sampler=sampler, steps=steps, seed=some, **options).cpu()
            bar.update(len(some))
    if several:
        shape = (model.channels, model.image_size, model.image_size)
        for i, some in enumerate(batches):
            part = parts[i].to(model.device) if i in parts else torch.empty(len(some), *shape, device=model.device)
            torch.distributed.broadcast(part, src=i % world)
            parts[i] = part.cpu()
    return torch.cat([parts[i] for i in range(len(batches))])


def samples(job: Job) -> str:
    """Single images, a grid with their seeds, and a contact sheet of all at their own size."""
    seeds = job.settings["seeds"]
    images = job.draw(job.model.sample, seeds, **job.how)
    job.save_singles(images, seeds)
    shown = images[:100]
    labels = [f"seed {seed}" for seed in seeds[: len(shown)]]
    job.save(plots.labelled_grid(shown, labels, smallest=job.settings["tile"]), "grid.png", seeds=seeds[: len(shown)])
    sheet = plots.to_image(make_grid(images, max(1, round((1.6 * len(images)) ** 0.5)), padding=1, pad_value=1.0))
    job.save(sheet, "contact_sheet.png")
    job.finish()
    return f"{len(images)} images, grid.png, contact_sheet.png"


def progressive(job: Job) -> str:
    """x_t and the x_0 predicted from it along the way: a strip of some moments and a GIF of all."""
    seeds = job.settings["seeds"][:4]
    how = job.how
    function, timesteps = job.model.plan(how.pop("sampler"), how.pop("steps"), how.pop("spacing"))
    x, randn = job.model.noise(seeds)
    with job.precision():
        way = [
            (t, to_unit(x_t).float().cpu(), to_unit(x_0).float().cpu())
            for t, x_t, x_0 in job.model.trajectory(x, timesteps, function, randn, **how)
        ]
    moments = [way[i] for i in np.unique(np.linspace(0, len(way) - 1, job.settings["columns"]).round().astype(int))]
    tiles, labels = [], []
    for i, seed in enumerate(seeds):
        tiles += [x_t[i] for _, x_t, _ in moments] + [x_0[i] for _, _, x_0 in moments]
        labels += [f"x, t = {t}" if t >= 0 else f"seed {seed}" for t, _, _ in moments] + ["x_0 seen"] * len(moments)
    strip = plots.labelled_grid(torch.stack(tiles), labels, columns=len(moments), smallest=job.settings["tile"])
    job.save(strip, "progressive.png", seeds=seeds)
    frames = [plots.grid(torch.cat([x_t, x_0]), columns=len(seeds)) for _, x_t, x_0 in way[:: max(1, len(way) // 60)]]
    plots.save_gif([*frames, plots.grid(torch.cat([way[-1][1]] * 2), columns=len(seeds))], job.path("progressive.gif"))
    job.finish()
    return "progressive.png (upper row x_t, lower row the x_0 that the network sees in it), progressive.gif"


def picture(job: Job, name: str, seed: int) -> tuple[Tensor, str]:
    """The image that the setting `name` asks for, (3, H, W) in [0, 1], and what to call it; by default a seed's.

    A file, a seed, or data:INDEX of the images that the checkpoint was trained on.
    """
    given = job.settings[name] = job.settings[name] or str(seed)  # noted down, so that --from_png knows it too
    if given.isdigit():
        return job.draw(job.model.sample, [int(given)], **job.how)[0], f"seed {given}"
    kind, _, index = given.partition(":")
    if kind == "data" and index.isdigit():
        return training_image(job, int(index)), given
    return read_picture(Path(given), job.model.image_size), Path(given).name


def training_image(job: Job, index: int) -> Tensor:
    """The image with this index of the data that the model was trained on, (3, H, W) in [0, 1]."""
    config = job.model.provenance["config"]
    if not config:
        raise UserError(
            f"{job.settings['checkpoint']} does not say what it was trained on: name a file or a seed, not data:{index}"
        )
    images = load_images(config["DATASET"], config["IMAGE_SIZE"], Path(config["DATA_DIR"]))
    if index >= len(images):
        raise UserError(f"data:{index} is asked for, but {config['DATASET']} has {len(images)} images")
    return torch.from_numpy(images[index].copy()) / 255


def interpolate(job: Job) -> str:
    """Between two images: strip and GIF, and how near the ends are to what was given."""
    seeds = job.settings["seeds"]
    (first, first_name), (second, second_name) = picture(job, "image1", seeds[0]), picture(job, "image2", seeds[-1])
    sampler = job.sampler if callable(job.sampler) else "ddim"  # the way back must be the way there
    steps = min(max(100, job.settings["steps"]), job.model.num_timesteps)
    with job.precision():
        images = job.model.interpolate(first, second, job.settings["num_steps"], sampler, steps).float().cpu()
    ends = [psnr(images[0], first), psnr(images[-1], second)]
    tiles = torch.cat([first[None].cpu(), images, second[None].cpu()])
    labels = [first_name, *(f"{i / (len(images) - 1):.2f}" for i in range(len(images))), second_name]
    strip = plots.labelled_grid(
        tiles, labels, columns=min(len(tiles), job.settings["columns"] + 2), smallest=job.settings["tile"]
    )
    job.save(strip, "interpolation.png")
    frames = [plots.to_image(image) for image in plots.enlarge(torch.cat([images, images.flip(0)[1:-1]]), 128)]
    plots.save_gif(frames, job.path("interpolation.gif"))
    decoder = {"sampler": job.settings["sampler"] if callable(job.sampler) else sampler, "steps": steps}
    job.finish(psnr=[round(end, 1) for end in ends], decoder=decoder)
    return (
        f"interpolation.png, interpolation.gif; the ends are {ends[0]:.1f} and {ends[1]:.1f} dB from the given images"
    )


def batch(job: Job) -> str:
    """Many images straight to disk; what is there already, of the same settings, is not drawn again.

    Several processes share the groups of seeds out among themselves; the first writes all but the images.
    """
    processes = join()
    seeds, record, npz = job.settings["seeds"], job.path("settings.json"), job.settings["format"] == "npz"
    mine = json.dumps({key: value for key, value in job.settings.items() if key != "batch_size"}, sort_keys=True)
    if record.exists() and record.read_text() != mine:
        raise UserError(f"{job.folder} holds images of other settings: remove it or change --output_dir")
    if processes.is_main_process:
        checkpoints.write_atomically(record, lambda file: file.write(mine.encode()))
    parts = job.path("parts" if npz else "images")

    def drawn(group: list[int]) -> bool:
        files = [f"{group[0]:08d}.npy"] if npz else [f"{seed:06d}.png" for seed in group]
        return all((parts / file).exists() for file in files)

    # always the same groups of seeds, so that a run that was killed, and several processes, end with the same bytes
    chunks = groups(seeds, CHUNK)
    own = chunks[processes.process_index :: processes.num_processes]
    with tqdm(total=sum(map(len, own)), unit="image", desc="batch", disable=not processes.is_main_process) as bar:
        for group in own:
            if not drawn(group):
                images = job.draw(job.model.sample, group, **job.how)
                if npz:
                    pixels, part = plots.to_bytes(images), parts / f"{group[0]:08d}.npy"
                    checkpoints.write_atomically(part, lambda file, pixels=pixels: np.save(file, pixels))
                else:
                    job.save_singles(images, group, "images")
            bar.update(len(group))
    processes.wait_for_everyone()
    if processes.is_main_process:
        if missing := [group for group in chunks if not drawn(group)]:
            raise UserError(f"{parts} lacks the images from seed {missing[0][0]} on: can all machines write to it?", 1)
        if npz:
            final = job.path("images.npz")
            pixels = np.concatenate([np.load(parts / f"{group[0]:08d}.npy") for group in chunks])
            checkpoints.write_atomically(final, lambda file: np.savez(file, images=pixels, seeds=np.array(seeds)))
        job.finish(processes=processes.num_processes)
    return f"{len(seeds)} images: {'images.npz' if npz else 'images/'}"


def compare(job: Job) -> str:
    """Every sampler by step counts from the same seeds, one figure with the seconds that each took."""
    seeds = job.settings["seeds"][:4]
    names = [*SAMPLERS, *([job.sampler] if callable(job.sampler) else [])]
    counts = [steps for steps in COMPARED_STEPS if steps <= job.model.num_timesteps]
    how = {name: job.how[name] for name in ("spacing", "guidance")}
    tiles, labels, took = [], [], {}
    with job.precision():
        job.model.sample(len(seeds), steps=2 if job.model.num_timesteps > 1 else 1, seed=seeds)  # warms up
        for name in names:
            label = name if isinstance(name, str) else name.__name__
            for steps in counts:
                start = time.perf_counter()
                images = job.model.sample(len(seeds), sampler=name, steps=steps, seed=seeds, **how).float().cpu()
                took[f"{label} {steps}"] = round(time.perf_counter() - start, 3)
                tiles.append(make_grid(plots.enlarge(images, 80), 2, padding=1, pad_value=1.0))
                labels.append(f"{label} {steps}: {took[f'{label} {steps}']:.2f} s")
    title = f"seeds {', '.join(map(str, seeds))}; sampler, steps: seconds for {len(seeds)} images"
    figure = plots.labelled_grid(torch.stack(tiles), labels, columns=len(counts), title=title)
    job.save(figure, "compare.png", seeds=seeds)
    job.finish(seconds_by_sampler=took)
    return "compare.png"


def vary(job: Job) -> str:
    """Variations of an image."""
    seeds = job.settings["seeds"][:15]
    image, _ = picture(job, "image", seeds[0])
    images = job.draw(job.model.vary, seeds, image, job.settings["strength"], **job.how)
    labels = ["original", *(f"seed {seed}" for seed in seeds)]
    tiles = torch.cat([image[None].cpu(), images])
    job.save(plots.labelled_grid(tiles, labels, smallest=job.settings["tile"]), "variations.png", seeds=seeds)
    job.save_singles(images, seeds, "variations", "vary")
    job.finish()
    return "variations.png, single images in variations/"


def inpaint(job: Job) -> str:
    """Part of an image painted anew."""
    seeds = job.settings["seeds"][:14]
    image, _ = picture(job, "image", seeds[0])
    size, path = job.model.image_size, job.settings["mask"]
    if path:
        mask = read_mask(Path(path), Path(job.settings["image"]), size)
    else:
        mask = (torch.arange(size) >= size // 2).expand(size, size)
    images = job.draw(job.model.inpaint, seeds, image, mask, resamples=job.settings["resamples"], **job.how)
    hidden = torch.where(mask, torch.full_like(image.cpu(), 0.5), image.cpu())
    labels = ["original", "masked", *(f"seed {seed}" for seed in seeds)]
    tiles = torch.cat([image[None].cpu(), hidden[None], images])
    job.save(plots.labelled_grid(tiles, labels, smallest=job.settings["tile"]), "inpainted.png", seeds=seeds)
    job.save_singles(images, seeds, "inpainted", "inpaint")
    job.finish()
    return "inpainted.png, single images in inpainted/"


MODES: dict[str, Callable[[Job], str]] = {
    "samples": samples,
    "interpolate": interpolate,
    "progressive": progressive,
    "batch": batch,
    "compare": compare,
    "vary": vary,
    "inpaint": inpaint,
}


SETTINGS: dict[str, tuple[type, Setting, Any]] = {
    "MODE": (str, Setting("what to draw", choices=(*MODES, "all")), "samples"),
    "SAMPLER": (str, Setting(f"how to go from noise to image: {', '.join(SAMPLERS)}, or file.py:function"), SAMPLER),
    "STEPS": (int, Setting("network evaluations, 0: all timesteps for ddpm, else the model's own choice", 0), 0),
    "GUIDANCE": (float, Setting("weight of the model's guide, 1: none, 0: the model's own choice", 0, 10), 0.0),
    "SPACING": (str, Setting("which timesteps are visited", choices=tuple(SPACINGS)), SPACING),
    "ETA": (float, Setting("fresh noise in ddim: 0 none, 1 as much as ddpm", 0, 1), 0.0),
    "SEEDS": (str, Setting("seeds of the images, such as 0-63 or 3,7; the first --num_samples unless given"), ""),
    "NUM_SAMPLES": (int, Setting("images to draw", 1, 10_000_000), 16),
    "BATCH_SIZE": (int, Setting("images drawn at a time, 0: as many as fit", 0), 0),
    "NUM_STEPS": (int, Setting("images in an interpolation, both ends included", 2, 1000), 10),
    "STRENGTH": (float, Setting("how far vary goes back towards noise", 0.001, 1), 0.5),
    "RESAMPLES": (int, Setting("times that inpaint does each step", 1, 100), 5),
    "FORMAT": (str, Setting("what batch writes", choices=("png", "npz")), "png"),
    "USE_AMP": (bool, Setting("mixed precision"), False),
    "COMPILE_MODEL": (bool, Setting("compile the network: pays for thousands of images"), False),
    "CHANNELS_LAST": (bool, Setting("memory layout that convolutions of many channels like better"), False),
}  # fmt: skip
FILES = {
    "image": "for vary and inpaint: a file, a seed or data:INDEX of the training images (the first seed unless given)",
    "image1": "first end of interpolate: a file, a seed or data:INDEX (the first seed unless given)",
    "image2": "other end, likewise (the last seed unless given)",
    "mask": "for inpaint, as large as the image: white is painted anew (the right half unless given)",
}


def read_settings(description: str | None, defaults: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """The command line as one dictionary of plain values, and the folder for results."""
    parser = Parser(description)
    parser.add_argument("--checkpoint", help="a checkpoint or .safetensors file (default: the newest)")
    for name, text in FILES.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--from_png", type=Path, metavar="PNG", help="draws a picture of this script again")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help=f"where results go (default: {RESULTS})")
    for name, (kind, setting, default) in SETTINGS.items():
        parser.add_setting(name, kind, setting, defaults.get(name, default))
    given = parser.parse_args()
    if given.checkpoint == "":
        raise UserError("--checkpoint is given an empty name")
    if given.from_png:
        others = [name for name in ("checkpoint", *FILES) if getattr(given, name) is not None]
        if others := others + [name.lower() for name in SETTINGS if hasattr(given, name)]:
            raise UserError(f"--from_png draws a picture as it was drawn: leave out --{others[0]}")
        needed = {"checkpoint", "seeds", "sha256", "tile", "columns", *FILES, *map(str.lower, SETTINGS)} - {
            "num_samples"
        }
        return settings_of(given.from_png, needed), given.output_dir
    settings = {name: getattr(given, name) for name in ("checkpoint", *FILES)}
    for name, (kind, setting, default) in SETTINGS.items():
        value = getattr(given, name, defaults.get(name, default))
        settings[name.lower()] = setting.check(f"--{name.lower()}", value, kind)
    path = Path(settings["checkpoint"]) if settings["checkpoint"] else checkpoints.newest()
    count = settings.pop("num_samples")
    seeds = parse_seeds(settings["seeds"]) if settings["seeds"] else list(range(count))
    settings |= {"checkpoint": str(path), "seeds": seeds, "tile": defaults.get("TILE", plots.SMALLEST_TILE)}
    settings["columns"] = defaults.get("COLUMNS", 10)
    return settings | {"sha256": digest(path) if path.is_file() else ""}, given.output_dir


def label_of(settings: Mapping[str, Any]) -> str:
    """Name of the folder for results: checkpoint, sampler and its settings, seeds."""
    model, seeds = checkpoints.name_of(Path(settings["checkpoint"])), settings["seeds"]
    sampler = settings["sampler"].replace(".py:", "-").replace("/", "-")
    spacing = "" if settings["spacing"] == SPACING else f"-{settings['spacing']}"
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]}-{seeds[-1]}"
    return f"{model}-{sampler}-{settings['steps']}{spacing}-seeds-{span}"


def main(description: str | None = __doc__, defaults: Mapping[str, Any] | None = None) -> None:
    """Reads the command line, loads the model, draws; several processes share `batch`, the rest the first one does."""
    settings, output = read_settings(description, defaults or {})
    sampler = load_sampler(settings["sampler"])
    with together(lambda: "start the same command again") as processes:
        settings = from_first(settings)  # the newest checkpoint, if none was named, may be another by now
        device = processes.device if torch.cuda.is_available() else torch.device("cpu")
        model = DDPMModel().to(device).load_model(settings["checkpoint"])
        settings["batch_size"] = settings["batch_size"] or from_first(
            fitting_batch(model, settings["use_amp"])
        )  # before it is compiled
        for network in [model.unet] if model.guide is None else [model.unet, model.guide]:
            if settings["channels_last"]:
                network.to(memory_format=torch.channels_last)
            if settings["compile_model"]:
                model.cuda_graph = False
                network.compile()
        if not settings["steps"]:
            settings["steps"] = model.num_timesteps if sampler == "ddpm" else model.sampling_timesteps
        # says what is wrong before anything is drawn
        plan = model.plan(sampler, settings["steps"], settings["spacing"])
        nfe = model.evaluations(*plan, settings["guidance"] or None)
        checkpoints.check_writable(output)
        wanted = list(MODES) if settings["mode"] == "all" else [settings["mode"]]
        say_once(
            f"{settings['checkpoint']}: {model.image_size} px, {settings['sampler']}, {settings['steps']} steps, "
            f"{nfe} network evaluations an image, {device.type}"
        )
        if model.image_size < (defaults or {}).get("SMALLEST", 0):
            say_once(
                f"note: the figures are laid out for larger images; inference.py suits {model.image_size} px better"
            )
        if model.guide is None and settings["guidance"] not in (0, 1):
            say_once(f"note: this model has no guide, so --guidance {settings['guidance']:g} changes nothing")
        if settings["eta"] and sampler != "ddim":
            say_once(f"note: --eta is for --sampler ddim, {settings['sampler']} does without")
        if processes.num_processes > 1 and "batch" not in wanted:
            say_once(f"note: one process draws this; {processes.num_processes} processes share --mode batch alone")
        for mode in wanted:
            if mode != "batch" and not processes.is_main_process:
                continue
            start = time.perf_counter()
            mine = settings | {"mode": mode}
            folder = output / f"{mode}-{label_of(mine)}"
            # batch goes on in a folder of its own settings, and says so of another's
            job = Job(model, mine, folder if mode == "batch" else own_folder(folder, mine), sampler)
            say_once(f"{mode}: {MODES[mode](job)} ({time.perf_counter() - start:.1f} s) in {job.folder}/")


if __name__ == "__main__":
    run(main)

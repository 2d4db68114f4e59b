"""README and docs/: their Python runs as printed; what they name and link to exists."""

import argparse
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import train
import train_optimized
from config import CPU_PRESETS, Tier, resolve, tier_for_memory
from ddpm_model import DDPMModel
from engine import checkpoints
from engine.datasets import ARCHIVES
from engine.inference_jobs import load_sampler
from engine.optimizer import Adam
from tests.helpers import CPU_TIER, LARGE_TIER, ROOT

README = ROOT / "README.md"
README_ZH = ROOT / "README.zh-CN.md"
PAGES = [README, README_ZH, ROOT / "weights" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ["setup", *(p.stem for p in ROOT.glob("*.py") if "run_script(" in p.read_text("utf-8"))]
MAX_README_LINES = 170
MAX_IMAGE_BYTES = 300_000
MIN_MODULE_LINES = 20  # of a module that is more than another's former name
TINY = '"MAX_STEPS": 2, "NUM_SAMPLE_GRIDS": 1, "GRID_IMAGES": 2, "SAMPLING_TIMESTEPS": 2'


# Of what the examples make with the model of the fixture `folder`.
SHAPES = {
    "images": (16, 3, 8, 8), "cats": (16, 3, 8, 8), "trajectory": (1, 3, 3, 8, 8),
    "between": (10, 3, 8, 8), "variations": (4, 3, 8, 8), "inpainted": (1, 3, 8, 8),
    "many": (3, 3, 8, 8), "enlarged": (64, 3, 16, 16),
}  # fmt: skip


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The commands in a page's shell blocks, each in one line without its comment."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [re.sub(r"(^|\s+)#.*", "", line).split("&&") for line in lines]
    return [command.strip() for part in parts for command in part if command.strip()]


PYTHON_BLOCKS = [
    (page, block) for page in PAGES if page != README_ZH for block in blocks(page, "python")
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with a tiny model in place of the pretrained one and of a finished run's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoints, "PRETRAINED_DIR", tmp_path / "weights")
    torch.manual_seed(0)
    size = {"image_size": 8, "dim": 8, "dim_mults": (1, 2)}
    classes = dict.fromkeys(ARCHIVES["cifar10"].class_names, 1)
    model = DDPMModel(**size, timesteps=20, sampling_timesteps=2, class_counts=classes)
    model.save_model("weights/cifar10.safetensors")
    model.save_model("checkpoints/ddpm_final.pt")
    return tmp_path


def execute(block: str, monkeypatch) -> dict:
    """Runs a block as a file, at toy size; returns what it defines."""
    monkeypatch.setitem(CPU_PRESETS, "shapes", {})
    block = re.sub(r"total_samples=\d+", "total_samples=3", block)
    block = re.sub(r'"MAX_STEPS": \d+', TINY, block)
    name = re.match(r"# (\w+\.py)\n", block)
    path = Path(name[1] if name else "block.py")
    path.write_text(block, encoding="utf-8")
    return runpy.run_path(str(path), run_name="__main__")


def block_with(mark: str) -> str:
    """The one Python block that contains a text."""
    (block,) = {block for _, block in PYTHON_BLOCKS if mark in block}
    return block


# Python.


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=page.name) for page, b in PYTHON_BLOCKS if "def main" not in b],
)
def test_python_block_runs_as_printed(block, folder, monkeypatch):
    names = execute(block, monkeypatch)
    shapes = SHAPES | ({"images": (64, 3, 8, 8)} if "enlarged" in names else {})  # the banner
    for name in shapes.keys() & names.keys():
        assert names[name].shape == shapes[name], name


@pytest.mark.parametrize("name", ["my_data", "my_loss", "my_network", "my_optimizer"])
def test_extending_example_trains_a_model(name, folder, monkeypatch):
    monkeypatch.setattr("engine.train_step.Adam", Adam)  # restored after the optimizer example
    names = execute(block_with(f"# {name}.py"), monkeypatch)
    (run,) = [path.parent for path in Path("checkpoints").glob("*/final.pt")]
    state = torch.load(run / "final.pt", weights_only=True)
    assert state["progress"]["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())
    assert (set(state["optimizer"]["adam"]) == {"exp_avg"}) == (name == "my_optimizer")
    loads_as = names.get("ResNetModel", DDPMModel)
    assert loads_as.from_file(run / "final.pt").image_size == 16


def test_loss_example_has_another_loss(folder, monkeypatch):
    huber = execute(block_with("class HuberModel").split("def main")[0], monkeypatch)["HuberModel"]
    model = huber(image_size=16, dim=8, dim_mults=(1, 2))
    images, noise = torch.rand(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    t = torch.tensor([100, 300, 600, 900])
    x_0 = images * 2 - 1
    output = model.unet(model.diffusion.q_sample(x_0, t, noise), t)
    error = output - model.diffusion.predict_v(x_0, t, noise)
    per_image = (error.square() + 0.1**2).sqrt().sub(0.1).mean(dim=(1, 2, 3))
    expected = (per_image * model.diffusion.loss_weight[t]).mean()
    torch.testing.assert_close(model(images, t, noise), expected)


def test_optimizer_example_skips_updates_that_are_not_finite(folder, monkeypatch):
    lion = execute(block_with("class Lion").split("def main")[0], monkeypatch)["Lion"]
    params, one, zero = torch.ones(4), torch.tensor(1.0), torch.tensor(0.0)
    optimizer = lion(params)
    optimizer.update(params, torch.full((4,), torch.nan), torch.tensor(0.1), one, zero)
    assert (params == 1).all() and (optimizer.exp_avg == 0).all()
    optimizer.update(params, torch.tensor([2.0, 1, -1, -2]), torch.tensor(0.1), one, one)
    torch.testing.assert_close(params, torch.tensor([0.9, 0.9, 1.1, 1.1]))


def test_sampler_example_works_by_file_name(folder, monkeypatch):
    execute(block_with("def restless_ddim"), monkeypatch)
    sampler = load_sampler("my_sampler.py:restless_ddim")
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2))
    assert model.sample(batch_size=2, sampler=sampler, steps=20, seed=0).isfinite().all()

    # Where x_0 is always 0.4, all noise is 1 at the start and the new noise is 2.
    class Denoiser:
        alpha_bar = torch.linspace(0.9, 0.1, 1000, dtype=torch.float64)

        def __call__(self, x, t):
            return torch.full_like(x, 0.4)

    def x_at(alpha_bar: float, noise: float) -> torch.Tensor:
        return torch.tensor([0.4 * alpha_bar**0.5 + noise * (1 - alpha_bar) ** 0.5]).double()

    a = Denoiser.alpha_bar
    states = sampler(Denoiser(), x_at(a[999], 1), [999, 700, 400, -1], lambda x: 2 * x**0)
    expected = [x_at(a[700], 0.8 + 1.2), x_at(a[400], 0.8 + 1.2), x_at(1, 0)]
    torch.testing.assert_close([x for x, _ in states], expected)


def test_subclass_example_configures_its_command(folder):
    Path("my_config.py").write_text(block_with("class MyConfig"))
    (command,) = [c for c in commands(ROOT / "docs" / "configuration.md") if "--config" in c]
    request = train.parse_command_line("", train_optimized.DEFAULTS, shlex.split(command)[2:])
    layers = (request.defaults, request.subclass, request.flags)
    config = resolve("folder", LARGE_TIER, *layers)
    assert (config.IMAGE_SIZE, config.DIM, config.EPOCHS, config.BATCH_SIZE) == (64, 48, 100, 16)
    assert config.set_by["DIM"] == "MyConfig" and config.set_by["BATCH_SIZE"] == "flag"


# Commands and flags.


class ParserCaptured(Exception):
    """Carries the parser of a script that was about to parse its command line."""


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """The flags of every script, and of the launchers, by name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:

        def capture(parser, *args, **kwargs):
            raise ParserCaptured(parser)

        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        patch.setattr(sys, "argv", ["script"])
        for script in SCRIPTS:
            module = importlib.import_module(script)
            with pytest.raises(ParserCaptured) as captured:
                (module.main if hasattr(module, "main") else train.main)()
            found[script] = options_of(captured.value.args[0])
    found["torchrun"] = options_of(get_args_parser())
    found["accelerate"] = options_of(launch_command_parser())
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}


def test_every_flag_of_a_command_exists(flags):
    known_tools = {"pip", "python", "tensorboard", *flags}
    for page in PAGES:
        for command in commands(page):
            owner = ""
            for word in shlex.split(command.replace("$(", "").replace(")", "")):
                if word.removesuffix(".py") in known_tools:
                    owner = word.removesuffix(".py")
                elif word.startswith("--") and owner in flags:
                    assert word.split("=")[0] in flags[owner], f"{page.name}: {command}"


def test_every_flag_in_the_text_exists(flags):
    foreign = {"--logdir", "--gpus", "--rm", "--user"}  # TensorBoard's, Docker's
    foreign |= {"--no-deps"}  # pip's
    known = set().union(*flags.values()) | foreign
    for page in PAGES:
        text = re.sub(r"^#SBATCH.*", "", text_of(page), flags=re.MULTILINE)
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)):
            assert flag in known, f"{page.name}: {flag}"


def test_every_python_file_in_the_text_exists():
    for page in PAGES:
        for name in set(re.findall(r"\w+\.py\b", text_of(page))):
            exists = (ROOT / name).is_file() or (ROOT / "engine" / name).is_file()
            assert exists or name.startswith("my_"), f"{page.name}: {name}"


def test_old_names_in_the_configuration_page_are_aliases(flags):
    rows = re.findall(
        r"^\| `(--\w+)`.* \| `(--\w+)` \|$", text_of(ROOT / "docs/configuration.md"), re.M
    )
    assert len(rows) >= 8
    for old, new in rows:
        assert any(old in options and new in options for options in flags.values()), (old, new)


# Presets.


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the table of docs/ with a heading, by the first cell; without backquotes."""
    text = text_of(ROOT / "docs" / page).replace("`", "")
    rows = re.search(rf"^\| {heading} \|.*\n\|[ |-]*\n((?:\|.*\n)+)", text, re.M)[1]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()]
    return {first: others for first, *others in cells}


def test_presets_are_those_of_the_configuration_page():
    def preset(dataset: str, tier: Tier = LARGE_TIER, **flags) -> list[str]:
        config = resolve(dataset, tier, flags=flags)
        effective = config.BATCH_SIZE * config.GRADIENT_ACCUMULATION
        mults = ",".join(map(str, config.DIM_MULTS))
        return [str(config.IMAGE_SIZE), str(config.DIM), mults, str(effective)]

    rows = table("configuration.md", "preset")
    assert rows.pop("below 64 px, cifar10") == preset("cifar10")
    assert rows.pop("at 64 px and above, celeba") == preset("celeba")
    assert rows.pop("at 96 px and above, stl10") == preset("stl10")
    assert rows.pop("at 128 px and above") == ["", *preset("folder", IMAGE_SIZE=128)[1:]]
    # Without a GPU, shapes have what is in parentheses.
    both = zip(preset("shapes"), preset("shapes", CPU_TIER), strict=True)
    shown = [f"{on_gpu} ({on_cpu})" for on_gpu, on_cpu in both]
    assert [cell.replace(" without a GPU", "") for cell in rows.pop("shapes")] == shown
    assert set(rows) == {"folder"}


def test_tiers_are_those_of_the_configuration_page():
    rows = table("configuration.md", "GPU memory").values()
    found = [tier_for_memory(gib) for gib in (3, 6, 12, 24)] + [CPU_TIER]
    assert [[tier.name, str(tier.dim)] for tier in found] == [*rows]


def test_high_resolution_settings_are_those_of_their_page():
    rows = {name: cells[0] for name, cells in table("high_resolution.md", "setting").items()}
    for size in (64, 96, 128):
        config = resolve("folder", LARGE_TIER, flags={"IMAGE_SIZE": size})
        for name in ("schedule_base_size", "full_attention_max_size", "dropout", "weight_decay"):
            assert float(rows[f"--{name}"]) == getattr(config, name.upper())
        guide = f"{config.GUIDE_FRACTION}, {config.GUIDANCE:g}"
        assert rows["--guide_fraction, --guidance"] == guide
        interval = f"{config.GUIDANCE_MIN_SIGMA:g}, {config.GUIDANCE_MAX_SIGMA:g}"
        names = "--guidance_min_sigma, --guidance_max_sigma, --sampling_timesteps"
        assert rows[names] == f"{interval}, {config.SAMPLING_TIMESTEPS}"
        flags = {"IMAGE_SIZE": size, "CLASS_CONDITIONAL": True}
        labeled = resolve("folder", LARGE_TIER, flags=flags)
        guidance = f"{labeled.GUIDANCE_MODE}, {labeled.GUIDANCE:g}"
        assert rows["--guidance_mode, --guidance, with classes"] == guidance
        rate, large_rate = map(float, re.findall(r"\de-\d", rows["--learning_rate"]))
        assert config.LEARNING_RATE == (rate if size == 64 else large_rate)


def test_lengths_of_runs_are_documented_and_shapes_are_not_mirrored():
    text = text_of(ROOT / "docs" / "training.md")
    epochs = {name: int(n) for n, name in re.findall(r"(\d+) (?:epochs )?on `(\w+)`", text)}
    assert set(epochs) == {"cifar10", "shapes"}
    for name, number in epochs.items():
        assert resolve(name, LARGE_TIER).EPOCHS == number
    minutes = re.search(r"([\d.]+) minutes without a GPU", text)[1]
    assert resolve("shapes", CPU_TIER).MINUTES == float(minutes)
    others = int(re.search(r"(\d+) on anything\s+else", text)[1])
    assert {resolve(name, LARGE_TIER).EPOCHS for name in ("celeba", "stl10", "folder")} == {others}
    is_mirrored = {n: resolve(n, LARGE_TIER).HORIZONTAL_FLIP for n in ("cifar10", "shapes")}
    assert is_mirrored == {"cifar10": True, "shapes": False}


# Pages.


def test_readmes_name_the_same_commands():
    inline = [
        re.findall(r"`(python [^`]+|pip [^`]+)`", text_of(page)) for page in (README, README_ZH)
    ]
    assert commands(README) == commands(README_ZH)
    assert sorted(inline[0]) == sorted(inline[1])


def test_readmes_have_the_same_python():
    english, chinese = (
        [re.sub(r"#.*", "", block) for block in blocks(page, "python")]
        for page in (README, README_ZH)
    )
    assert english == chinese


@pytest.mark.parametrize("page", [README, README_ZH], ids=lambda page: page.name)
def test_readme_is_short_and_links_to_the_other_language(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= MAX_README_LINES
    other = README_ZH if page == README else README
    assert f"({other.name})" in lines[0]


def test_readme_has_the_pretrained_models_number_of_states():
    model = DDPMModel.from_pretrained("cifar10")
    shape = (1, model.sampling_timesteps + 1, *model.image_shape)  # x_T and after each step
    for page in (README, README_ZH):
        assert f"return_all_timesteps=True)  # {shape}" in text_of(page)


def test_readme_links_to_every_page_of_docs():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text_of(README), page.name
        assert f"(docs/{page.name})" in text_of(README_ZH), page.name


@pytest.mark.parametrize("page", [README, README_ZH], ids=lambda page: page.name)
def test_readme_layout_names_every_engine_file(page):
    layout = re.search(r"^```\nconfig\.py.*?^```", text_of(page), re.DOTALL | re.MULTILINE)[0]
    for path in (ROOT / "engine").glob("*.py"):
        is_alias = len(text_of(path).splitlines()) < MIN_MODULE_LINES
        assert is_alias or path.name in layout, path.name


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_images_are_small_and_used():
    text = "".join(map(text_of, PAGES))
    for path in (ROOT / "docs" / "images").iterdir():
        assert path.stat().st_size <= MAX_IMAGE_BYTES, path.name
        assert f"images/{path.name})" in text, path.name

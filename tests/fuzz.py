"""Gives the scripts inputs that are damaged at random, and checks how each run ends.

    python -m tests.fuzz

Each input must end with one line `error: ...` and exit code 2, or be usable (exit code 0); files
that were there before must be as they were. Prints a row for each kind of input; exit code 1 if
any run ended otherwise.
"""

import argparse
import contextlib
import copy
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from engine.cli import run_script

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from config import DDPMConfig
from ddpm_model import DDPMModel
from evaluate import EvaluationSettings
from inference import InferenceSettings
from tests.helpers import TINY_FLAGS

JUNK = [
    None, True, -1, 0, 3, 2.5, 10**12, float("nan"), "", "abc", "../x", [], [1, 2], {}, {"a": 1},
    torch.zeros(2), torch.zeros(2, 2, dtype=torch.int8),
]  # fmt: skip
TEXT_JUNK = [
    "", "abc", "-1", "0", "1e99", "nan", "inf", "1,2,x", "0-0-0", "9" * 30, "\u00e9", "a/../b",
    "[]", "None", "2.5", "-", ":", "--", "1" * 300,
]  # fmt: skip
# What a model of four steps is sampled and evaluated with.
SAMPLE = ["inference.py", "--num_samples", "2", "--steps", "2", "--batch_size", "2"]
EVALUATE = ["evaluate.py", "--num_samples", "2", "--steps", "2"]
VS_REAL = ["--dataset", "folder", "--data_dir", "real"]
DATA = ["train.py", *TINY_FLAGS[2:], "--dataset", "folder", "--max_steps", "1", "--dry_run"]
Command = list[str]  # the script and its arguments


def run(command: Command, environment: dict[str, str] | None = None) -> tuple[int | str, str]:
    """Runs a script in this process; returns its exit code, or the exception, and stderr."""
    errors = io.StringIO()
    before, argv = dict(os.environ), sys.argv
    os.environ.update(environment or {})
    sys.argv = command
    module = importlib.import_module(command[0].removesuffix(".py"))
    code: int | str = "did not exit"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            run_script(module.main)
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:  # whatever escapes is what is looked for
        code = traceback.format_exc()
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.argv = argv
    return code, errors.getvalue()


def prepare() -> None:
    """Makes a finished run, its model as .safetensors, a sample of it and some real images."""
    flags = ["--run_name", "whole", "--max_steps", "4"]
    assert run(["train.py", *TINY_FLAGS, *flags])[0] == 0
    DDPMModel.from_file("checkpoints/whole/last.pt").save_model("model.safetensors")
    assert run([*SAMPLE, "--output_dir", "sampled"])[0] == 0
    shutil.copy(next(Path("sampled").rglob("0*.png")), "sample.png")
    for i in range(40):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Path("real").mkdir(exist_ok=True)
        Image.fromarray(noise).save(f"real/{i:02}.png")


# Inputs: each writes below `fuzz/` and returns the command that reads it.


def damage(content: bytes, rng: random.Random) -> bytes:
    """Cuts a file, flips a bit, overwrites a part, or replaces all of it."""
    data = bytearray(content)
    position = rng.randrange(len(data))
    kind = rng.choice(["cut", "bit", "burst", "random", "empty", "text"])
    if kind == "cut":
        return bytes(data[:position])
    if kind == "bit":
        data[position] ^= 1 << rng.randrange(8)
    elif kind == "burst":
        data[position : position + 60] = rng.randbytes(60)
    else:
        other = {"random": rng.randbytes(rng.randrange(1, 5000)), "empty": b"", "text": b"hello\n"}
        return other[kind]
    return bytes(data)


def damaged_weights(rng: random.Random) -> Command:
    name = rng.choice(["checkpoints/whole/last.pt", "model.safetensors"])
    path = Path("fuzz", Path(name).name)
    path.write_bytes(damage(Path(name).read_bytes(), rng))
    return [*(SAMPLE if rng.random() < 0.7 else [*EVALUATE, *VS_REAL]), "--checkpoint", str(path)]


def changed_checkpoint(rng: random.Random) -> Command:
    """A valid file of which one part is missing or of another type."""
    state = torch.load("checkpoints/whole/last.pt", weights_only=True)
    part = state = copy.deepcopy(state)
    key = rng.choice(list(state))
    while isinstance(part[key], dict) and part[key] and rng.random() < 0.7:
        part = part[key]
        key = rng.choice(list(part))
    if rng.random() < 0.3:
        del part[key]
    else:
        part[key] = rng.choice(JUNK)
    folder = Path("checkpoints/changed")
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "last.pt")
    resume = ["train.py", "--resume", "changed", "--max_steps", "5"]
    return rng.choice([resume, [*SAMPLE, "--checkpoint", str(folder / "last.pt")]])


def changed_png(rng: random.Random) -> Command:
    """A sample whose metadata has another value, or that is damaged."""
    path = Path("fuzz/sample.png")
    if rng.random() < 0.3:
        path.write_bytes(damage(Path("sample.png").read_bytes(), rng))
        return [*SAMPLE[:1], "--from_png", str(path)]
    image = Image.open("sample.png")
    info = PngImagePlugin.PngInfo()
    changed = rng.choice(list(image.text))
    for key, value in image.text.items():
        if key != changed:
            info.add_text(key, value)
        elif value.startswith("{") and rng.random() < 0.8:  # one entry of the JSON
            entries = json.loads(value)
            entries[rng.choice(list(entries))] = rng.choice(JUNK[:-2])
            info.add_text(key, json.dumps(entries))
        elif rng.random() < 0.8:
            info.add_text(key, rng.choice(TEXT_JUNK))
    image.save(path, pnginfo=info)
    return [*SAMPLE[:1], "--from_png", str(path)]


def odd_array(rng: random.Random) -> Command:
    """Arrays of any type and shape, whole or damaged."""
    path = Path("fuzz") / rng.choice(["images.npz", "images.npy"])
    shape = tuple(rng.choice([0, 1, 3, 4, 8, 40]) for _ in range(rng.randrange(6)))
    kind = rng.choice(["uint8", "int32", "float32", "complex64", "bool", "<U3", "datetime64[s]"])
    array = np.zeros(shape, kind)
    if kind == "float32" and array.size:
        array.flat[0] = rng.choice([np.nan, np.inf, 1e38, -1])
    if path.suffix == ".npz":
        np.savez(path, **rng.choice([{}, {"images": array}, {"a": array, "b": array[..., None]}]))
    else:
        np.save(path, array)
    if rng.random() < 0.3:
        path.write_bytes(damage(path.read_bytes(), rng))
    evaluate = [*EVALUATE[:1], "--images", str(path), *VS_REAL]
    vary = [*SAMPLE, "--checkpoint", "checkpoints/whole/last.pt", "--mode", "vary"]
    return rng.choice([[*DATA, "--data_dir", str(path)], evaluate, [*vary, "--image", str(path)]])


def odd_folder(rng: random.Random) -> Command:
    """Few images, of other modes, damaged, or something else by their names."""
    folder = Path("fuzz/images")
    folder.mkdir()
    for i in range(rng.choice([0, 1, 3, 40])):
        mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
        size = rng.choice([(1, 1), (8, 8), (30, 9), (2, 64)])
        suffix = rng.choice(["png", "tiff", "gif", "jpg", "webp"])
        path = folder / f"{i}.{suffix}"
        with contextlib.suppress(Exception):  # not every format has every mode
            Image.new(mode, size).save(path)
        if not path.exists() or rng.random() < 0.3:
            content = path.read_bytes() if path.exists() else b"x"
            path.write_bytes(damage(content or b"x", rng))
    evaluate = [*EVALUATE[:1], "--images", str(folder), *VS_REAL]
    return rng.choice([[*DATA, "--data_dir", str(folder)], evaluate])


def damaged_leftover(rng: random.Random) -> Command:
    """A damaged file that the project wrote itself: cache, log of metrics, reference statistics."""
    files = [p for p in Path("data/cache").glob("*") if p.is_file()]
    path = rng.choice([*files, Path("samples/changed/metrics.jsonl")])
    path.parent.mkdir(exist_ok=True, parents=True)
    whole = path if path.exists() else Path("samples/whole/metrics.jsonl")
    path.write_bytes(damage(whole.read_bytes() or b"x", rng))
    Path("checkpoints/changed").mkdir(exist_ok=True)
    state = torch.load("checkpoints/whole/last.pt", weights_only=True)
    torch.save(state | {"run": "changed"}, "checkpoints/changed/last.pt")
    resume = ["train.py", "--resume", "changed", "--max_steps", "5"]
    return rng.choice([resume, [*DATA, "--data_dir", "real"]])


def odd_flag(rng: random.Random) -> Command:
    """A value that a flag does not take, or a flag that does not exist."""
    command, settings = rng.choice([
        ([*DATA, "--data_dir", "real"], DDPMConfig),
        ([*SAMPLE, "--checkpoint", "checkpoints/whole/last.pt"], InferenceSettings),
        ([*EVALUATE, *VS_REAL, "--checkpoint", "checkpoints/whole/last.pt"], EvaluationSettings),
    ])  # fmt: skip
    name = rng.choice(list(settings.settings())).lower()
    if rng.random() < 0.2:
        name = name[:-1] + rng.choice("xyz")
    return [*command, f"--{name}={rng.choice(TEXT_JUNK)}"]


KINDS: list[Callable[[random.Random], Command]] = [
    damaged_weights, changed_checkpoint, changed_png, odd_array, odd_folder, damaged_leftover,
    odd_flag,
]  # fmt: skip


def launcher_variables(rng: random.Random) -> dict[str, str]:
    """Variables of a launcher, of which some are missing or nonsense."""
    names = rng.sample(["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"], 2)
    return {name: rng.choice(["0", "2", "-1", "abc", ""]) for name in names}


# The run.


def checksums() -> dict[str, str]:
    """Checksums of what must stay: the whole run, its samples and the real images."""
    paths = [Path("model.safetensors"), Path("sample.png"), *Path("real").iterdir()]
    paths += [p for p in Path("checkpoints/whole").glob("*.pt")]
    paths += [Path("samples/whole/metrics.jsonl")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def judge(code: int | str, errors: str) -> str:
    """Returns `refused`, `usable`, or what is wrong with the end of a run."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    if isinstance(code, str) or "Traceback" in errors:
        return f"traceback: {code}\n{errors[-1500:]}"
    if code == 2 and len(lines) == 1:
        return "refused"
    if code == 0 and not lines:
        return "usable"
    return f"exit code {code} with {len(lines)} error lines: {errors[-500:]}"


def fuzz(count: int, seed: int, only: str = "") -> list[str]:
    """Runs `count` inputs in the current folder; prints a table and returns what went wrong."""
    warnings.simplefilter("ignore")
    prepare()
    expected = checksums()
    kinds = [kind for kind in (*KINDS, launcher_variables) if only in kind.__name__]
    outcomes: Counter[tuple[str, str]] = Counter()
    failures = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        kind = kinds[number % len(kinds)]
        for folder in ("fuzz", "checkpoints/changed", "samples/changed"):
            shutil.rmtree(folder, ignore_errors=True)
        Path("fuzz").mkdir()
        if kind is launcher_variables:
            command, environment = [*DATA, "--data_dir", "real"], launcher_variables(rng)
        else:
            command, environment = kind(rng), {}
        verdict = judge(*run(command, environment))
        if checksums() != expected:
            verdict = "lost or changed files"
            prepare()
        outcomes[kind.__name__, verdict if verdict in ("refused", "usable") else "wrong"] += 1
        if verdict not in ("refused", "usable"):
            failures.append(f"input {number} ({kind.__name__}): {environment} {command}\n{verdict}")
            print(failures[-1], flush=True)

    columns = ("refused", "usable", "wrong")
    print(f"{'kind':20}" + "".join(f"{name:>10}" for name in columns))
    for kind in kinds:
        print(f"{kind.__name__:20}" + "".join(f"{outcomes[kind.__name__, c]:10}" for c in columns))
    return failures


def main() -> None:
    """Runs the inputs in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=800, help="number of inputs")
    parser.add_argument("--seed", type=int, default=0, help="what all inputs are a function of")
    parser.add_argument("--only", default="", help="kinds of input whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        failures = fuzz(options.count, options.seed, options.only)
        os.chdir("/")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

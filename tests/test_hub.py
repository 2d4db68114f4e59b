"""Models as folders, and a server that speaks as much of the Hub's protocol as is needed."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddpm_model import DDPMModel
from engine import plots
from engine.errors import UserError
from tests.helpers import ROOT, max_weight_difference

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model() -> DDPMModel:
    """A tiny model with a guide, as if loaded from a run's checkpoint."""
    torch.manual_seed(0)
    model = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), timesteps=20, sampling_timesteps=2)
    model.snapshot_guide()
    model.training_info = {
        "config": {"DATASET": "shapes", "DATA_DIR": "/home/me", "DIM_MULTS": (1, 2)},
        "progress": {"step": 1200, "images": 19_200, "seconds": 90.0, "best": 0.12345},
    }
    return model.eval()


# Folders.


def test_save_pretrained_writes_what_from_pretrained_loads(model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    names = {path.name for path in (tmp_path / "mine").iterdir()}
    assert names == {"model.safetensors", "config.json", "samples.png", "README.md"}
    loaded = DDPMModel.from_pretrained(tmp_path / "mine")
    assert max_weight_difference(loaded, model) == 0 and not loaded.training
    assert torch.equal(loaded.sample(2, seed=0), model.sample(2, seed=0))
    assert loaded.training_info["progress"] == model.training_info["progress"]
    assert loaded.training_info["config"] == {"DATASET": "shapes", "DIM_MULTS": [1, 2]}


def test_model_card_has_grid_recipe_figures_and_license_but_no_local_path(model, tmp_path):
    folder = tmp_path / "mine"
    model.save_pretrained(folder, license="cc0-1.0", figures={"FID": 4.13})
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc0-1.0\n")
    assert "| FID | 4.13 |" in card and "| 0.1235 |" in card
    assert "1,200 steps on 19,200 images in 1.5 minutes" in card
    assert re.search(r"^DATASET +shapes$", card, re.M)
    assert "/home/me" not in card + (folder / "config.json").read_text()
    (grid,) = re.findall(r"!\[.*\]\((.*)\)", card)
    expected = plots.grid(model.sample(16, seed=0))
    assert Image.open(folder / grid).tobytes() == expected.tobytes()


def test_model_card_names_classes_and_no_absolute_path_of_a_data_set(model, tmp_path):
    classes = {"cat": 3, "dog": 1}
    conditional = DDPMModel(image_size=8, dim=8, dim_mults=(1, 2), class_counts=classes)
    conditional.training_info = model.training_info | {"config": {"DATASET": "hf:/home/me/pets"}}
    conditional.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "and the classes cat, dog." in card
    assert re.search(r"^DATASET +hf:pets$", card, re.M)
    assert DDPMModel.from_pretrained(tmp_path).class_names == ("cat", "dog")


def test_model_card_names_the_folder_that_is_the_working_one(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(".")
    assert f"# {tmp_path.name}\n" in Path("README.md").read_text()


def test_model_without_a_run_has_a_card_too(tmp_path):
    DDPMModel(image_size=8, dim=8, dim_mults=(1, 2)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "None were measured." in card and re.search(r"^dim +8$", card, re.M)


def test_model_of_two_channels_is_shown_by_its_first(tmp_path):
    model = DDPMModel(8, dim=8, dim_mults=(1, 2), channels=2, sampling_timesteps=2)
    model.save_pretrained(tmp_path / "two")
    assert Image.open(tmp_path / "two/samples.png").mode == "L"
    same = DDPMModel.from_pretrained(tmp_path / "two")
    assert torch.equal(same.sample(1, seed=0), model.sample(1, seed=0))


def test_folder_is_loaded_and_not_a_file_of_its_name(model, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    for weight in model.parameters():
        weight.data += 1
    model.save_model(tmp_path / "mine.safetensors")
    loaded = DDPMModel.from_pretrained(tmp_path / "mine")
    assert max_weight_difference(loaded, model) > 0.9


def test_from_pretrained_says_what_is_wrong_with_a_folder(model, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*model\.safetensors"):
        DDPMModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a folder of save_pretrained.* with from_file$"):
        DDPMModel.from_pretrained(tmp_path)
    (tmp_path / "final.pt").touch()
    with pytest.raises(UserError, match=r"final\.pt is a file\. Load it with from_file"):
        DDPMModel.from_pretrained(tmp_path / "final.pt")
    with pytest.raises(UserError, match=r"choose from cifar10, cifar10-tuned, a folder"):
        DDPMModel.from_pretrained("/nowhere/at/all")
    model.save_pretrained(tmp_path)
    for text in ("no json", "[" * 100_000, "[]", '{"training_info": {"config": 1}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            DDPMModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "progress", "message"),
    [({"VALUE_RANGE": 5}, {}, "VALUE_RANGE is 5, but must be text"),
     ({}, {"best": "low"}, "best is 'low', but must be a number")],
)  # fmt: skip
def test_from_pretrained_refuses_settings_of_other_types(
    model, tmp_path, config, progress, message
):
    model.training_info = {"config": config, "progress": {}}
    model.save_pretrained(tmp_path)
    info = {"config": config, "progress": progress}
    (tmp_path / "config.json").write_text(json.dumps({"training_info": info}))
    with pytest.raises(UserError, match=rf"config\.json: {message}"):
        DDPMModel.from_pretrained(tmp_path)


def test_model_card_leaves_out_how_long_training_took_if_that_is_not_known(model, tmp_path):
    model.training_info["progress"] = {"step": 5, "best": 0.5}
    model.save_pretrained(tmp_path)
    assert " steps on " not in (tmp_path / "README.md").read_text()


# The Hub.


class Hub(BaseHTTPRequestHandler):
    """Repositories of one commit: create, upload (by Git, not Xet), list, download."""

    protocol_version = "HTTP/1.1"

    def reply(self, body: bytes | dict | list, status: int = 200, **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        headers |= {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.body()
        if self.headers["Authorization"] != "Bearer hf_secret":
            return self.reply({"error": "Invalid credentials"}, 401)
        if self.path == "/api/repos/create":
            options = json.loads(body)
            name = "{organization}/{name}".format(**options)
            self.server.repos.setdefault(name, {})
            self.server.created[name] = options
            return self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        if self.path == "/api/validate-yaml":  # of the card
            assert "license: mit" in json.loads(body)["content"]
            return self.reply({"errors": [], "warnings": []})
        repo = re.search(r"/(\w+/\w+)[./]", self.path.removeprefix("/api/models"))[1]
        if "/preupload/" in self.path:
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            files = [plain | {"path": file["path"]} for file in json.loads(body)["files"]]
            return self.reply({"files": files})
        for line in map(json.loads, body.splitlines()):  # a commit
            value = line["value"]
            if line["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
        return self.reply({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/((?:datasets/)?\w+/\w+)/resolve/\w+/(.+)", path)
        listing = re.fullmatch(r"/api/(datasets/\w+/\w+)(?:/revision/\w+|(/tree/)\w+/?(.*))?", path)
        repo = self.server.repos.get((match or listing or [0, 0])[1])
        if repo is None:
            return self.reply({}, 404, X_Error_Code="RepoNotFound")
        if listing and not listing[2]:
            files = [{"rfilename": name} for name in repo]
            return self.reply({"id": listing[1][9:], "sha": COMMIT, "siblings": files})
        if listing:
            file = {"type": "file", "oid": COMMIT}
            names = [name for name in repo if name.startswith(listing[3])]
            return self.reply([file | {"path": n, "size": len(repo[n])} for n in names])
        if match[2] not in repo:
            return self.reply({}, 404, X_Error_Code="EntryNotFound")
        content = repo[match[2]]
        return self.reply(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"')

    do_HEAD = do_GET


@pytest.fixture
def hub():
    """The server, running."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = {}
    server.created = {}  # with which options
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def run_client(code: str, hub: ThreadingHTTPServer, folder: Path) -> list[str]:
    """Runs Python as a user of this Hub in a new process; returns the lines that it prints."""
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_secret",
        "HF_HOME": str(folder / "cache"), "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


CLIENT = """
import sys
from ddpm_model import DDPMModel
from engine.errors import UserError

model = DDPMModel.from_pretrained("mine")
print(model.push_to_hub("me/tiny", private=True))
DDPMModel.from_pretrained("me/tiny").save_model("loaded.safetensors")
for use in (DDPMModel.from_pretrained, model.push_to_hub):
    try:
        use("me/missing" if use == DDPMModel.from_pretrained else "not a name")
    except UserError as error:
        print("error:", error)
"""


def test_model_goes_to_the_hub_and_comes_back(model, hub, tmp_path):
    model.save_pretrained(tmp_path / "mine")
    address, *errors = run_client(CLIENT, hub, tmp_path)
    assert address == f"http://127.0.0.1:{hub.server_port}/me/tiny"
    where = "not found on the Hugging Face Hub, or the Hub cannot be reached"
    assert f"no folder me/missing, and {where} (RepositoryNotFound" in errors[0]
    assert "not a name cannot be uploaded (HFValidationError" in errors[1]

    assert set(hub.repos) == {"me/tiny"}
    options = hub.created["me/tiny"]  # by the name of this version or of earlier ones
    assert options.get("visibility") == "private" or options.get("private") is True
    files = hub.repos["me/tiny"]
    assert b"# me/tiny" in files["README.md"] and b'"images": 19200' in files["config.json"]
    loaded = DDPMModel.from_file(tmp_path / "loaded.safetensors")
    assert max_weight_difference(loaded, model) == 0


DATA_CLIENT = """
from pathlib import Path
from engine.datasets import load_dataset

data = load_dataset("hf:me/pets", 8, Path(), progress=False, use_labels=True)
print(data.images.mean(axis=(1, 2, 3)).tolist(), data.labels.tolist(), *data.class_names)
"""


def test_data_set_of_the_hub_is_streamed(hub, tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (8, 8), (gray, gray, gray)) for gray in (10, 200, 30)]
    table = datasets.Dataset.from_dict({"image": images, "label": ["cat", "dog", "cat"]})
    table.to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    hub.repos["datasets/me/pets"] = {"train-0.parquet": content}
    assert run_client(DATA_CLIENT, hub, tmp_path) == ["[10.0, 200.0, 30.0] [0, 1, 0] cat dog"]

"""engine/image_files.py: which files a folder has."""

import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from engine import image_files
from engine.errors import FallbackWarning, UserError
from engine.image_files import find_images, walk


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The folder `data` of the current one, with data/a.png and data/b/c.png."""
    monkeypatch.chdir(tmp_path)
    save("data/a.png")
    save("data/b/c.png")
    return Path("data")


def save(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (1, 1)).save(path)


def test_walk_has_images_alone_without_hidden_ones(folder):
    for path in ("data/._a.png", "data/.thumbnails/x.png"):
        save(path)
    Path("data/notes.txt").touch()
    Path("data/folder.png").mkdir()
    save("data/B.PNG")
    assert walk(folder) == ["B.PNG", "a.png", "b/c.png"]


@pytest.mark.parametrize("link", ["data/0", "data/z", "data/b/0"])
@pytest.mark.parametrize("target", ["data", "data/b", "."])
def test_walk_finds_each_file_once_with_any_links(folder, link, target):
    Path(link).symlink_to(Path(target).resolve())
    Path(f"{link}2").symlink_to(Path(target).resolve())
    assert walk(folder) == ["a.png", "b/c.png"]


def test_walk_follows_links_to_other_places(folder):
    save("elsewhere/d/e.png")
    Path("blob").touch()
    Path("data/link").symlink_to(Path("elsewhere").resolve())
    Path("data/again").symlink_to(Path("elsewhere/d").resolve())
    Path("data/f.png").symlink_to(Path("blob").resolve())
    Path("data/0.png").symlink_to(Path("data/a.png").resolve())
    Path("data/dangling.png").symlink_to("nowhere.png")
    Path("data/self.png").symlink_to("self.png")
    assert walk(folder) == ["a.png", "again/e.png", "b/c.png", "dangling.png", "f.png", "self.png"]
    assert find_images(folder).names == walk(folder)


def test_walk_takes_the_first_of_two_links_to_a_folder(folder, monkeypatch):
    save("elsewhere/d.png")
    for name in ("y", "x"):
        Path(f"data/{name}").symlink_to(Path("elsewhere").resolve())
    scandir = os.scandir
    entries = lambda path: sorted(scandir(path), key=lambda e: e.name, reverse=True)  # noqa: E731
    monkeypatch.setattr(os, "scandir", entries)
    assert walk(folder) == ["a.png", "b/c.png", "x/d.png"]


def test_archives_have_the_names_of_hard_links_and_of_windows(folder):
    os.link("data/a.png", "data/b/again.png")
    with tarfile.open("images.tar", "w") as archive:
        archive.add("data")
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.write("data/a.png", "cat\\a.png")
    files = find_images(Path("images.tar"))
    assert files.names == ["data/a.png", "data/b/again.png", "data/b/c.png"]
    first, again, _ = (files.open(name).read() for name in files.names)
    assert first == again == Path("data/a.png").read_bytes()
    zipped = find_images(Path("images.zip"))
    assert zipped.names == ["cat/a.png"] and zipped.open("cat/a.png").read() == first


def test_a_folder_in_a_zip_is_no_image_whatever_its_name(folder):
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.writestr("holiday.png/", "")
        archive.write("data/a.png", "holiday.png/a.png")
    assert find_images(Path("images.zip")).names == ["holiday.png/a.png"]


def test_an_encrypted_zip_is_refused_with_the_reason(folder):
    with zipfile.ZipFile("images.zip", "w") as archive:
        archive.write("data/a.png", "a.png")
        archive.infolist()[0].flag_bits |= image_files.ENCRYPTED  # in the directory, at closing
    with pytest.raises(UserError, match=r"images\.zip is encrypted\. Extract it"):
        find_images(Path("images.zip"))


def test_symbolic_links_in_a_tar_are_left_out_with_a_warning(folder):
    os.symlink("a.png", "data/link.png")
    with tarfile.open("images.tar", "w") as archive:
        archive.add("data")
    with pytest.warns(FallbackWarning, match=r"1 symbolic links in images\.tar are not followed"):
        names = find_images(Path("images.tar")).names
    assert "data/a.png" in names and "data/link.png" not in names


def test_walk_leaves_out_what_this_project_writes(folder, capsys):
    for name in (*image_files.OUTPUT_DIRS, "photos/samples"):
        save(f"{name}/x.png")
    assert walk(Path()) == ["data/a.png", "data/b/c.png", "photos/samples/x.png"]
    assert "samples/" in capsys.readouterr().out
    assert walk(Path("samples")) == ["x.png"]  # unless asked for


def test_walk_warns_of_folders_that_cannot_be_listed(folder, monkeypatch):
    scandir = os.scandir

    def deny(path):
        if path.endswith(denied):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    denied = "b"
    with pytest.warns(FallbackWarning, match=r"1 folders in data .*\n  b/: Permission denied"):
        assert walk(folder) == ["a.png"]
    denied = "data"
    with pytest.raises(UserError, match=r"data cannot be read \(.*Permission denied"):
        find_images(folder)

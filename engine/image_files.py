"""Image files in a folder, a .zip or a .tar: their names, and how to open them."""

import io
import os
import shutil
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import BinaryIO

from PIL import Image

from engine.distributed import print0
from engine.errors import FallbackWarning, UserError

Image.preinit()  # tries common formats first; else all are tried in the order of their names

# What this project writes, in the current folder.
OUTPUT_DIRS = (
    "checkpoints", "samples", "inference_results", "demo_results", "results", "data/cache",
)  # fmt: skip
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz")
ENCRYPTED = 1  # a bit of the flags of a .zip's entry
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError)


@dataclass(frozen=True)
class ImageFiles:
    """Image files below one location."""

    names: list[str]  # paths relative to the location, with slashes, sorted
    fingerprint: str  # changes whenever the files do
    open: Callable[[str], Path | BinaryIO]  # what Image.open accepts, by name


def find_images(location: Path) -> ImageFiles:
    """Finds the images in a folder, .zip or .tar; raises UserError if there are none."""
    try:
        if location.is_dir():
            files = files_of_folder(location)
        elif location.is_file() and zipfile.is_zipfile(location):
            files = files_of_zip(location)
        elif location.is_file() and tarfile.is_tarfile(location):
            files = files_of_tar(location)
        elif location.is_file() and location.suffix.lower() in ARCHIVE_SUFFIXES:
            raise UserError(f"{location} is damaged, or no archive. Copy or download it again")
        else:
            expected = "a folder, .zip, .tar, .npz or .npy of images"
            raise UserError(f"{location} is not a folder or file of images. Name {expected}")
    except (OSError, EOFError, *ARCHIVE_ERRORS) as error:
        raise UserError(f"{location} cannot be read ({error})") from error
    if not files.names:
        raise UserError(f"no images in {location} (.jpg, .png, .webp or another format of Pillow)")
    return files


def is_image_name(name: str) -> bool:
    """Whether a relative path has an extension of Pillow's, and no hidden part."""
    path = PurePosixPath(name)
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def files_of_folder(folder: Path) -> ImageFiles:
    """Returns the images below a folder."""
    names = walk(folder)
    fingerprint = []
    for name in names:
        path = folder / name
        stat = os.stat(path, follow_symlinks=path.exists())  # a dangling link is unreadable
        fingerprint.append(f"{name} {stat.st_size} {stat.st_mtime_ns}\n")
    return ImageFiles(names, "".join(fingerprint), folder.joinpath)


def walk(folder: Path) -> list[str]:
    """Returns the relative paths of all images below a folder, sorted; no hidden ones.

    A file or folder that several paths reach has one, preferably without a link. Links are
    followed, but not to folders that contain this one. This project's outputs in the current folder
    are left out, and so are folders that cannot be listed, with a warning.
    """
    root = os.path.realpath(folder)
    outputs = {os.path.realpath(name) for name in OUTPUT_DIRS}
    names: dict[str, str] = {}  # by real path
    file_links: list[tuple[str, str]] = []
    left_out: list[str] = []
    failed: list[str] = []
    visited: set[str] = set()
    pending = deque([(root, "")])  # real paths and names; links come last
    while pending:
        # A folder, once, without outputs of this project.
        real, prefix = pending.popleft()
        if real in visited or (real != root and f"{root}{os.sep}".startswith(f"{real}{os.sep}")):
            continue
        visited.add(real)
        if real in outputs and real != root:
            left_out.append(prefix)
            continue
        try:
            entries = [entry for entry in os.scandir(real) if not entry.name.startswith(".")]
            entries.sort(key=lambda entry: entry.name)  # of two links to a folder, the first counts
        except OSError as error:
            if real == root:
                raise
            failed.append(f"{prefix}: {error.strerror}")
            continue

        # Its folders, images and links to images.
        for entry in entries:
            name = prefix + entry.name
            target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
            if os.path.isdir(target) if entry.is_symlink() else entry.is_dir():  # a loop is none
                (pending.append if entry.is_symlink() else pending.appendleft)((target, f"{name}/"))
            elif not is_image_name(name):
                continue
            elif entry.is_symlink():
                file_links.append((target, name))
            elif entry.is_file():
                names[target] = name

    # Links count if their image has no path without one.
    for target, name in sorted(file_links):
        names.setdefault(target, name)

    # Notices.
    if left_out:
        print0(f"{folder}: {', '.join(left_out)} written by this project, left out")
    if failed:
        first = f"{len(failed)} folders in {folder} cannot be listed; continuing without:"
        warnings.warn("\n  ".join([first, *failed]), FallbackWarning, stacklevel=2)
    return sorted(names.values())


def files_of_zip(path: Path) -> ImageFiles:
    """Returns the images in a .zip; threads may open them at the same time."""
    archive = zipfile.ZipFile(path)
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    if any(entry.flag_bits & ENCRYPTED for entry in entries):
        raise UserError(f"{path} is encrypted. Extract it with its password, and name the folder")
    # Some programs on Windows write backslashes.
    names = [entry.filename for entry in entries]
    members = {str(PurePosixPath(name.replace("\\", "/"))): name for name in names}
    names = sorted(filter(is_image_name, members))
    fingerprint = file_fingerprint(path)
    return ImageFiles(names, fingerprint, lambda name: io.BytesIO(archive.read(members[name])))


def files_of_tar(path: Path) -> ImageFiles:
    """Returns the images in a .tar; if compressed, it is decompressed at first use."""
    with tarfile.open(path) as archive:
        entries = {m.name: m for m in archive}
    members = {
        str(PurePosixPath(name)): target  # not ./name
        for name, m in entries.items()
        if (target := entries.get(m.linkname) if m.islnk() else m) and target.isreg()
    }
    if num_links := sum(m.issym() for m in entries.values()):
        reason = f"{num_links} symbolic links in {path} are not followed"
        warnings.warn(f"{reason}; continuing without them", FallbackWarning, stacklevel=2)
    lock = threading.Lock()
    content: list[BinaryIO] = []

    def read(name: str) -> BinaryIO:
        with lock:
            if not content:
                content.append(_uncompressed(path))
            content[0].seek(members[name].offset_data)
            return io.BytesIO(content[0].read(members[name].size))

    return ImageFiles(sorted(filter(is_image_name, members)), file_fingerprint(path), read)


def _uncompressed(path: Path) -> BinaryIO:
    """Opens a .tar; returns a temporary file with its content if it is compressed."""
    archive = tarfile.open(path)  # noqa: SIM115 - stays open
    if type(archive.fileobj).__module__ == "_io":
        return archive.fileobj
    content = TemporaryFile()  # noqa: SIM115 - stays open
    archive.fileobj.seek(0)
    shutil.copyfileobj(archive.fileobj, content, 2**20)
    return content


def file_fingerprint(path: Path) -> str:
    """Returns size and time of a file."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"

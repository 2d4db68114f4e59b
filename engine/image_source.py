"""Sources of images: what they have, and how they are read."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from engine import pixels
from engine.distributed import print0
from engine.errors import UserError
from engine.image_files import file_fingerprint, find_images
from engine.labels import NO_LABEL
from engine.pixels import Range

BLOCK = 64  # images that a thread decodes at a time
MAX_SIZES_CHECKED = 200  # images whose size is compared with --image_size
MAX_CROPPED_FRACTION = 0.1  # of an image; with more, a line says so
MIN_BRIGHTEST = 64  # of 255, of the brightest pixel in colors with 16 bits
ARRAY_FILES = (".npz", ".npy")
CHANNEL_NAMES = {1: "gray", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Source:
    """Where the images of a data set come from, and their labels if it has classes."""

    location: str
    fingerprint: str  # changes whenever the images or labels at the location do
    count: int  # 0: known only after all are read
    # read(block, size): of each, its images, uint8 (n, C, size, size), or why it is left out
    read: Callable[[Sequence, int], list[np.ndarray | str]]
    # channels(): C; may take a look at each image
    channels: Callable[[], int] = lambda: 3
    # sample_sizes(): shorter sides, in pixels, of some of the images; none if they have any size
    sample_sizes: Callable[[], Iterable[int]] = tuple
    # labels(): int64 (count,) of indices into the class names or -1, and these; after reading
    labels: Callable[[], tuple[np.ndarray, tuple[str, ...]]] | None = None
    names: Iterable[str] = ()  # of the files, below the location
    cache_key: str = ""  # names how they are read; each has a cache
    # chosen(): options that read the same images and leave nothing to find; where any are
    chosen: Callable[[], "ReadOptions"] | None = None
    # key_of(options): the cache_key with other options
    key_of: Callable[["ReadOptions"], str] = lambda options: options.cache_key
    # stream(): blocks for `read`, in order; ranges of indices unless given
    stream: Callable[[], Iterable[Sequence]] | None = None

    def blocks(self) -> Iterable[Sequence]:
        """Returns what `read` takes: the stream's blocks, or ranges of indices."""
        blocks = (range(i, min(i + BLOCK, self.count)) for i in range(0, self.count, BLOCK))
        return self.stream() if self.stream else blocks


@dataclass(frozen=True)
class ReadOptions:
    """How images are read, as in the settings of these names."""

    channels: int = 0  # 1, 3 or 4; 0: what the images have
    value_range: str = ""  # LOW,HIGH of images with more than 8 bits; "": found from all of them
    frames: str = "first"  # or "all": of files with several

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ReadOptions":
        """Returns the options of a run; runs of earlier versions are RGB."""
        values = {name.lower(): value for name, value in ({"CHANNELS": 3} | dict(config)).items()}
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def to_config(self) -> dict[str, Any]:
        """Returns the settings of a run with these options."""
        return {name.upper(): value for name, value in asdict(self).items()}

    @property
    def cache_key(self) -> str:
        """Names the cache of images that are read like this."""
        return f"\n{self}"


DEFAULT_OPTIONS = ReadOptions()


def path_source(path: Path, options: ReadOptions | None) -> Source:
    """Returns the source of the images in a folder, .zip, .tar, .npz or .npy.

    options: None for a folder of single RGB images, whose headers need not be read. Raises
    UserError if there are none, or if the file is of another kind.
    """
    if is_array_file(path):
        return array_source(path, options)
    files = find_images(path)

    def open_image(name: str) -> Image.Image:
        return Image.open(files.open(name))

    source = image_source(path, files.fingerprint, files.names, open_image, options)
    return replace(source, names=files.names)


def is_array_file(path: Path) -> bool:
    """Whether a path is an .npz or .npy."""
    return path.suffix.lower() in ARRAY_FILES and path.is_file()


def array_source(path: Path, options: ReadOptions) -> Source:
    """Returns the source of the images (N, H, W) or (N, H, W, C) in an .npz or .npy.

    Values of more than 8 bits and floats are scaled like those of image files.
    """
    images = load_array(path)

    # Value range, images and channels, read when asked for.
    @functools.cache
    def value_range() -> Range | None:
        if options.value_range or images.dtype == np.uint8:
            return pixels.parse_range(options.value_range)
        lowest = float(images.min())
        highest = float(images.max())
        if not math.isfinite(highest - lowest):
            raise UserError(f"{path} has values that are not finite. Remove those images")
        found = pixels.find_range(lowest, highest, images.dtype.kind == "f")
        print_range(len(images), lowest, highest, found)
        return found

    def open_image(index: int) -> Image.Image:
        image = images[index]
        image = image if image.dtype == np.uint8 else pixels.scale(image, value_range())
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)

    def channels() -> int:
        value_range()  # before threads need it
        return source.channels()

    def chosen() -> ReadOptions:
        is_deep = images.dtype != np.uint8
        text = options.value_range or pixels.format_range(value_range()) if is_deep else ""
        return replace(source.chosen(), value_range=text)

    # The source.
    source = image_source(path, file_fingerprint(path), range(len(images)), open_image, options)
    sides = [min(images.shape[1:3])] * len(images)
    return replace(source, channels=channels, sample_sizes=lambda: sides, chosen=chosen)


def load_array(path: Path) -> np.ndarray:
    """Returns the first array of images in an .npz or .npy, (N, H, W, 1, 3 or 4)."""
    found = []
    for array in read_arrays(path).values():
        if array.ndim == 3 and array.shape[2] > 4:
            array = array[..., None]
        is_number = array.dtype.kind in "biuf"
        if array.ndim == 4 and array.shape[3] in (1, 3, 4) and array.size and is_number:
            return array
        found.append(f"{array.dtype} {array.shape}")
    expected = "images (N, H, W), or (N, H, W, C) with 1, 3 or 4 channels"
    raise UserError(f"{path} holds {', '.join(found) or 'nothing'}, but should hold {expected}")


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz by name, all or some; that of an .npy has the name ""."""
    try:
        file = np.load(path, allow_pickle=False, mmap_mode="r")
        stored = {"": file} if isinstance(file, np.ndarray) else file
        return {name: stored[name] for name in stored if names is None or name in names}
    except Exception as error:  # numpy and zipfile each raise their own
        raise UserError(f"{path} is damaged or not an array file of numbers") from error


def load_array_labels(path: Path, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels (count,) and class names of an .npz or .npy; none for an .npy.

    They are its arrays `labels`, integers of which -1 is no label, and `class_names`. Without the
    latter, the classes are the numbers that occur. Raises UserError if these do not fit.
    """
    found = read_arrays(path, ("labels", "class_names"))
    if "labels" not in found:
        return np.full(count, NO_LABEL), ()
    labels = found["labels"]
    if labels.dtype.kind not in "iu" or labels.size != count:
        shown = f"{labels.dtype} {labels.shape}"
        raise UserError(f"{path} has labels {shown}, but should have {count} integers")
    labels = labels.ravel().astype(np.int64)
    names = found.get("class_names")
    if names is None:
        names = np.unique(labels[labels != NO_LABEL])
        labels = np.where(labels == NO_LABEL, NO_LABEL, np.searchsorted(names, labels))
    if labels.min() < NO_LABEL or labels.max() >= len(names):
        known = f"from 0 to {len(names) - 1}, or {NO_LABEL}"
        raise UserError(f"{path} has labels of no class in its class_names. They must be {known}")
    return labels, tuple(map(str, names))


def image_source(
    path: Path, fingerprint: str, items: Sequence, open_image: Callable[[Any], Image.Image],
    options: ReadOptions | None,
) -> Source:  # fmt: skip
    """Returns the source of the images open_image(item).

    options: None for single RGB images.
    """

    # How the cache reads it: choices for all images, images of a block, some sizes.
    @functools.cache
    def choose() -> ReadOptions:
        if not options:
            return ReadOptions(channels=3)
        survey = Survey(options)
        bar = tqdm(items, "reading headers", unit=" images", delay=5, leave=False)
        for index, item in enumerate(bar):
            with suppress(Exception), open_image(item) as image:  # broken ones are reported later
                survey.add(image, is_sample=index % stride == 0)
        survey.print()
        return survey.choose()

    def read(block: range, size: int) -> list[np.ndarray | str]:
        chosen = choose()
        arguments = chosen.channels, pixels.parse_range(chosen.value_range), all_frames
        results: list[np.ndarray | str] = []
        for index in block:
            try:
                with open_image(items[index]) as image:
                    results.append(pixels.read_pixels(image, size, *arguments))
            except Exception as error:  # Pillow raises nearly anything on a broken file
                results.append(f"{items[index]}: {error!r}")
        return results

    def sample_sizes() -> Iterator[int]:
        for item in items[::stride]:
            with suppress(Exception), open_image(item) as image:  # reads the header only
                yield min(image.size)

    all_frames = options is not None and options.frames == "all"
    stride = -(-len(items) // MAX_SIZES_CHECKED)
    return Source(
        str(path.resolve()), fingerprint, len(items), read, lambda: choose().channels,
        sample_sizes, cache_key=options.cache_key if options else "",
        chosen=choose if options else None,
    )  # fmt: skip


@dataclass
class Survey:
    """What images have, by their headers; those with more than 8 bits are decoded."""

    options: ReadOptions
    kinds: Counter[str] = field(default_factory=Counter)  # gray, RGB or RGBA
    is_transparent: bool = False  # alpha channels are often opaque everywhere
    num_deep: int = 0  # gray with more than 8 bits
    is_float: bool = False  # whether gray images with more than 8 bits are
    lowest: float = math.inf  # value of gray images with more than 8 bits
    highest: float = -math.inf  # value of gray images with more than 8 bits
    num_deep_color: int = 0  # color with 16 bits, of which Pillow reads the upper 8
    brightest: int = 0  # of those upper 8 bits, in the samples
    num_animated: int = 0  # files with several frames
    num_frames: int = 0  # in files with several
    cropped: float = 0.0  # sum of the fractions that squares cut off

    def add(self, image: Image.Image, is_sample: bool) -> None:
        """Adds an open image. is_sample: whether to decode alpha or color of 16 bits."""
        has_alpha = image.has_transparency_data
        is_deep_color = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        self.cropped += 1 - min(image.size) / max(image.size)
        self.kinds["RGBA" if has_alpha else "gray" if pixels.is_gray(image) else "RGB"] += 1
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            self.num_animated += 1
            self.num_frames += frames
        if has_alpha and is_sample:
            self.is_transparent |= image.convert("RGBA").getextrema()[3][0] < 255
        if pixels.is_deep(image.mode):
            self.num_deep += 1
            if not self.options.value_range:
                self.add_values(image)
        elif is_deep_color:
            self.num_deep_color += 1
            if is_sample:
                self.brightest = max(self.brightest, *np.ravel(image.convert("RGB").getextrema()))

    def add_values(self, image: Image.Image) -> None:
        """Adds the values of a gray image with more than 8 bits."""
        for frame in pixels.iterate_frames(image, self.options.frames == "all"):
            values = np.asarray(frame)
            values = values[np.isfinite(values)]
            self.is_float |= frame.mode == "F"
            self.lowest = min(self.lowest, float(values.min()))
            self.highest = max(self.highest, float(values.max()))

    def channels(self) -> int:
        """Returns the option; by default 1 for gray, 4 if all have alpha and any uses it, or 3."""
        if self.options.channels or len(self.kinds) != 1:
            return self.options.channels or 3
        if "gray" in self.kinds:
            return 1
        return 4 if self.is_transparent else 3

    def value_range(self) -> Range | None:
        """Returns the option, or the range of what was found."""
        if self.options.value_range:
            return pixels.parse_range(self.options.value_range)
        found = self.lowest, self.highest, self.is_float
        return pixels.find_range(*found) if self.lowest <= self.highest else None

    def choose(self) -> ReadOptions:
        """Returns options with what was found, without those that are for other images."""
        value_range = self.value_range()  # refuses a wrong option
        text = self.options.value_range or pixels.format_range(value_range)
        frames = self.options.frames if self.num_animated else ReadOptions.frames
        return ReadOptions(self.channels(), text if self.num_deep else "", frames)

    def print(self) -> None:
        """Prints a line for each choice; UserError for colors that are too dark."""
        if self.kinds:
            channels = self.channels()
            found = ", ".join(f"{number} {kind}" for kind, number in sorted(self.kinds.items()))
            white = ", transparency on white" if "RGBA" in self.kinds and channels != 4 else ""
            print0(f"images read as {CHANNEL_NAMES[channels]}{white}: {found} (see --channels)")
        if self.lowest <= self.highest:
            print_range(self.num_deep, self.lowest, self.highest, self.value_range())
        if self.num_deep_color and self.brightest < MIN_BRIGHTEST:
            left = f"at most {self.brightest} of 255 is left of {self.num_deep_color} images"
            reason = f"colors with 16 bits do not fill them: {left}"
            raise UserError(f"{reason}. Convert them to 8 bits")
        if self.num_animated:
            is_first = self.options.frames == "first"
            use = "the first of each (--frames all: every one)" if is_first else "all of them"
            found = f"{self.num_animated} with {self.num_frames} frames"
            print0(f"files of several frames: {found}; using {use}")
        cropped = self.cropped / max(self.kinds.total(), 1)
        if cropped > MAX_CROPPED_FRACTION:
            print0(f"cropping to squares cuts off {100 * cropped:.0f} % of the images' area")


def print_range(count: int, lowest: float, highest: float, value_range: Range) -> None:
    """Prints what is taken for black and white."""
    found = f"{count} images with values {lowest:g} to {highest:g}"
    mapping = "mapping {:g} to black and {:g} to white".format(*value_range)
    print0(f"{found}: {mapping}; change with --value_range LOW,HIGH")

"""HTML of app.py, wired by app.js; images are data URIs, so that no file is ever served."""

import html
from collections.abc import Sequence

from torch import Tensor

from engine import checkpoints
from engine.devices import device_name
from engine.page import PageImage, ServedModel

# What gradio runs when an element is loaded, of app.js.
PICK = "imageGrid(element, index => trigger('pick', {grid: '%s', index}))"
PAINT = "watch('value', brush(element, mask => trigger('paint', {mask})))"
PLAY = "watch('value', film(element))"
# Around all that app.css is for.
MARGIN = "<style>@media (max-width: 600px) { .app { padding: 12px !important; } }</style>"


def image_grid(images: Sequence[tuple[str, str]], chosen: Sequence[str] = ()) -> str:
    """Returns images as a grid of buttons; those in `chosen` are framed.

    images: (data URI, caption) of each; without a caption it cannot be clicked. chosen: data URIs.
    """
    columns = 4 if len(images) <= 16 else 6
    buttons = (
        f'<button data-index="{i}" aria-pressed="{str(uri in chosen).lower()}" title="{caption}"'
        f'{"" if caption else " disabled"}><img src="{uri}" alt="{caption}"></button>'
        for i, (uri, caption) in enumerate((uri, html.escape(text)) for uri, text in images)
    )
    return f'<div class="images" style="--columns: {columns}">{"".join(buttons)}</div>'


def film(frames: Sequence[tuple[str, str]], loop: bool = False, autoplay: bool = True) -> str:
    """Returns (data URI, caption) of frames as a film with a play button and a slider.

    loop: whether it plays back and forth forever. Without autoplay it shows its last frame.
    """
    if not frames:
        return note("Nothing to see yet.")
    first = 0 if autoplay else len(frames) - 1
    images = (
        f'<img src="{uri}" alt="{html.escape(caption)}"{"" if i == first else " hidden"}>'
        for i, (uri, caption) in enumerate(frames)
    )
    return (
        f'<div class="film" data-loop="{loop:d}" data-autoplay="{autoplay:d}">{"".join(images)}'
        '<div><button title="play or pause">▶</button>'
        f'<input type="range" max="{len(frames) - 1}" value="{first}" aria-label="frame">'
        f"<output>{html.escape(frames[first][1])}</output></div></div>"
    )


def chosen_images(images: Sequence[PageImage]) -> str:
    """Returns the chosen images, newest first, each with a download link."""
    if not images:
        return note("Click an image to choose it, or upload one.")
    items = (
        f'<figure><img src="{uri}" alt="{caption}"><figcaption>{caption} · '
        f'<a href="{uri}" download="ddpm {caption}.png">PNG</a></figcaption></figure>'
        for uri, caption in ((p.data_uri, html.escape(p.caption)) for p in images)
    )
    return f'<div class="chosen">{"".join(items)}</div>'


def canvas(source: PageImage, mask: Tensor | None) -> str:
    """Returns an image under a canvas to paint a mask on; app.js shows the mask."""
    size = source.image.shape[-1]
    pixels = "" if mask is None else "".join(map(str, mask.flatten().int().tolist()))
    return (
        f'<div class="paint"><div><img src="{source.data_uri}" alt="">'
        f'<canvas width="{size}" height="{size}" data-mask="{pixels}"></canvas></div>'
        "<button>Clear</button></div>"
    )


def describe_model(served: ServedModel) -> str:
    """Returns a heading with checkpoint, size and device of a model."""
    model = served.model
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    size = f"{model.image_size} px, {millions:.1f} M parameters, {device_name(model.device)}"
    return f"<h1>DDPM</h1>{note(f'{checkpoints.display_name(served.path)}: {size}')}"


def note(text: str) -> str:
    """Returns a line of text."""
    return f'<p class="note">{html.escape(text)}</p>'


def tiles(values: dict[str, str]) -> str:
    """Returns names and values as tiles."""
    items = (f"<div><dt>{name}</dt><dd>{html.escape(v)}</dd></div>" for name, v in values.items())
    return f'<dl class="tiles">{"".join(items)}</dl>'


def curve(uri: str) -> str:
    """Returns a plot, which turns dark with the page."""
    return f'<div class="curve"><img src="{uri}" alt="loss"></div>'

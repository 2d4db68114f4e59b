"""engine/plots.py: grids, GIFs, PNG metadata and curves."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import plots
from engine.errors import UserError


def test_to_bytes_clips_and_rounds_with_channels_last():
    images = torch.tensor([-1.0, 0.5, 2.0]).reshape(1, 3, 1, 1).expand(1, 3, 2, 4)
    pixels = plots.to_bytes(images)
    assert pixels.shape == (1, 2, 4, 3) and pixels[0, 1, 3].tolist() == [0, 128, 255]
    gray = plots.to_image(torch.full((1, 2, 4), 0.999))
    assert gray.mode == "L" and gray.size == (4, 2) and gray.getpixel((3, 1)) == 255


def test_captioned_grid_is_filled_row_by_row():
    images = torch.linspace(0, 1, 5).reshape(5, 1, 1, 1).expand(5, 3, 4, 4)
    sheet = np.asarray(plots.captioned_grid(images, [""] * 5, columns=3, smallest=8))
    corners = [sheet[4 + row * 26, 4 + column * 12, 0] for row in (0, 1) for column in range(3)]
    assert corners[:5] == [0, 64, 128, 191, 255] and sheet.shape == (56, 40, 3)
    with pytest.raises(ValueError, match="shorter"):
        plots.captioned_grid(images, ["a"])


def test_table_has_names_around_the_images_in_their_order():
    images = torch.linspace(0.1, 0.6, 6).view(6, 1, 1, 1).expand(6, 3, 8, 8)
    sheet = np.asarray(plots.table(images, ["a cat", "a dog"], ["0", "1", "2"], smallest=8))
    pitch = 10  # 8 pixels and a line of 2
    left = sheet.shape[1] - 3 * pitch - 2
    top = sheet.shape[0] - 2 * pitch - 2
    centers = sheet[top + 6 :: pitch, left + 6 :: pitch, 0]
    assert centers.tolist() == plots.to_bytes(images)[:, 4, 4, 0].reshape(2, 3).tolist()
    assert sheet[top : top + pitch, :left].min() == sheet[top + pitch :, :left].min() == 0
    assert all(sheet[:top, left + pitch * i :][:, :pitch].min() < 128 for i in range(3))


def test_captioned_grid_has_its_title_above_the_images():
    images = torch.zeros(2, 3, 100, 100)
    plain, titled = (
        np.asarray(plots.captioned_grid(images, ["a", "b"], title=title)) for title in ("", "title")
    )
    assert np.array_equal(titled[22 + 4 :], plain[4:]) and titled[:22].min() < 128


def test_captioned_grid_is_as_wide_as_its_title():
    sheet = plots.captioned_grid(torch.zeros(1, 3, 64, 64), ["a"], title=9 * "long title")
    title = np.asarray(sheet)[:22]
    assert title[:, -4:].min() == 255 and title[:, -8:].min() < 128


def test_grid_has_as_many_columns_as_rows():
    assert plots.grid(torch.zeros(9, 3, 64, 64)).size == (3 * 66 + 2, 3 * 66 + 2)
    assert plots.grid(torch.zeros(7, 3, 64, 64)).size == (3 * 66 + 2, 3 * 66 + 2)
    assert plots.grid(torch.zeros(6, 3, 64, 64), columns=6).size == (6 * 66 + 2, 66 + 2)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grids_have_the_channels_of_their_images(channels, mode):
    images = torch.full((2, channels, 64, 64), 0.5)
    grid = plots.grid(images)
    pixel = np.ravel(grid.getpixel((9, 9)))
    assert grid.mode == mode and pixel.tolist() == [128] * channels
    labeled = plots.captioned_grid(images, ["a", "b"]).getpixel((9, 9))
    assert labeled == ((191 if channels == 4 else 128),) * 3  # on white


def test_on_white_composites_rgba():
    images = torch.tensor([1.0, 0.5, 0.0, 0.5]).reshape(1, 4, 1, 1)
    assert plots.on_white(images).flatten().tolist() == [1.0, 0.75, 0.5]
    assert torch.equal(plots.on_white(images[:, :3]), images[:, :3])


def test_enlarge_repeats_pixels_of_small_images_only():
    image = torch.arange(6.0).reshape(1, 2, 3)
    large = plots.enlarge(image, smallest=7)
    assert large.shape == (1, 4, 6) and large[0, 2:, 2:4].unique().tolist() == [4.0]
    assert plots.enlarge(torch.zeros(1, 100, 100)).shape == (1, 100, 100)


def test_png_metadata_is_read_back(tmp_path):
    image = Image.new("RGB", (4, 4))
    plots.save_image(image, tmp_path / "a.png", '{"seeds": [1]}')
    assert plots.read_png_metadata(tmp_path / "a.png") == '{"seeds": [1]}'
    plots.save_image(image, tmp_path / "b.png")
    assert plots.read_png_metadata(tmp_path / "b.png") == ""
    with pytest.raises(UserError, match="is missing or not an image"):
        plots.read_png_metadata(tmp_path / "c.png")


def test_gif_loops_and_pauses_on_the_last_frame(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 100, 200)]
    plots.save_gif(frames, tmp_path / "a.gif", milliseconds=70)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        durations = []
        for i in range(3):
            gif.seek(i)
            durations.append(gif.info["duration"])
    assert durations == [70, 70, 1500]


def test_read_metrics_skips_lines_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n{"st')
    assert plots.read_metrics(path) == [{"step": 1}, {"step": 4}]
    assert plots.read_metrics(tmp_path / "none.jsonl") == []


@pytest.fixture
def lines_of(monkeypatch):
    """Calls a plotting function; returns the points of each line by label."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))

    def lines_of(plot, *arguments) -> dict[str, list[tuple[float, float]]]:
        plot(*arguments, Path("unused.png"))
        (axes,) = figures[-1].axes
        assert axes.get_yscale() == "log"
        return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}

    return lines_of


def test_loss_curve_has_training_its_mean_and_validation(tmp_path, lines_of):
    rows = [{"step": 10 * i, "loss": 1 + i} for i in range(80)]
    rows += [{"step": 400, "validation_loss": 0.5}, {"step": 800, "validation_loss": 0.25}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lines = lines_of(plots.save_loss_curve, path)
    assert lines["training"] == [(row["step"], row["loss"]) for row in rows[:80]]
    assert lines["validation, EMA weights"] == [(400, 0.5), (800, 0.25)]
    mean = lines["training, mean of 2 values"]
    assert mean[0] == (10, 1.5) and mean[-1] == (790, 79.5) and len(mean) == 79


def test_loss_curve_of_no_metrics_is_written(tmp_path):
    plots.save_loss_curve(tmp_path / "none.jsonl", tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").format == "PNG"


def test_fd_over_time_is_sorted_by_time(lines_of):
    curves = {"a": [30, 10, 20], "b": [3, 1, 2]}
    lines = lines_of(plots.save_fd_over_time, [3.0, 1.0, 2.0], curves)
    assert lines == {"a": [(1, 10), (2, 20), (3, 30)], "b": [(1, 1), (2, 2), (3, 3)]}


def test_loss_by_timestep_has_a_line_for_each_model(lines_of):
    lines = lines_of(plots.save_loss_by_timestep, [0, 9], {"a": [4.0, 2.0], "b": [3.0, 1.0]})
    assert lines == {"a": [(0, 4), (9, 2)], "b": [(0, 3), (9, 1)]}


@pytest.mark.parametrize("bounds", [(0.0117, 0.0125), (0.15, 0.25), (0.09, 1.2), (3, 60), (2, 2)])
def test_ticks_of_the_losses_are_distinct_numbers_in_plain_digits(bounds, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    plots.save_loss_by_timestep([0, 9], {"a": bounds}, tmp_path / "unused.png")
    figures[0].draw_without_rendering()
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    ticks = [
        (label.get_text(), label.get_position()[1], label.get_window_extent())
        for minor in (False, True)
        for label in axes.get_yticklabels(minor=minor)
        if label.get_text() and low <= label.get_position()[1] <= high
    ]
    texts, positions, boxes = zip(*sorted(ticks, key=lambda tick: tick[1]), strict=True)
    assert len(set(texts)) == len(texts) >= 3 and "e" not in "".join(texts)
    assert [float(text) for text in texts] == pytest.approx(positions, rel=1e-9)
    assert all(below.y1 < above.y0 for below, above in pairwise(boxes))


@pytest.mark.parametrize("last", [1, 2, 3, 30])
def test_ticks_of_a_short_run_are_whole_steps(last, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    rows = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, last + 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    plots.save_loss_curve(tmp_path / "metrics.jsonl", tmp_path / "unused.png")
    (axes,) = figures[0].axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)

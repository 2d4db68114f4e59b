"""scaling.py: what its rows come to. That it runs is tried by the third command of its docstring."""

import io

import numpy as np
import pytest
from PIL import Image

import scaling
from engine import report


def speed(kind: str, processes: int, batch: int, rate: float, preset: str = "cifar10") -> dict:
    row = {"kind": kind, "preset": preset, "processes": processes, "batch": batch, "images_per_second": rate}
    return row | {"image_size": 32, "dim": 64, "dim_mults": [1, 2], "rounds": [rate]}


def loss(processes: int, seed: int, value: float) -> dict:
    row = {"kind": "loss", "processes": processes, "seed": seed, "validation_loss": value}
    return row | {"steps": 500, "effective_batch": 512, "seconds": 1.0}


def test_efficiency_is_over_as_many_times_one_process_of_the_same_work():
    rows: list[dict] = []
    for row in (
        speed("weak", 1, 128, 100.0), speed("weak", 1, 512, 300.0), speed("strong", 1, 512, 300.0),
        speed("strong", 1, 512, 10.0, "stl10"), speed("weak", 4, 128, 360.0), speed("weak", 4, 512, 600.0),
        speed("strong", 4, 128, 900.0), speed("strong", 4, 128, 38.0, "stl10"), speed("weak", 4, 64, 9.0, "stl10"),
    ):  # fmt: skip
        rows.append(scaling.with_efficiency(row, rows))
    assert [row["efficiency"] for row in rows] == [1, 1, 1, 1, 0.9, 0.5, 0.75, 0.95, None]
    assert all(str(round(row["images_per_second"])) in scaling.told(row) for row in rows)
    rows += [loss(1, seed, 0.1 + seed / 100) for seed in scaling.SEEDS] + [loss(4, 0, 0.11)]
    table = report.scaling_tables([{"device": "none", "torch": "0", "rows": rows, "agreement": "all agree"}])
    assert table.splitlines()[0].endswith("; all agree")
    assert table.splitlines()[4:8] == [
        "| weak | cifar10, 32 px, dim 64 | 1,2 | 1 | 128 | 100 | 100.0 % |",
        "| weak | cifar10, 32 px, dim 64 | 1,2 | 4 | 128 | 360 | 90.0 % |",
        "| weak | cifar10, 32 px, dim 64 | 1,2 | 1 | 512 | 300 | 100.0 % |",
        "| weak | cifar10, 32 px, dim 64 | 1,2 | 4 | 512 | 600 | 50.0 % |",
    ]
    assert len(table.splitlines()) == 4 + 9  # the losses are no rows
    png = scaling.picture({"device": "none", "torch": "0", "rows": rows})
    assert np.asarray(Image.open(io.BytesIO(png)).convert("L")).std() > 5


@pytest.mark.parametrize(("value", "verdict"), [(0.105, ": within"), (0.13, ": NOT within")])
def test_losses_agree_if_they_differ_less_than_seeds_do(value, verdict):
    rows = [loss(1, 0, 0.11), loss(1, 1, 0.10), loss(1, 2, 0.115), loss(2, 0, 0.11)]
    assert "too few" in scaling.agreement(rows[1:]) and "too few" in scaling.agreement(rows[:3])
    assert verdict in scaling.agreement([*rows, loss(4, 0, value)])

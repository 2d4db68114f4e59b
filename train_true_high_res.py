"""Trains on large images at their native resolution: STL-10, CelebA, or a folder at 64 to 128 px.

    python train_true_high_res.py --dataset stl10
    python train_true_high_res.py --dataset folder --data_dir photos --target_size 128 --minutes 60
    python train_true_high_res.py --dataset cifar10 --target_size 64 --use_upsampling

Everything is on as in train_optimized.py, and the largest micro-batch that fits in memory is found
by a short search. The settings for large images are in config.py (SIZE_PRESETS).
"""

from engine.cli import run_script  # first: sets what torch reads

import train
import train_optimized

DEFAULTS = {
    **train_optimized.DEFAULTS, "AUTO_MICRO_BATCH": True, "DATASET": "stl10", "IMAGE_SIZE": 64,
}  # fmt: skip

if __name__ == "__main__":
    run_script(lambda: train.main(__doc__, DEFAULTS))

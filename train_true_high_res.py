"""Trains on large images at their own resolution: STL-10 at 96 px, CelebA at 64 px, a folder at 64, 96 or 128 px.

    python train_true_high_res.py --dataset stl10
    python train_true_high_res.py --dataset folder --data_dir my_photos --target_size 128
    python train_true_high_res.py --dataset cifar10 --target_size 64 --use_upsampling

Everything is on as in train_optimized.py, and before the first run with a configuration on a card it is tried out how
many images fit into its memory at once. What is chosen for large images, and why, is in config.py (LARGE_IMAGES and
SIZE_PRESETS).
"""

import train
import train_optimized
from engine.command_line import run

DEFAULTS = {**train_optimized.DEFAULTS, "FIT_MEMORY": True, "DATASET": "stl10", "IMAGE_SIZE": 64}

if __name__ == "__main__":
    run(lambda: train.main(__doc__, DEFAULTS))

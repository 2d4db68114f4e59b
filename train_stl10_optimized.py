"""Trains on STL-10's 105,000 photos, or on other images, at 96 px.

    python train_stl10_optimized.py
    python train_stl10_optimized.py --max_memory_gib 6     limit to 6 GiB, e.g. to share the GPU
    python train_stl10_optimized.py --dataset folder --data_dir icons --use_upsampling --minutes 60

Everything else is as in train_true_high_res.py.
"""

from engine.cli import run_script  # first: sets what torch reads

import train
import train_true_high_res

DEFAULTS = {**train_true_high_res.DEFAULTS, "IMAGE_SIZE": 96}

if __name__ == "__main__":
    run_script(lambda: train.main(__doc__, DEFAULTS))

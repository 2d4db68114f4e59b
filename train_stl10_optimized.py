"""Trains on STL-10's 105,000 photographs at 96 px with every optimisation on, or in the same way on others.

    python train_stl10_optimized.py
    python train_stl10_optimized.py --memory_gib 6         as on a card of 6 GB, or beside somebody else's process
    python train_stl10_optimized.py --dataset folder --data_dir my_icons --use_upsampling

Everything else is as in train_true_high_res.py.
"""

import train
import train_true_high_res
from engine.command_line import run

DEFAULTS = {**train_true_high_res.DEFAULTS, "IMAGE_SIZE": 96}

if __name__ == "__main__":
    run(lambda: train.main(__doc__, DEFAULTS))

"""Trains a diffusion model fast: mixed precision, CUDA graphs. The script to begin with.

    python train_optimized.py                              CIFAR-10, or the built-in shapes
    python train_optimized.py --dataset folder --data_dir my_images --minutes 60
    accelerate launch train_optimized.py --dataset celeba  on every GPU of this machine

Ends with a sample grid in samples/<run>/ and a model in checkpoints/ddpm_final.pt. Each
optimization is a flag: --help lists them, --dry_run shows the configuration that results.
"""

from engine.cli import run_script  # first: sets what torch reads

import train

DEFAULTS = {"USE_AMP": True, "CUDA_GRAPH": True}

if __name__ == "__main__":
    run_script(lambda: train.main(__doc__, DEFAULTS))

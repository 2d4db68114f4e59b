"""Trains a diffusion model with everything on: mixed precision, CUDA graphs, cosine learning rate.

    python train_optimized.py                              CIFAR-10, or the built-in shapes
    python train_optimized.py --dataset folder --data_dir my_images --minutes 60
    accelerate launch train_optimized.py --dataset celeba  on every GPU of this machine

Ends with a sample grid in samples/<run>/ and a model in checkpoints/ddpm_final.pt. Every switch is a flag of its
own: --help lists them, --dry_run shows what they come to.
"""

import train
from engine.command_line import run

DEFAULTS = {"USE_AMP": True, "CUDA_GRAPH": True, "LR_SCHEDULE": "cosine"}

if __name__ == "__main__":
    run(lambda: train.main(__doc__, DEFAULTS))

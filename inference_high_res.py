"""Samples images of 64 px and above: figures are laid out for large images.

    python inference_high_res.py                           9 samples from the newest checkpoint
    python inference_high_res.py --mode all
    python inference_high_res.py --mode batch --num_samples 5000 --format npz

Modes and flags are those of inference.py.
"""

from engine.cli import run_script  # first: sets what torch reads

import inference

DEFAULTS = {"num_samples": 9, "tile": 192, "columns": 5}

if __name__ == "__main__":
    run_script(lambda: inference.main(__doc__, DEFAULTS))

"""Draws with models of 64 pixels and more: batches that fit the memory, figures laid out for large images.

    python inference_high_res.py                           9 samples from the newest checkpoint
    python inference_high_res.py --mode all
    python inference_high_res.py --mode batch --num_samples 5000 --format npz

Everything else is as in inference.py, whose modes and flags these are.
"""

import inference
from engine.command_line import run

DEFAULTS = {"NUM_SAMPLES": 9, "TILE": 192, "COLUMNS": 5, "SMALLEST": 64}

if __name__ == "__main__":
    run(lambda: inference.main(__doc__, DEFAULTS))

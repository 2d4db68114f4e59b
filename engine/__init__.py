"""What the scripts share: data, training step and loop, checkpoints, samplers, plots, command line.

Nothing in here imports a script, `config` or `ddpm_model`: it is handed a model and plain values.
"""

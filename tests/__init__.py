"""Makes `tests` this folder: torch-fidelity installs a package of that name."""

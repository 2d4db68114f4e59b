# Trains and samples, with a GPU and without one: docs/ecosystem.md has the commands.
FROM python:3.12-slim

# Triton compiles the launchers of its kernels with gcc.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# PyPI's torch for Linux brings the CUDA libraries; the driver is the host's.
COPY requirements.txt /ddpm/
RUN pip install --no-cache-dir -r /ddpm/requirements.txt
COPY . /ddpm

# With `docker run --user`, caches need a home and a name.
ENV HOME=/tmp USER=ddpm PYTHONUNBUFFERED=1

# Checkpoints, samples and data go to the folder that is mounted here.
WORKDIR /work
CMD ["python", "/ddpm/train_optimized.py"]

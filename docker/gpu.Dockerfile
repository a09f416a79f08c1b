# opd on CUDA GPUs, with vLLM's own build.
#   docker build -f docker/gpu.Dockerfile -t opd:gpu . && docker run --rm --gpus all --shm-size 16g opd:gpu
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS cuda

# The locks are for Python 3.11, so the base is the CPU image's; the driver comes from the host.
FROM python:3.11-slim-bookworm

# vLLM and DeepSpeed compile some kernels when they first need them: nvcc and a C++ compiler stay in the image.
COPY --from=cuda /usr/local/cuda-13.0 /usr/local/cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 opd \
    && install --directory --owner=1000 --group=1000 /app /app/runs

USER 1000:1000
WORKDIR /app
ENV PATH=/app/.venv/bin:/usr/local/cuda/bin:$PATH \
    CUDA_HOME=/usr/local/cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1 \
    RAY_AUTH_MODE=token \
    VLLM_NO_USAGE_STATS=1

COPY --chown=1000:1000 requirements requirements
RUN python -m venv .venv \
    && pip install --require-hashes --no-deps -r requirements/build.lock \
    && pip install --require-hashes --no-deps --no-build-isolation -r requirements/gpu.lock

COPY --chown=1000:1000 . .
RUN pip install --no-deps --no-build-isolation -e '.[gpu]'

CMD ["opd", "train", "experiment=shop"]

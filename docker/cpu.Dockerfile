# opd on CPUs: the same locks and the same script as `make train`.
#   docker build -f docker/cpu.Dockerfile -t opd:cpu . && docker run --rm --shm-size 2g opd:cpu
FROM python:3.11-slim-bookworm

# vLLM's CPU kernels load these two.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1 libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 opd \
    && install --directory --owner=1000 --group=1000 /app /app/runs

USER 1000:1000
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    RAY_AUTH_MODE=token \
    VLLM_NO_USAGE_STATS=1

# The locked packages change seldom, the code often: two layers.
COPY --chown=1000:1000 requirements requirements
COPY --chown=1000:1000 scripts/install.sh scripts/install.sh
RUN scripts/install.sh packages

COPY --chown=1000:1000 . .
RUN scripts/install.sh runtime

CMD ["opd", "train", "experiment=shop"]

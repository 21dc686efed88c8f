# Two images:
#   docker build --tag megatron-moellava:gpu .                  for GPU clusters (the last stage, hence the default)
#   docker build --tag megatron-moellava:cpu --target cpu .     for CI and laptops
# docs/how-to/containers.md says how to run them and what was checked.

# --- CPU, build stage: pip and its downloads stay behind here.
# 3.12 because megatron-core 0.19 needs at least that and the NGC image below has it too; slim because every dependency
# has a wheel, so no compiler is needed.
FROM python:3.12-slim AS cpu-build
# PyTorch's CPU wheels: 4 GB less than PyPI's, which carry CUDA. Empty: PyPI only.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/megatron-moellava
# Dependencies first: this layer is rebuilt only when setup.py changes, not with every change of the sources. The pins
# are in setup.py.
COPY setup.py pyproject.toml LICENSE ./
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[quickstart,dev]'
COPY megatron_moellava megatron_moellava
RUN pip install --no-cache-dir --no-deps --editable .

# --- CPU, the image itself.
FROM python:3.12-slim AS cpu
# make: the quickstart and the tests are make targets. Pinning a Debian revision would break with each point release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 moellava
ENV PATH=/opt/venv/bin:$PATH VENV=/opt/venv
WORKDIR /opt/megatron-moellava
COPY --from=cpu-build /opt/venv /opt/venv
COPY . .
RUN mkdir runs && chown 1000 runs
USER 1000
CMD ["make", "quickstart"]

# --- GPU. 25.12 is NGC's last image of 2025: Python 3.12, PyTorch 2.10 (pre-release, NVIDIA's build), CUDA 13.1, with the
# Transformer Engine and apex that were built against exactly this PyTorch. Neither can be pip-installed as well: apex is
# not on PyPI under NVIDIA's name, Transformer Engine would compile for ten minutes.
FROM nvcr.io/nvidia/pytorch:25.12-py3 AS gpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/megatron-moellava
COPY setup.py pyproject.toml LICENSE ./
# The image lists its own packages in /etc/pip/constraint.txt and names that file in PIP_CONSTRAINT. Left alone, it makes
# pip stop where it would have to replace one of them, torch above all; the comparison makes sure that it did.
RUN pip freeze | grep -iE '^(torch|triton|transformer.engine|apex|numpy|nvidia-)' | sort > /tmp/before \
    && pip install --no-cache-dir . \
    && pip freeze | grep -iE '^(torch|triton|transformer.engine|apex|numpy|nvidia-)' | sort | diff /tmp/before -
COPY megatron_moellava megatron_moellava
COPY tools tools
COPY examples examples
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -c "from importlib.metadata import version as v; print(v('torch'), v('transformer-engine'), v('apex'))"

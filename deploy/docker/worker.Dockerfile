# Prefill and decode workers, with torch.
#
#   docker build -f deploy/docker/worker.Dockerfile -t pdserve-worker:0.1.0 .
#
# torch comes by its exact version from pip's index, which has the CUDA build; another index, such
# as that of CPU builds: --build-arg TORCH_INDEX=URL
# By digest: --build-arg PYTHON_IMAGE=python:3.11.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Seconds since 1970 that all files get: the last commit's, so that its image is always the same.
ARG SOURCE_DATE_EPOCH=0
ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
RUN python -m venv /opt/pdserve
COPY deploy/docker/build.lock deploy/docker/worker.lock constraints.txt /build/
RUN /opt/pdserve/bin/pip install --require-hashes --no-deps --no-compile -r /build/build.lock \
 && /opt/pdserve/bin/pip install --require-hashes --no-deps --no-compile -r /build/worker.lock \
 && /opt/pdserve/bin/pip install ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} --no-compile \
      --only-binary :all: -c /build/constraints.txt torch==2.13.0
COPY pyproject.toml README.md LICENSE /build/source/
COPY pdserve /build/source/pdserve
COPY kvtransfer /build/source/kvtransfer
COPY prefill_worker /build/source/prefill_worker
COPY decode_worker /build/source/decode_worker
RUN SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} /opt/pdserve/bin/pip install \
      --no-deps --no-compile --no-build-isolation /build/source \
 && /opt/pdserve/bin/pip uninstall --yes --quiet pip \
 && find /opt/pdserve -exec touch --no-dereference --date=@${SOURCE_DATE_EPOCH} {} +

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/pdserve /opt/pdserve
ENV PATH=/opt/pdserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=pdserve
USER 10001:10001
EXPOSE 7460 7461 7452
CMD ["python", "-m", "decode_worker", "--help"]

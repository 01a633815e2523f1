# A router, and the pdserve command (smoke test, status, bench); no torch.
#
#   docker build -f deploy/docker/router.Dockerfile -t pdserve-router:0.1.0 .
#
# By digest: --build-arg PYTHON_IMAGE=python:3.11.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Seconds since 1970 that all files get: the last commit's, so that its image is always the same.
ARG SOURCE_DATE_EPOCH=0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 PYTHONHASHSEED=0
RUN python -m venv /opt/pdserve
COPY deploy/docker/build.lock deploy/docker/router.lock /build/
RUN /opt/pdserve/bin/pip install --require-hashes --no-deps --no-compile -r /build/build.lock \
 && /opt/pdserve/bin/pip install --require-hashes --no-deps --no-compile -r /build/router.lock
COPY pyproject.toml README.md LICENSE /build/source/
COPY pdserve /build/source/pdserve
COPY router /build/source/router
COPY placement /build/source/placement
COPY deploy /build/source/deploy
RUN SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH} /opt/pdserve/bin/pip install \
      --no-deps --no-compile --no-build-isolation /build/source \
 && /opt/pdserve/bin/pip uninstall --yes --quiet setuptools pip \
 && find /opt/pdserve -exec touch --no-dereference --date=@${SOURCE_DATE_EPOCH} {} +

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/pdserve /opt/pdserve
ENV PATH=/opt/pdserve/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp USER=pdserve
USER 10001:10001
EXPOSE 7450 7451 7452
CMD ["pdserve", "--help"]

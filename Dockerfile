# The image of the service. It has no database of its own: LATCHGATE_DATABASE_URL must be given.
#   docker build -t latchgate --build-arg VERSION=0.1.0 --build-arg REVISION="$(git rev-parse HEAD)" .

FROM python:3.13-slim-trixie AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src

# No pip in the environment that is shipped. Nothing is compiled: each package is a wheel whose hash is in the lock file.
COPY requirements.txt ./
RUN python -m venv --without-pip /opt/latchgate \
    && pip --python /opt/latchgate/bin/python install --require-hashes -r requirements.txt

# The build backend and what it needs, as the developers' lock file pins them, so that no version is written down twice.
# A package that is missing in this list fails the build: --require-hashes takes nothing that is not pinned.
COPY requirements-dev.txt ./
RUN awk '/^[a-z]/ { keep = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } keep' \
        requirements-dev.txt > /tmp/requirements-build.txt \
    && pip install --require-hashes -r /tmp/requirements-build.txt

COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY generated generated
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && pip --python /opt/latchgate/bin/python install --no-deps --no-index /dist/*.whl


FROM python:3.13-slim-trixie
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="latchgate" \
      org.opencontainers.image.description="API keys for gateways over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

RUN groupadd --system --gid 10001 latchgate \
    && useradd --system --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin latchgate
COPY --from=builder /opt/latchgate /opt/latchgate

# Plain text on these addresses has to be allowed by whoever runs the image (LATCHGATE_ALLOW_PLAINTEXT=true), or TLS be set.
ENV PATH=/opt/latchgate/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LATCHGATE_LISTEN=0.0.0.0:50051 \
    LATCHGATE_METRICS_LISTEN=0.0.0.0:9464
EXPOSE 50051 9464

# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["latchgate", "health"]
ENTRYPOINT ["latchgate"]
CMD ["serve"]

# The gateway's image: `docker build -t poolgate .`; deploy/compose.yaml runs it beside PostgreSQL and Valkey.
# It holds no engine: GPU hosts run `poolgate agent`, with vLLM in an environment of its own.

ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
WORKDIR /src
# What compiles, and wheels of the dependencies, first: these layers stay while pyproject.toml does.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
RUN mkdir gateway nodes billing config \
    && pip wheel --no-cache-dir --wheel-dir /wheels . \
    && rm /wheels/poolgate-*.whl \
    && pip install --no-cache-dir --find-links=/wheels '.[compile]'
COPY gateway gateway
COPY nodes nodes
COPY billing billing
COPY config config
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
    && python -m config.compiling

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="poolgate" \
      org.opencontainers.image.description="One OpenAI-compatible endpoint over a pool of GPU hosts" \
      org.opencontainers.image.licenses="Apache-2.0"
# The same interpreter and sources as in the build, so the modules that it compiled are used; the last line makes sure.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    --mount=type=bind,from=build,source=/src/.compiled,target=/compiled \
    pip install --no-cache-dir --no-index --find-links=/wheels poolgate \
    && cp -r /compiled "$(python -c 'from config.compiled import FOLDER; print(FOLDER)')" \
    && python -c 'import sys, gateway.turn; from config.compiled import is_used; sys.exit(not is_used())'
# The data folder holds the pepper of the key hashes when POOLGATE_KEY_PEPPER does not give it.
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin poolgate \
    && install -d -o poolgate -g poolgate -m 0700 /var/lib/poolgate
USER 10001:10001
WORKDIR /var/lib/poolgate
VOLUME /var/lib/poolgate
ENV PYTHONUNBUFFERED=1 \
    POOLGATE_HOST=0.0.0.0 \
    POOLGATE_PORT=8080 \
    POOLGATE_DATA_DIR=/var/lib/poolgate \
    POOLGATE_LOG_FORMAT=json \
    POOLGATE_PROBE_PORT=8081
EXPOSE 8080
# The probe port answers however busy the workers are, and in plain HTTP also where the gateway itself speaks TLS.
# The supervisor drains begun turns on SIGTERM; docker's own default would kill it after 10 s.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", \
    "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"POOLGATE_PROBE_PORT\"]}/health', timeout=2)"]
ENTRYPOINT ["poolgate"]
CMD ["serve"]

# The service with the embedded model: works offline, as a user without rights, on a read-only root.
#   docker build -t stepserve .                       for CPUs, without CUDA libraries
#   docker build -t stepserve:cuda --build-arg DEVICE=cuda .
#   docker build --target sbom --output out .         out/sbom.json (CycloneDX)
#   docker build --target locust -t stepserve-locust .   users that put load on it
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE=cpu
# Where torch comes from for CPUs; PyPI's own brings CUDA along. Empty: from the usual index.
ARG CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/stepserve
ENV PATH=/opt/stepserve/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# Alone, as it is large and rarely changes.
RUN if [ "$DEVICE" = cpu ] && [ -n "$CPU_TORCH_INDEX" ]; then \
        pip install --quiet -c constraints.txt --index-url "$CPU_TORCH_INDEX" torch; \
    else \
        pip install --quiet -c constraints.txt torch; \
    fi
COPY pyproject.toml README.md LICENSE ./
COPY service ./service
# Of no use while serving: tests, Java, C++ and what else Ray brings along.
RUN pip install --quiet -c constraints.txt '.[s3]' \
    && site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
    && rm -rf "$site/torch/test" "$site/ray/jars" "$site/ray/cpp" \
        "$site/ray/rllib" "$site/ray/tune" \
    && find "$site" -name tests -type d -path '*/scipy/*' -prune -exec rm -rf {} + \
    && find "$site" -name tests -type d -path '*/numpy/*' -prune -exec rm -rf {} + \
    && python -m compileall -q -j 0 "$site/stepserve"

FROM build AS sbom-build
ENV PIP_CONSTRAINT=""
RUN python -m venv /opt/sbom \
    && /opt/sbom/bin/pip install --quiet cyclonedx-bom==7.5.0 \
    && /opt/sbom/bin/cyclonedx-py environment /opt/stepserve -o /sbom.json

FROM scratch AS sbom
COPY --from=sbom-build /sbom.json /sbom.json

FROM ${PYTHON_IMAGE} AS locust
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY constraints.txt /app/
RUN python -m venv /opt/locust \
    && /opt/locust/bin/pip install --quiet -c /app/constraints.txt locust pillow
COPY loadtests /app/loadtests
USER 10001:10001
WORKDIR /app
EXPOSE 8089
ENV PATH=/opt/locust/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["locust", "-f", "loadtests/locustfile.py"]

FROM ${PYTHON_IMAGE} AS service
# wget and bash: KubeRay's probes. tini: passes signals on and reaps what Ray leaves behind.
# hadolint ignore=DL3008
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends tini wget bash \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp/home stepserve \
    && mkdir -p /models /results && chown 10001:10001 /models /results
COPY --from=build /opt/stepserve /opt/stepserve
# `ray start` wants a token; a service that runs alone makes one of its own.
# All that is written lies below /tmp, /models and /results.
ENV PATH=/opt/stepserve/bin:$PATH \
    HOME=/tmp/home \
    HF_HOME=/models/hf \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/inductor \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    STEPSERVE_RESULTS__ADDRESS=/results
LABEL org.opencontainers.image.title="stepserve" \
      org.opencontainers.image.description="A diffusion-model server that batches at every denoising step" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
# Workers of Ray import from it: nobody but root can put modules there.
WORKDIR /srv
VOLUME ["/models", "/results"]
EXPOSE 8000 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:8000/healthz"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
# Anybody who reaches the port may call only if keys are given or STEPSERVE_HTTP__ALLOW_ANONYMOUS is.
CMD ["stepserve", "serve", "--host", "0.0.0.0"]

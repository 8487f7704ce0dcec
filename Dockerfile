# CUDA by default; for a CPU: --build-arg DEVICE=cpu --build-arg TORCH_INDEX_URL=<an index with CPU builds of torch>.
# What changes most comes last, so that a change of code rebuilds in seconds. See docker/README.md.
ARG BASE_IMAGE=debian:bookworm-slim
ARG DEVICE=cuda

FROM ${BASE_IMAGE} AS python
# More packages at run time, if any.
ARG EXTRA_PACKAGES=""
# hadolint ignore=DL3008,SC2086
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 ${EXTRA_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*


# pip, apart: it installs into /opt/venv, and the image goes without it.
FROM python AS pip
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv


# What the server asks for (not what its tests and benchmark do), with hashes; OpenVINO is the CPU's, and goes without what
# it reports to its makers. Torch's pin is a file of its own, so that a change of other pins leaves the largest layer alone.
FROM python AS pins
ARG DEVICE
COPY requirements.lock /torch.lock
COPY docker/requirements.lock /
RUN grep '^torch==' /torch.lock > /torch.txt \
    && awk -v device="${DEVICE}" '/^[^ ]/ { skip = /^openvino-telemetry/ || (device != "cpu" && /^openvino/) } !skip' /requirements.lock > /server.txt


# The image's own layers from here on, pip being lent to them: copied from elsewhere, /opt/venv would be one layer of
# gigabytes, stored twice and read again by every build.
FROM python AS dependencies
ARG DEVICE
ARG TORCH_INDEX_URL
ARG PIP_PYTHON=/opt/venv/bin/python
ARG PIP_NO_CACHE_DIR=1
COPY --from=pip /opt/venv /opt/venv
COPY --from=pins /torch.txt /opt/
RUN --mount=type=bind,from=pip,source=/opt/pip,target=/opt/pip \
    if [ "${DEVICE}" = cpu ] && [ -z "${TORCH_INDEX_URL}" ]; then \
        echo "DEVICE=cpu needs --build-arg TORCH_INDEX_URL=<an index with CPU builds of torch>" >&2; exit 2; \
    fi; \
    if [ -n "${TORCH_INDEX_URL}" ]; then \
        /opt/pip/bin/pip install --no-deps --index-url "${TORCH_INDEX_URL}" -r /opt/torch.txt; \
    else \
        /opt/pip/bin/pip install -r /opt/torch.txt; \
    fi
COPY --from=pins /server.txt /opt/
RUN --mount=type=bind,from=pip,source=/opt/pip,target=/opt/pip \
    /opt/pip/bin/pip install --require-hashes --no-deps -r /opt/server.txt


FROM pip AS code
RUN /opt/pip/bin/pip install --no-cache-dir 'setuptools>=77'
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY app app
RUN /opt/pip/bin/pip install --no-deps --no-build-isolation --target /opt/server . \
    && sed --in-place '1s|.*|#!/opt/venv/bin/python|' /opt/server/bin/sdxl-lightning


FROM dependencies AS server
LABEL org.opencontainers.image.title="sdxl-lightning-server" \
      org.opencontainers.image.description="An inference server for few-step text-to-image generation" \
      org.opencontainers.image.licenses="Apache-2.0"
# A named volume mounted on either folder takes over its owner, so that uid 10001 can write there.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin server \
    && install -d -o server -g server /var/cache/sdxl-lightning /var/lib/huggingface
COPY docker/healthcheck.py /opt/healthcheck.py
COPY --from=code /opt/server /opt/server
ENV PATH=/opt/server/bin:/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/server \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    DIFFUSERS_DISABLE_REMOTE_CODE=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HOST=0.0.0.0 \
    PORT=8000 \
    HOME=/tmp \
    USER=server \
    HF_HOME=/var/lib/huggingface \
    CACHE_DIR=/var/cache/sdxl-lightning
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Ready is more than alive: an orchestrator that can tell them apart restarts on /live. A first start may fetch weights.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10m --retries=3 CMD ["python", "/opt/healthcheck.py"]
ENTRYPOINT ["sdxl-lightning"]
CMD ["serve"]

# XPU workers (Intel GPUs). From the repository root:
#   docker build -f deploy/container/xpu.Dockerfile -t registry.example.com/quantfleet:0.1.0-xpu .

# Ray refuses nodes whose Python differs, to the last number: the three images have the same one.
FROM python:3.11.14-slim-trixie

# torch's wheels bring SYCL with them; the GPU's own half of Level Zero is the system's. Debian has
# it from its next release on: these packages, and what they need, are taken from there.
RUN echo 'deb http://deb.debian.org/debian forky main' > /etc/apt/sources.list.d/forky.list \
    && printf 'Package: *\nPin: release n=forky\nPin-Priority: 100\n' > /etc/apt/preferences.d/forky \
    && apt-get update \
    && apt-get install --yes --no-install-recommends --target-release forky \
        libigc2 libze-intel-gpu1 libze1 \
    && rm -rf /var/lib/apt/lists/*

# The registry's own torch is the CUDA build; `pip install .` below finds this one there.
RUN --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url https://download.pytorch.org/whl/xpu \
        "$(grep '^torch==' /constraints.txt)"

# rw: the build leaves files beside the source; they are thrown away with the mount.
RUN --mount=type=bind,target=/source,rw --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint /source/constraints.txt /source

# Kubernetes can tell that a user is not root only by a number.
RUN groupadd --gid 10001 quantfleet \
    && useradd --uid 10001 --gid 10001 --create-home quantfleet
USER 10001:10001
WORKDIR /home/quantfleet
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
CMD ["quantfleet", "--help"]

# CPU workers; also the head of every cluster and what submits its jobs. From the repository root:
#   docker build -f deploy/container/cpu.Dockerfile -t registry.example.com/quantfleet:0.1.0-cpu .

# Ray refuses nodes whose Python differs, to the last number: the three images have the same one.
FROM python:3.11.14-slim-trixie

# The registry's own torch brings gigabytes of CUDA; `pip install .` below finds this one there.
RUN --mount=type=bind,source=constraints.txt,target=/constraints.txt \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url https://download.pytorch.org/whl/cpu \
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

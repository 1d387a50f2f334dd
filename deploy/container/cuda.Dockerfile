# CUDA workers. From the repository root:
#   docker build -f deploy/container/cuda.Dockerfile -t registry.example.com/quantfleet:0.1.0-cuda .

# torch's wheels bring CUDA with them, and the host its driver: a CUDA base image adds nothing.
# Ray refuses nodes whose Python differs, to the last number: the three images have the same one.
FROM python:3.11.14-slim-trixie

# Triton compiles a launcher for each kernel, with a C compiler, when it is first called.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The registry's torch is the CUDA build. rw: what the build leaves goes with the mount.
RUN --mount=type=bind,target=/source,rw --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint /source/constraints.txt /source

# Kubernetes can tell that a user is not root only by a number.
RUN groupadd --gid 10001 quantfleet \
    && useradd --uid 10001 --gid 10001 --create-home quantfleet
USER 10001:10001
WORKDIR /home/quantfleet
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
CMD ["quantfleet", "--help"]

"""X^T X of a batch of layer inputs."""

from quantkernels.gram.reference import gram

__all__ = ["gram"]

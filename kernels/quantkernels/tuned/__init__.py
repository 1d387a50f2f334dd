"""Launches that were found best: JSON, one file a GPU, for `quantkernels.weight_only.configs`."""

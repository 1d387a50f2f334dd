"""Launches that were found best: JSON, one file a GPU, for `quantkernels.launches`."""

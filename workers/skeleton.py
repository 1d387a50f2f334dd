"""A transformers model without its weights: parameters on the meta device, buffers real."""

import contextlib
from typing import Any

import torch

from quantcore.errors import SourceError


def empty_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model that `config` describes; costs no memory for weights. Raises SourceError.

    Buffers that no checkpoint stores (rotary frequencies, embedding scales) are computed here
    by the model's own constructor, so they are what `from_pretrained` would have.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False), quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError, AttributeError) as error:
        kind = getattr(config, "model_type", "?")
        raise SourceError(f"model type '{kind}' is not a causal language model: {error}") from None
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Any:
    """Keep transformers' remarks about generation settings out of the terminal."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

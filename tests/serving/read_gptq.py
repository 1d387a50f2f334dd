"""Load a gptq folder and save the weights it stands for. Runs in GPTQModel's own environment.

    python read_gptq.py gptqmodel FOLDER OUT.safetensors
    python read_gptq.py transformers FOLDER OUT.safetensors     (with optimum)

OUT has every packed linear's weight, float16 (O, I), and the logits of token ids 2 to 33.
"""

import os
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file


def by_gptqmodel(folder: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel  # type: ignore[import-not-found]

    model = GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.GPTQ_TORCH)
    return model.model


def by_transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM, GPTQConfig

    # without this, a kernel is compiled for minutes; the rest of the config is the folder's own
    config = GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map="cpu", quantization_config=config
    )


def main(how: str, folder: str, out: str) -> None:
    model = {"gptqmodel": by_gptqmodel, "transformers": by_transformers}[how](folder)
    torch.compiler.set_stance("force_eager")
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    tensors = {name: module.dequantize_weight().t() for name, module in packed.items()}
    with torch.no_grad():
        tensors["logits"] = model(torch.arange(2, 34)[None]).logits
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])

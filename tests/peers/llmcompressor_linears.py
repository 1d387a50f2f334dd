"""llm-compressor's own code on single linears and small models. Runs in its environment.

    PYTHON llmcompressor_linears.py linears IN.safetensors OUT.safetensors
    PYTHON llmcompressor_linears.py smooth MODEL CALIBRATION.jsonl ALPHA OUT

`linears`: the metadata of IN names cases, each with a weight NAME.w, quantization arguments, and
for GPTQ a Hessian NAME.h. OUT has NAME.scale, NAME.zero, NAME.codes of plain rounding (int8; of
float8 its bits), and where there is a Hessian NAME.gptq, the values that GPTQ chose.

`smooth`: SmoothQuant, then W8A8 by plain rounding, activations by token; the model goes to OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import quantize
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def linears(source: str, target: str) -> None:
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    found: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as given:
        cases = json.loads(given.metadata()["cases"])
        for case in cases:
            name = case["name"]
            args = QuantizationArgs(**case["args"])
            w_OI = given.get_tensor(f"{name}.w")
            observer = Observer.load_from_registry(
                "memoryless_minmax", base_name="weight", args=args
            )
            qparams = observer(w_OI).get_qparams()
            scale, zero = qparams["scale"], qparams["zero_point"]
            stored = torch.float8_e4m3fn if args.type == "float" else torch.int8
            codes_OI = quantize(w_OI, scale, zero, args, dtype=stored)
            found |= {f"{name}.scale": scale, f"{name}.codes": codes_OI.view(torch.int8)}
            found[f"{name}.zero"] = zero.to(torch.int8)
            if not case["hessian"]:
                continue
            args.actorder = "static"  # the default of its GPTQModifier
            q_OI, _, fell_back = quantize_weight(
                weights=w_OI[None].clone(),
                hessians=given.get_tensor(f"{name}.h")[None].clone(),
                scale=scale[None],
                zero_point=zero[None],
                global_scale=None,
                quant_args=args,
            )
            assert not fell_back.any()
            found[f"{name}.gptq"] = q_OI[0]
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, target)


def smooth(folder: str, calibration: str, alpha: str, out: str) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = Path(calibration).read_text().splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    ones = [[1] * len(row) for row in rows]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": ones}),
        recipe=[
            SmoothQuantModifier(smoothing_strength=float(alpha)),
            QuantizationModifier(config_groups={"g": _w8a8()}, ignore=["lm_head"]),
        ],
        max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def _w8a8() -> QuantizationScheme:
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
    )
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"linears": linears, "smooth": smooth}[sys.argv[1]](*sys.argv[2:])

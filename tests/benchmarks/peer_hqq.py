"""The weights that hqq stores in the place of others: float zero points, groups along the inputs.

    PEER/bin/python peer_hqq.py WEIGHTS.safetensors OUT.safetensors BITS GROUP ROUND_ZERO

Runs in the peer's own environment, which does not have quantfleet. ROUND_ZERO is 0 or 1: whether
its iterations begin at a whole zero point, as its own configuration has it for 4 bits.
"""

import sys

import torch
from hqq.core.quantize import Quantizer
from safetensors.torch import load_file, save_file


def main() -> None:
    source, out = sys.argv[1:3]
    bits, group, round_zero = (int(word) for word in sys.argv[3:])
    stored = {}
    for name, w_OI in load_file(source).items():
        codes, meta = Quantizer.quantize(
            w_OI,
            nbits=bits,
            group_size=group,
            round_zero=bool(round_zero),
            axis=1,
            bitpack=False,
            device="cpu",
            compute_dtype=torch.float32,
        )
        groups = (codes.float().reshape(-1, group) - meta["zero"]) * meta["scale"]
        stored[name] = groups.reshape(w_OI.shape).contiguous()
    save_file(stored, out)


if __name__ == "__main__":
    main()

"""Settings of torch.compile that suit quantized models, for this process, applied once.

They are those of torchao's recommended_inductor_config_setter, with max_autotune and, where there
is no accelerator, freezing beside them. freezing counts in torch.no_grad() alone. It folds what
hangs on weights alone, so that a weight-only scheme in the plain layout is dequantized once, at
the size of a dense weight; other layouts, and schemes that round activations, stay as small as
they are. On a GPU that would cost the memory that was saved, and torch 2.11 puts products of 8-bit
integers into operators that only CPUs have.

To override one, set it after the first call, which is the only one that sets any:

    quantize_(model, "int4")
    torch._inductor.config.max_autotune = False

or pass inductor_settings=False to quantize_ and load.
"""

import torch

SETTINGS: dict[str, object] = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": True,
    "force_fuse_int_mm_with_mul": True,
    "freezing": True,
    "fx_graph_cache": True,
    "max_autotune": True,
    "triton.unique_kernel_names": True,
}
MATMUL_PRECISION = "high"  # float32 products of a GPU in TF32

_applied: list[bool] = []


def recommended_inductor_settings(*, again: bool = False) -> None:
    """Apply them, unless that was done before: what was overridden since stays so."""
    if _applied and not again:
        return
    import torch._inductor.config as inductor

    for name, value in SETTINGS.items():
        if name != "freezing" or not torch.accelerator.is_available():
            setattr(inductor, name, value)
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    _applied.append(True)

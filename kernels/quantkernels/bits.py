"""What decides the last bits of the Triton kernels: the order of their sums.

One value each, on every device. A job's contract can name `CONFIGURATION` as it stands; tile
shapes, warps and stages are left out because no sum depends on them.
"""

GRAM_STEP = 64  # tokens per matrix product
GRAM_PIECE = 16_384  # tokens summed in registers before they are added to what is there

SWEEP_COLUMNS = 16  # columns that a row keeps in registers
SWEEP_SPAN = 512  # columns between updates of everything after them
SWEEP_STEP = 32  # columns per matrix product of such an update
SWEEP_PRECISION = "bf16x3"  # of its products: two parts of each factor, three of four products

NORM_VALUES_PER_WARP = 512  # of a row, whose squares one warp sums

RANGE_CHUNK = 1024  # weights of a group whose errors are summed at once

CONFIGURATION: dict[str, int | str] = {
    "gram": f"{GRAM_STEP}/{GRAM_PIECE}",
    "sweep": f"{SWEEP_COLUMNS}/{SWEEP_SPAN}/{SWEEP_STEP}/{SWEEP_PRECISION}",
    "ranges": RANGE_CHUNK,
    "forward": f"norm {NORM_VALUES_PER_WARP}, rotary, silu",
}

"""The ways a quantized weight can lie in memory, and what may lie in which: one table.

    plain                codes row by row, as the native format stores them: int8, float8, or
                         4 bits two to a byte. Every scheme, any shape, any device
    tensor_core_tiled    4-bit codes in the tiles that tensor cores load (tinygemm), with scale and
                         zero point of a group side by side; w = q * s + z
    triton_tiled         codes of 4 or 8 bits in the tiles of our own Triton kernels, for any number
                         of tokens; scales and zero points in the scales' dtype, if floating
    int4_cpu             as tensor_core_tiled, for torch's CPU kernel; its bytes hang on the CPU
                         that packs them
    int4_dynamic_cpu     4-bit codes and scales as torch's CPU kernel for inputs in 8 bits wants
                         them; on ARM that is KleidiAI's. These bytes hang on the CPU as well, and
                         elsewhere than on ARM torch's kernel is a plain loop: write plain there
    sparse_24            of every four neighbours in a row the two that are not zero, and where they
                         stood: 8-bit codes of a pruned weight. Made dense again to be multiplied:
                         torch has no sparse kernel for integers but cuSPARSELt's
    sparse_24_cuda       the same, compressed by cuSPARSELt, which multiplies by it

Shape suffixes: O = out_features, I = in_features.
"""

from dataclasses import dataclass
from enum import StrEnum

from quantcore.schemes import Scheme, ZeroPoint


class Layout(StrEnum):
    PLAIN = "plain"
    TENSOR_CORE_TILED = "tensor_core_tiled"
    TRITON_TILED = "triton_tiled"
    INT4_CPU = "int4_cpu"
    INT4_DYNAMIC_CPU = "int4_dynamic_cpu"
    SPARSE_24 = "sparse_24"
    SPARSE_24_CUDA = "sparse_24_cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutRule:
    """What a layout can hold; an empty tuple means that anything will do."""

    zero_points: tuple[ZeroPoint, ...]
    schemes: tuple[str, ...] = ()
    group_sizes: tuple[int | None, ...] = ()  # None: whole rows
    group_multiple: int = 0  # or groups of any multiple of this; whole rows too
    rows_multiple: int = 1
    columns_multiple: int = 1
    dtypes: tuple[str, ...] = ()  # of what the weight reads back as
    devices: tuple[str, ...] = ()
    portable: bool = True  # whether its bytes mean the same on any machine


_INT4_GROUPS = (32, 64, 128, 256)

# The legal pairs of layout and zero point, with all else that a layout asks for
LAYOUTS: dict[Layout, LayoutRule] = {
    Layout.PLAIN: LayoutRule(zero_points=("none", "int", "float")),
    Layout.TENSOR_CORE_TILED: LayoutRule(
        zero_points=("none", "float"),
        schemes=("int4",),
        group_sizes=_INT4_GROUPS,
        rows_multiple=8,
        columns_multiple=32,
        dtypes=("bfloat16",),
    ),
    Layout.TRITON_TILED: LayoutRule(
        zero_points=("none", "int", "float"),
        schemes=("int4", "int8", "float8", "int8_dynamic_int4"),
        group_sizes=(None, 32, 64, 128, 256, 512, 1024),
        dtypes=("bfloat16", "float16"),
    ),
    Layout.INT4_CPU: LayoutRule(
        zero_points=("none", "float"),
        schemes=("int4",),
        group_sizes=_INT4_GROUPS,
        rows_multiple=16,
        dtypes=("bfloat16",),  # torch's kernel is a plain loop in others: 100 times slower
        devices=("cpu",),
        portable=False,
    ),
    Layout.INT4_DYNAMIC_CPU: LayoutRule(
        zero_points=("none",),
        schemes=("int8_dynamic_int4",),
        group_multiple=32,
        columns_multiple=2,
        dtypes=("float32",),
        devices=("cpu",),
        portable=False,
    ),
    Layout.SPARSE_24: LayoutRule(
        zero_points=("none",),
        schemes=("int8", "int8_dynamic", "int8_static"),
        columns_multiple=8,
    ),
    Layout.SPARSE_24_CUDA: LayoutRule(
        zero_points=("none",),
        schemes=("int8_dynamic", "int8_static"),
        rows_multiple=32,
        columns_multiple=32,
        devices=("cuda",),
        portable=False,
    ),
}


def refusal(
    layout: Layout, scheme: Scheme, shape: tuple[int, int], dtype: str, device: str
) -> str | None:
    """Why a weight cannot lie so, and what to write instead; None if it can."""
    rule = LAYOUTS[layout]
    if rule.schemes and scheme.name not in rule.schemes:
        return f"holds {' or '.join(rule.schemes)}, not {scheme.name}: write layout 'plain'"
    if scheme.zero_point not in rule.zero_points:
        return (
            f"has no place for a zero point of the kind '{scheme.zero_point}': write zero_point "
            f"{' or '.join(repr(zero) for zero in rule.zero_points)}, or layout 'plain'"
        )
    return _group_refusal(rule, scheme) or _tensor_refusal(rule, shape, dtype, device)


def _tensor_refusal(
    rule: LayoutRule, shape: tuple[int, int], dtype: str, device: str
) -> str | None:
    rows, columns = shape
    if rows % rule.rows_multiple or columns % rule.columns_multiple:
        return (
            f"needs rows by {rule.rows_multiple} and columns by {rule.columns_multiple}, not "
            f"{rows} by {columns}: write layout 'plain' for this weight"
        )
    if rule.dtypes and dtype not in rule.dtypes:
        return f"computes in {' or '.join(rule.dtypes)}, not {dtype}: write .to() that dtype first"
    if rule.devices and device not in rule.devices:
        return f"is of the {' or '.join(rule.devices)}, not of {device}: write layout 'plain'"
    return None


def _group_refusal(rule: LayoutRule, scheme: Scheme) -> str | None:
    size = scheme.group_size
    if rule.group_sizes and size not in rule.group_sizes:
        sizes = ", ".join(str(known) for known in rule.group_sizes if known)
        return f"has groups of {sizes}, not {scheme.label()}: write one of these group sizes"
    if rule.group_multiple and size is not None and size % rule.group_multiple:
        return (
            f"has groups of multiples of {rule.group_multiple}, not of {size}: write "
            f"group_size {rule.group_multiple}, or layout 'plain'"
        )
    return None

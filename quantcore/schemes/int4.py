"""Weight-only, 4 bits (W4A16)."""

from quantcore.schemes.kind import IntegerGrid, SchemeKind

KIND = SchemeKind(
    weights=IntegerGrid(4),
    activations=None,
    usual_span=128,
    spans=("group", "channel"),
    zero_points=("none", "int", "float"),
    summary="4-bit weights, activations untouched (W4A16)",
)

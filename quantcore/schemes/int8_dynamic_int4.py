"""4-bit weights with activations rounded to 8 bits while serving (8da4w)."""

from quantcore.schemes.kind import Activations, IntegerGrid, SchemeKind

KIND = SchemeKind(
    weights=IntegerGrid(4),
    activations=Activations(grid=IntegerGrid(8), symmetric=False),
    usual_span=32,
    spans=("group", "channel"),
    summary="4-bit weights, activations to 8 bits per token while serving (W4A8)",
)

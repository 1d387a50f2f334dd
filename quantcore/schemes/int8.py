"""8-bit integer weights: alone, or with activations rounded to 8 bits as well."""

from quantcore.schemes.kind import Activations, IntegerGrid, SchemeKind

WEIGHT_ONLY = SchemeKind(
    weights=IntegerGrid(8),
    activations=None,
    usual_span="channel",
    spans=("group", "channel"),
    zero_points=("none", "int", "float"),
    summary="8-bit weights, activations untouched (W8A16)",
)

DYNAMIC = SchemeKind(
    weights=IntegerGrid(8),
    activations=Activations(grid=IntegerGrid(8)),
    usual_span="channel",
    spans=("channel",),
    summary="8-bit weights per channel, activations to 8 bits per token while serving (W8A8)",
)

STATIC = SchemeKind(
    weights=IntegerGrid(8),
    activations=Activations(grid=IntegerGrid(8), static=True),
    usual_span="channel",
    spans=("channel",),
    summary="8-bit weights per channel, activations to 8 bits by one calibrated scale (W8A8)",
)

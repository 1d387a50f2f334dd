"""Weights in float8 (e4m3): alone, or with activations rounded to float8 as well.

Where weights have one scale for a whole tensor, so has each batch of activations; where they have
one per output channel, activations have one per token.
"""

from quantcore.schemes.kind import FLOAT8, Activations, SchemeKind

WEIGHT_ONLY = SchemeKind(
    weights=FLOAT8,
    activations=None,
    usual_span="channel",
    spans=("channel", "tensor"),
    summary="float8 weights, activations untouched (W8A16)",
)

DYNAMIC = SchemeKind(
    weights=FLOAT8,
    activations=Activations(grid=FLOAT8),
    usual_span="channel",
    spans=("channel", "tensor"),
    summary="float8 weights, activations to float8 while serving, by row or by tensor (W8A8)",
)

STATIC = SchemeKind(
    weights=FLOAT8,
    activations=Activations(grid=FLOAT8, static=True),
    usual_span="channel",
    spans=("channel", "tensor"),
    summary="float8 weights, activations to float8 by one calibrated scale (W8A8)",
)

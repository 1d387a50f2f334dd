"""How a weight lies for products with inputs in 8 bits: as it is stored, row by row.

Shape suffixes: O = out_features, I = in_features.
"""

from dataclasses import dataclass

from torch import Tensor

from quantkernels.launches import Codes


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight8:
    codes_OI: Tensor  # int8, or float8 e4m3; rows may lie apart
    scale_O: Tensor  # of any floating dtype
    kind: Codes  # int8 or float8
    features: tuple[int, int]  # (O, I)

    @property
    def group(self) -> int:
        return 0  # a row has one scale

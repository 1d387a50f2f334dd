"""What a product is handed, looked at before a kernel reads memory by it; what comes of nothing."""

import torch
from torch import Tensor

Features = tuple[int, int]  # (O, I) of a weight


def refuse_misfits(
    x_TI: Tensor, codes: Tensor, features: Features, bias_O: Tensor | None, of: str = "x"
) -> None:
    """Raises ValueError for inputs and biases that are not those of a weight of (O, I)."""
    rows, columns = features
    if x_TI.dim() != 2 or x_TI.shape[1] != columns:
        raise ValueError(
            f"{of} is {tuple(x_TI.shape)}: write (T, {columns}) for a weight of {rows} by {columns}"
        )
    if bias_O is not None and bias_O.shape != (rows,):
        raise ValueError(f"the bias is {tuple(bias_O.shape)}: write ({rows},), one for each row")
    for name, tensor in (("weight", codes), ("bias", bias_O)):
        if tensor is not None and tensor.device != x_TI.device:
            raise ValueError(
                f"{of} is on {x_TI.device} and the {name} on {tensor.device}: write .to() of one"
            )


def refuse_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}: write {' or '.join(map(str, dtypes))}")


def nothing(x_TI: Tensor, rows: int, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product where there are no tokens, rows or columns: the bias, if anything."""
    y_TO = x_TI.new_zeros(x_TI.shape[0], rows, dtype=dtype)
    return y_TO if bias_O is None else y_TO + bias_O.to(dtype)

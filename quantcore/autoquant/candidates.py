"""What a linear may become, and what of that is legal for its shape: no measuring here.

A candidate is a scheme in a layout, or the dense weight as it is. Which there are is a table of
classes of schemes, as named in a job file, times the layouts that take them (tensors/layouts.py).
Those that no kernel multiplies by (tensors/kernels.py) are legal, but marked: the plain reference
makes the weight dense at each call, so they save bytes and no time.

Layouts for pruned weights are in no class: pruning changes values, which is no choice of speed.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantcore.errors import SpecError
from quantcore.schemes import SCHEME_KINDS, Scheme, every_form
from quantcore.tensors.kernels import KERNELS
from quantcore.tensors.layouts import Layout, refusal
from quantcore.tensors.tensor import Facts, QuantizedTensor

DENSE_LABEL = "dense"
_PRUNED = (Layout.SPARSE_24, Layout.SPARSE_24_CUDA)
_INT4_GROUPS = (32, 64, 128)

# By the names that a job file takes; the dense weight belongs to each
CLASSES: dict[str, tuple[Scheme, ...]] = {
    "default": (Scheme(name="int8"), Scheme(name="int8_dynamic")),
    "int4": (
        *(
            Scheme(name="int4", group_size=size, zero_point=zero)
            for size in _INT4_GROUPS
            for zero in SCHEME_KINDS["int4"].zero_points
        ),
        Scheme(name="int8_dynamic_int4", group_size=32),
    ),
    "float8": (
        Scheme(name="float8"),
        Scheme(name="float8_dynamic"),
        Scheme(name="float8_dynamic", per_tensor=True),
    ),
    "all": tuple(form for name in SCHEME_KINDS for form in every_form(name, _INT4_GROUPS)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    scheme: Scheme | None  # None: the weight as it is, in the model's dtype
    layout: Layout = Layout.PLAIN

    def __post_init__(self) -> None:
        if self.scheme is None and self.layout != Layout.PLAIN:
            raise ValueError(f"a dense weight has no layout {self.layout}: leave it out")

    def label(self) -> str:
        """In documents: `int4 asym g64 triton_tiled`, `dense`. `candidate_of` reads it."""
        return DENSE_LABEL if self.scheme is None else f"{self.scheme.label()} {self.layout}"


DENSE = Candidate(scheme=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    candidate: Candidate
    by_reference: bool  # whether no kernel takes it


def candidate_of(label: str) -> Candidate:
    """The candidate with this label; ValueError where there is none."""
    if label == DENSE_LABEL:
        return DENSE
    name, _, rest = label.partition(" ")
    span, layout = rest.split(" ")[-2:] if " " in rest else ("", "")
    if name in SCHEME_KINDS and layout in list(Layout):
        sizes = [int(span[1:])] if span[:1] == "g" and span[1:].isdecimal() else []
        for scheme in every_form(name, sizes):
            candidate = Candidate(scheme=scheme, layout=Layout(layout))
            if candidate.label() == label:
                return candidate
    raise ValueError(f"no candidate is called '{label}'")


def schemes_of(classes: Iterable[str]) -> list[Scheme]:
    """Those of the classes named, each once, in their order. Raises SpecError for another name."""
    schemes: dict[Scheme, None] = {}
    for name in classes:
        if name not in CLASSES:
            raise SpecError(f"candidates: unknown class '{name}': write {' or '.join(CLASSES)}")
        schemes |= dict.fromkeys(CLASSES[name])
    return list(schemes)


def candidates_of(schemes: Iterable[Scheme]) -> list[Candidate]:
    """The dense weight, then each scheme in each layout that some weight of it could have."""
    layouts = [layout for layout in Layout if layout not in _PRUNED]
    pairs = [Candidate(scheme=scheme, layout=layout) for scheme in schemes for layout in layouts]
    return [DENSE, *pairs]


def refused(candidate: Candidate, features: tuple[int, int], dtype: str, device: str) -> str | None:
    """Why a linear with so many (outputs, inputs) cannot become it; None if it can."""
    scheme, columns = candidate.scheme, features[1]
    if scheme is None:
        return None
    if scheme.group_size is not None and columns % scheme.group_size:
        return f"has groups of {scheme.group_size}, which do not divide {columns} inputs"
    return refusal(candidate.layout, scheme, features, dtype, device)


def offers(
    candidates: Iterable[Candidate], features: tuple[int, int], dtype: str, device: str
) -> list[Offer]:
    """What is legal for a linear of (outputs, inputs), in the order given."""
    return [
        Offer(
            candidate=candidate,
            by_reference=not has_kernel(candidate, features, dtype, device),
        )
        for candidate in candidates
        if refused(candidate, features, dtype, device) is None
    ]


def worth_timing(offered: Iterable[Offer]) -> list[Offer]:
    """Without what can't win: the reference is as slow in every layout, and slower than a kernel.

    A scheme that no kernel takes at all stays, plain: it may still be wanted for its bytes.
    """
    offered = list(offered)
    fast = {offer.candidate.scheme for offer in offered if not offer.by_reference}
    return [
        offer
        for offer in offered
        if not offer.by_reference
        or (offer.candidate.layout == Layout.PLAIN and offer.candidate.scheme not in fast)
    ]


def has_kernel(candidate: Candidate, features: tuple[int, int], dtype: str, device: str) -> bool:
    """Whether a product runs on a kernel: asked of the kernels' own rules, with empty tensors.

    Scales are taken to be in the weight's dtype, as artifacts and `quantize_` keep them.
    """
    if candidate.scheme is None:
        return True
    kind = getattr(torch, dtype)
    rows, columns = features
    inner = {
        "codes": torch.empty(rows, columns, dtype=torch.int8, device="meta"),
        "scale": torch.empty(rows, candidate.scheme.groups_of(columns), dtype=kind, device="meta"),
    }
    facts = Facts(scheme=candidate.scheme, layout=candidate.layout, features=features, dtype=kind)
    weight = QuantizedTensor(inner, facts)
    x_TI = torch.empty(1, columns, dtype=kind, device="meta")
    key = (device, candidate.layout, candidate.scheme.name)
    return any(kernel.takes(x_TI, weight) for kernel in KERNELS.get(key, ()))

"""The rows of the table of schemes, and the order that they should come in.

A row is a job file's `quantization` section, named by the scheme's label and the method. Grids
times methods, and a few plans that mix schemes; what a method is no use for is left out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

from jobs.spec import Method, QuantizationSpec
from quantcore.schemes import IntegerGrid, Scheme

Words = dict[str, Any]

GROUPS = (32, 64, 96, 192)  # that divide the widths of SmolLM2-135M, 576 and 1,536

FORMS: tuple[Words, ...] = (
    {"scheme": "int8"},
    {"scheme": "int8", "group_size": 64},
    {"scheme": "int8", "symmetric": False},
    {"scheme": "int8", "symmetric": False, "zero_point": "float"},
    *({"scheme": "int4", "group_size": size} for size in (*GROUPS, "channel")),
    *({"scheme": "int4", "group_size": size, "symmetric": False} for size in (32, 64, "channel")),
    *({"scheme": "int4", "group_size": size, "zero_point": "float"} for size in (32, 64)),
    {"scheme": "float8"},
    {"scheme": "float8", "group_size": "tensor"},
    {"scheme": "int8_dynamic"},
    {"scheme": "int8_static"},
    *({"scheme": "int8_dynamic_int4", "group_size": size} for size in (32, 64, "channel")),
    {"scheme": "float8_dynamic"},
    {"scheme": "float8_dynamic", "group_size": "tensor"},
    {"scheme": "float8_static"},
    {"scheme": "float8_static", "group_size": "tensor"},
)

METHODS: dict[str, Words] = {
    "rtn": {"method": "rtn"},
    "hqq": {"method": "hqq"},
    "gptq minmax": {"method": "gptq", "range": "minmax"},
    "gptq": {"method": "gptq"},
    "smoothquant 0.5": {"method": "smoothquant", "smoothquant": {"alpha": 0.5}},
    "smoothquant": {"method": "smoothquant"},
    "smoothquant inputs": {
        "method": "smoothquant",
        "smoothquant": {"without_norm": "input_factor"},
    },
    "smoothquant gptq": {"method": "smoothquant", "smoothquant": {"rounding": "gptq"}},
}

_SMOOTHED = ("smoothquant", "smoothquant gptq")  # the other two ways: of W8A8 alone
_DOWN = "*.mlp.down_proj"
MIXED: dict[str, Words] = {
    "int4 sym g64, down_proj int8": {"overrides": [{"match": _DOWN, "scheme": "int8"}]},
    "int4 sym g64, down_proj g32": {"overrides": [{"match": _DOWN, "group_size": 32}]},
    "int4 sym g64, first block int8": {"overrides": [{"match": "*.layers.0.*", "scheme": "int8"}]},
    "int4 sym g64, mlp int8_dynamic": {
        "overrides": [{"match": "*.mlp.*", "scheme": "int8_dynamic"}]
    },
}


@dataclass(frozen=True, slots=True)
class Row:
    form: str  # the scheme's label, or what a mixed plan is called
    method: str
    quantization: Mapping[str, Any]
    scheme: Scheme | None  # None: mixed

    @property
    def name(self) -> str:
        return f"{self.form} {self.method}"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows of which the first should lose no more than the second."""

    better: str
    worse: str
    claim: str


def rows() -> list[Row]:
    return [*_plain(), *_mixed()]


def pairs() -> list[Pair]:
    known = {row.name for row in rows()}
    every = (*_methods(), *_grids())
    return [pair for pair in every if {pair.better, pair.worse} <= known]


def _plain() -> Iterator[Row]:
    for form in FORMS:
        words = {"symmetric": "zero_point" not in form, **form}
        scheme = QuantizationSpec(**words, method="rtn").scheme_of()
        for method, more in METHODS.items():
            if _serves(method, scheme):
                yield Row(scheme.label(), method, {**words, **more}, scheme)


def _mixed() -> Iterator[Row]:
    for name, words in MIXED.items():
        for method in ("rtn", "gptq"):
            section = {"scheme": "int4", "group_size": 64, **METHODS[method], **words}
            yield Row(name, method, section, None)


def _serves(method: str, scheme: Scheme) -> bool:
    word = METHODS[method]["method"]
    if word not in get_args(Method):
        return False
    if method == "gptq minmax":  # where no range is searched, it would be the same row
        return scheme.searchable and scheme.activations is None
    if word == "hqq":
        return isinstance(scheme.grid, IntegerGrid)
    if word == "smoothquant":
        return scheme.activations is not None and (method in _SMOOTHED or _w8a8(scheme))
    return True


def _w8a8(scheme: Scheme) -> bool:
    return scheme.bits == 8 and isinstance(scheme.grid, IntegerGrid)


def _methods() -> Iterator[Pair]:
    for form in dict.fromkeys(row.form for row in rows()):
        for better, worse in (
            ("gptq", "rtn"),
            ("gptq", "gptq minmax"),
            ("gptq minmax", "rtn"),
            ("hqq", "rtn"),
            ("smoothquant 0.5", "rtn"),
            ("smoothquant", "rtn"),
            ("smoothquant", "smoothquant 0.5"),
            ("smoothquant inputs", "smoothquant"),
            ("smoothquant gptq", "smoothquant"),
            ("smoothquant gptq", "gptq"),
        ):
            yield Pair(f"{form} {better}", f"{form} {worse}", f"{better} below {worse}")


def _grids() -> Iterator[Pair]:
    for better, worse, claim in (
        ("int8 sym channel", "int4 sym g32", "8 bits below 4"),
        ("int8 sym g64", "int8 sym channel", "groups below channels"),
        ("int8 asym channel", "int8 sym channel", "a zero point below none"),
        *(
            (f"{name} {finer}", f"{name} {coarser}", "finer groups below coarser")
            for name, spans in (
                ("int4 sym", [*(f"g{size}" for size in GROUPS), "channel"]),
                ("int4 asym", ["g32", "g64", "channel"]),
                ("int4 float-zero", ["g32", "g64"]),
                ("int8_dynamic_int4 sym", ["g32", "g64", "channel"]),
            )
            for finer, coarser in pairwise(spans)
        ),
        *((f"int4 asym {g}", f"int4 sym {g}", "a zero point below none") for g in ("g32", "g64")),
        ("float8 channel", "float8 tensor", "a scale per row below one per tensor"),
        ("float8_dynamic channel", "float8_dynamic tensor", "per row below per tensor"),
        ("float8_static channel", "float8_static tensor", "per row below per tensor"),
        ("float8_dynamic channel", "float8_static channel", "scales by token below one"),
        ("int8_dynamic sym channel", "int8_static sym channel", "scales by token below one"),
        ("int8 sym channel", "int8_dynamic sym channel", "activations left below rounded"),
        ("int4 sym g32", "int8_dynamic_int4 sym g32", "activations left below rounded"),
        ("float8 channel", "float8_dynamic channel", "activations left below rounded"),
        *((name, "int4 sym g64", "a mixed plan below its base") for name in list(MIXED)[:3]),
    ):
        for method in METHODS:
            yield Pair(f"{better} {method}", f"{worse} {method}", claim)

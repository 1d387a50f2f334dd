"""A module's linears quantized in place, in one line.

    quantize_(model, "int4", group_size=64)
    quantize_(model, "int8_dynamic", method="smoothquant", recorder=recorder)

Their weights become quantized tensors (tensors/); the modules stay the nn.Linear that they were.
Called again with another filter it gives other linears another scheme: any stands beside any.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from quantcore.errors import QuantizationError
from quantcore.inductor import recommended_inductor_settings
from quantcore.methods import METHODS, Options, Readers, needed, refuse_unknown
from quantcore.norms import norm_rule
from quantcore.recorder import InputStatistics
from quantcore.schemes import SCHEME_KINDS, Scheme, dividing_group_sizes, resolve_scheme
from quantcore.smoothing import FoldedNorm, StoredNorm
from quantcore.tensors import Layout, QuantizedTensor, relayout

Filter = Callable[[str, nn.Module], bool]


def quantize_(  # noqa: PLR0913 - one call has all there is to say
    model: nn.Module,
    scheme: str | Scheme,
    filter: Filter | None = None,  # noqa: A002 - the word for it everywhere
    *,
    group_size: int | Literal["channel", "tensor"] | None = None,
    zero_point: Literal["int", "float"] | None = None,
    method: str = "rtn",
    recorder: Mapping[str, InputStatistics] | None = None,
    layout: Layout | str = Layout.PLAIN,
    options: Options | None = None,
    norms: Mapping[str, str] | None = None,
    inductor_settings: bool = True,
) -> list[str]:
    """Quantize the weights of linears in place; the names of those that were, in their order.

    `filter` says by name and module which: by default each nn.Linear, but not the one that gives
    a language model's logits, nor any that is quantized already. `scheme` is a name, with
    `group_size` and `zero_point` as in a job file, or a Scheme. `recorder` has seen the model's
    inputs, for methods and static schemes that need to know them: a Recorder, or statistics by
    linear that come from elsewhere. `norms` names norms and, for each, one linear that it feeds:
    SmoothQuant's factors then go into the norm, else they stay on the inputs.
    `inductor_settings=False` leaves torch.compile's settings alone (inductor.py).

    Nothing is changed unless all can be. Raises QuantizationError, which names the linear and what
    to write instead.
    """
    scheme = _resolved(scheme, group_size, zero_point)
    options = options or Options()
    refuse_unknown(method, scheme)
    picked = linears_of(model, filter)
    for name, linear in picked.items():
        _refuse_shape(name, linear, scheme)
    needs = needed(method, scheme, options)
    _refuse_unrecorded(picked, needs, recorder, method, scheme)
    groups = list(_groups(picked, recorder if needs else None))
    stored = _norms(model, norms or {}, groups, method)
    weights: dict[str, QuantizedTensor] = {}
    folded: list[tuple[nn.Module, FoldedNorm]] = []
    with torch.no_grad():
        for names, statistics in groups:
            norm, kept = stored.get(names[0], (None, None))
            dense = {name: picked[name].weight.detach() for name in names}
            try:
                chosen = METHODS[method].run(Readers(dense, scheme, statistics, kept), options)
                for name, codes in chosen.linears.items():
                    tensor = QuantizedTensor.of(codes, dense[name].dtype)
                    weights[name] = relayout(tensor, layout)
            except QuantizationError as error:
                raise type(error)(f"'{names[0]}': {error}") from None
            if norm is not None and chosen.norm is not None:
                folded.append((norm, chosen.norm))
        for name, weight in weights.items():
            picked[name].weight = nn.Parameter(weight, requires_grad=False)
        for norm, became in folded:
            norm.get_parameter("weight").copy_(became.weight_I)
            if became.bias_I is not None:
                norm.get_parameter("bias").copy_(became.bias_I)
    if inductor_settings:
        recommended_inductor_settings()
    return list(picked)


def _resolved(
    scheme: str | Scheme,
    group_size: int | Literal["channel", "tensor"] | None,
    zero_point: Literal["int", "float"] | None,
) -> Scheme:
    if isinstance(scheme, Scheme):
        if group_size is not None or zero_point is not None:
            raise QuantizationError(
                "group_size, zero_point: the Scheme has its own: write them within it"
            )
        return scheme
    if scheme not in SCHEME_KINDS:
        raise QuantizationError(f"scheme: unknown '{scheme}': write {' or '.join(SCHEME_KINDS)}")
    try:
        return resolve_scheme(scheme, group_size, zero_point is None, zero_point)
    except ValueError as error:
        raise QuantizationError(str(error)) from None


def linears_of(model: nn.Module, wanted: Filter | None) -> dict[str, nn.Linear]:
    """Those that a filter picks, by name; without one, what `quantize_` takes by itself."""
    picked: dict[str, nn.Linear] = {}
    head_of: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = head_of()
    for name, module in model.named_modules():
        if wanted is None:
            done = isinstance(getattr(module, "weight", None), QuantizedTensor)
            if isinstance(module, nn.Linear) and module is not head and not done:
                picked[name] = module
        elif wanted(name, module):
            if not isinstance(module, nn.Linear):
                raise QuantizationError(
                    f"'{name}' is a {type(module).__name__}: write a filter that picks nn.Linear"
                )
            if isinstance(module.weight, QuantizedTensor):
                raise QuantizationError(
                    f"'{name}' is quantized already: write a filter that leaves it out"
                )
            picked[name] = module
    if not picked:
        raise QuantizationError("filter: no linear is left to quantize: write another one")
    return picked


def _refuse_shape(name: str, linear: nn.Linear, scheme: Scheme) -> None:
    width, size = linear.in_features, scheme.group_size
    if linear.weight.is_meta:
        raise QuantizationError(f"'{name}' has no weights yet: load them first")
    if not linear.weight.isfinite().all():
        raise QuantizationError(f"'{name}' has weights that are not finite: leave it out by filter")
    if size is not None and width % size:
        known = dividing_group_sizes(width)
        usable = f"write {' or '.join(map(str, known))}" if known else "no usual one does"
        raise QuantizationError(
            f"'{name}' reads {width} inputs, which groups of {size} do not divide: {usable}, or "
            "'channel' where the scheme has it"
        )


def _refuse_unrecorded(
    picked: Mapping[str, nn.Linear],
    needs: set[str],
    recorder: Mapping[str, InputStatistics] | None,
    method: str,
    scheme: Scheme,
) -> None:
    if not needs:
        return
    why = f"{method} of {scheme.name} needs {' and '.join(sorted(needs))} of each linear's inputs"
    if recorder is None:
        raise QuantizationError(f"recorder: {why}: write recorder=Recorder(model), run before")
    for name in picked:
        if name not in recorder:
            raise QuantizationError(f"recorder: {why}, and '{name}' was not called: run it first")
        if missing := [need for need in needs if getattr(recorder[name], need) is None]:
            raise QuantizationError(f"recorder: {why}: write Recorder(..., {missing[0]}=True)")


def _groups(
    picked: Mapping[str, nn.Linear], recorder: Mapping[str, InputStatistics] | None
) -> Iterator[tuple[list[str], InputStatistics | None]]:
    """Linears that share their inputs together, if it matters, or one by one."""
    if recorder is None:
        for name in picked:
            yield [name], None
        return
    done: set[str] = set()
    for name in picked:
        if name not in done:
            statistics = recorder[name]
            names = [linear for linear in statistics.linears if linear in picked]
            done.update(names)
            yield names, statistics


def _norms(
    model: nn.Module,
    norms: Mapping[str, str],
    groups: list[tuple[list[str], InputStatistics | None]],
    method: str,
) -> dict[str, tuple[nn.Module, StoredNorm]]:
    """Each norm by the first of the linears that read it."""
    if norms and method != "smoothquant":
        raise QuantizationError(f"norms: {method} changes none: write method='smoothquant'")
    stored = {}
    for norm_name, fed in norms.items():
        group = next(((names, seen) for names, seen in groups if fed in names), None)
        if group is None:
            raise QuantizationError(f"norms: '{fed}' is not among the linears to quantize")
        names, seen = group
        assert seen is not None
        if left := [name for name in seen.linears if name not in names]:
            raise QuantizationError(
                f"norms: '{norm_name}' feeds '{left[0]}' too: write a filter that picks it as well"
            )
        norm = model.get_submodule(norm_name)
        rule = norm_rule(norm)
        if rule is None:
            raise QuantizationError(f"norms: '{norm_name}' has no weight to fold factors into")
        bias_I = getattr(norm, "bias", None)
        stored[names[0]] = (norm, StoredNorm(norm.get_parameter("weight"), bias_I, rule))
    return stored

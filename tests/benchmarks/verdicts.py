"""Whether rows of the table of schemes come in the order that they should, and the table itself.

For two rows, d is the difference of their mean losses, piece by piece of the evaluated text, and
its standard error is that of the mean over pieces. A pair keeps to its order if d <= 0; it is level
if d is below two standard errors; else the order is broken.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.benchmarks.scheme_rows import Pair

Word = Literal["holds", "level", "broken"]


@dataclass(frozen=True, slots=True)
class Verdict:
    pair: Pair
    loss: Word
    difference: float  # of the mean loss in nats, better minus worse
    standard_error: float
    output_error: bool | None  # whether the better has the smaller one


def judge(pairs: Iterable[Pair], results: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Of the pairs that were both measured."""
    return [
        _judged(pair, results[pair.better], results[pair.worse])
        for pair in pairs
        if pair.better in results and pair.worse in results
    ]


def _judged(pair: Pair, better: Mapping[str, Any], worse: Mapping[str, Any]) -> Verdict:
    apart = [b - w for b, w in zip(better["losses"], worse["losses"], strict=True)]
    difference = statistics.fmean(apart)
    error = statistics.stdev(apart) / len(apart) ** 0.5
    word: Word = "broken"
    if difference <= 0:
        word = "holds"
    elif difference < 2 * error:
        word = "level"
    return Verdict(pair, word, difference, error, better["output_error"] <= worse["output_error"])


def as_markdown(
    names: Sequence[tuple[str, str, str]], known: Mapping[str, Any], verdicts: Sequence[Verdict]
) -> str:
    """`names` are (row, scheme, method), in the order of the table."""
    results = known["rows"]
    lines = [
        "| scheme | method | bits | perplexity | output error | weight error | MB | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if "original" in results:
        original = results["original"]
        size = original["file_bytes"] / 1e6
        lines.append(f"| original | | | {original['perplexity']:.2f} | | | {size:.1f} | |")
    for name, scheme, method in names:
        if name in results:
            lines.append(_line(scheme, method, results[name]))
    for word, title in (
        ("holds", "keep to the order"),
        ("level", "are level, within two standard errors"),
        ("broken", "do not keep to it"),
    ):
        some = [verdict for verdict in verdicts if verdict.loss == word]
        lines += ["", f"{len(some)} of {len(verdicts)} pairs {title}."]
        lines += [_story(verdict) for verdict in some if word != "holds"]
    errors = [verdict for verdict in verdicts if not verdict.output_error]
    lines += ["", f"{len(errors)} of {len(verdicts)} pairs have the larger output error first."]
    lines += [f"- {v.pair.better}, {v.pair.worse} ({v.pair.claim})" for v in errors]
    return "\n".join(lines) + "\n"


def _line(scheme: str, method: str, result: Mapping[str, Any]) -> str:
    columns = (
        scheme,
        method,
        f"{result['bits']:.2f}",
        f"{result['perplexity']:.2f}",
        f"{result['output_error']:.4f}",
        f"{result['weight_error']:.4f}",
        f"{result['file_bytes'] / 1e6:.1f}",
        f"{result['seconds']:.0f}",
    )
    return f"| {' | '.join(columns)} |"


def _story(verdict: Verdict) -> str:
    pair = verdict.pair
    apart = f"{verdict.difference:+.4f} nats, standard error {verdict.standard_error:.4f}"
    return f"- {pair.better}, {pair.worse} ({pair.claim}): {apart}"

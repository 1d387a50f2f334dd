"""The integer program where its solver is not to be trusted, and where there is little to solve."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
from scipy import optimize

from quantcore.autoquant import program
from quantcore.autoquant.options import Time, may_tie
from quantcore.autoquant.program import Program
from quantcore.errors import QuantizationError

# 3 layers of 3 options; the relaxation is split, and its best rounding is not the best plan
COSTS = {
    "time": [[9.0, 5.0, 1.0], [9.1, 4.9, 1.2], [8.9, 5.2, 0.9]],
    "error": [[0.0, 3.0, 10.0], [0.0, 3.1, 10.2], [0.0, 2.9, 10.1]],
}


def test_an_answer_past_a_limit_is_ruled_out_and_the_solver_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest, asked = program.milp, []

    def lax(value_V: Any, *, constraints: list[Any], **rest: Any) -> Any:
        """Knows one row for each layer, and what was ruled out; of limits nothing."""
        asked.append(len(constraints))
        return honest(value_V, constraints=[constraints[0], *constraints[2:]], **rest)

    expected = {limit: Program(COSTS).least(["time"], {"error": limit}) for limit in (7.0, 13.5)}
    monkeypatch.setattr(program, "milp", lax)
    monkeypatch.setattr(program, "_no_dearer", _everything)
    for limit, picks in expected.items():
        asked.clear()
        found = Program(COSTS).least(["time"], {"error": limit})
        assert found is not None
        assert picks is not None
        assert Program(COSTS).total("time", found) == pytest.approx(_total("time", picks))
        assert _total("error", found) <= limit
        assert len(asked) > 1


def _total(name: str, picks: tuple[int, ...]) -> float:
    return sum(of[at] for of, at in zip(COSTS[name], picks, strict=True))


def _everything(scaled: Any, multiplier_R: Any, picks: Any) -> list[list[int]]:
    return [[option for of, option in scaled.pairs if of == layer] for layer in range(len(picks))]


def test_a_solver_that_gives_no_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        status, x, message = 4, None, "numerical trouble"

    monkeypatch.setattr(program, "linprog", lambda *_, **__: Nothing())
    with pytest.raises(QuantizationError, match="the solver gave no plan: numerical trouble"):
        Program(COSTS).least(["time"], {"error": 7.0})


def test_what_solvers_print_by_themselves_is_no_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def talkative(name: str) -> Callable[..., Any]:
        honest = getattr(optimize, name)

        def solve(*args: Any, **rest: Any) -> Any:
            ctypes.CDLL(None).printf(f"HiGHS says this in {name}\n".encode())
            return honest(*args, **rest)

        return solve

    for name in ("linprog", "milp"):
        monkeypatch.setattr(optimize, name, talkative(name))
    monkeypatch.setattr(program, "_no_dearer", _everything)
    assert Program(COSTS).least(["time"], {"error": 7.0}) is not None
    print("the result", flush=True)
    told = capfd.readouterr()
    assert told.out == "the result\n"
    assert set(told.err.splitlines()) == {"HiGHS says this in linprog", "HiGHS says this in milp"}


def test_without_limits_each_layer_takes_its_least() -> None:
    assert Program(COSTS).least(["time"], {}) == (2, 2, 2)
    assert Program(COSTS).least(["error", "time"], {}) == (0, 0, 0)
    assert Program(COSTS).least(["time"], {"error": 0.0}) == (0, 0, 0)
    assert Program(COSTS).least(["time"], {"error": 0.0, "time": 26.0}) is None


def test_times_may_tie_up_to_twice_what_their_intervals_span() -> None:
    one = Time(time_us=10.0, low_us=9.0, high_us=10.5)

    def other(time_us: float) -> Time:
        return Time(time_us=time_us, low_us=time_us - 0.25, high_us=time_us + 7)

    for time_us, tie in ((11.4, True), (11.5, True), (11.6, False)):
        assert may_tie(one, other(time_us)) is tie
        assert may_tie(other(time_us), one) is tie
    exact = Time(time_us=10.0, low_us=10.0, high_us=10.0)
    assert may_tie(exact, exact)

import pytest

from jobs.match import compile_pattern, matches

NAME = "model.layers.11.mlp.down_proj"


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        (NAME, True),
        ("*.down_proj", True),
        ("*", True),
        ("model.layers.1?.mlp.*", True),
        ("model.layers.[0-1]1.*", True),
        ("down_proj", False),
        ("model.layers.1.*", False),
        ("*.DOWN_PROJ", False),
        ("*.mlp", False),
        (r"re:.*\.(down|up)_proj", True),
        (r"re:model\.layers\.(1[0-9])\..*", True),
        ("re:down_proj", False),
        ("re:model", False),
        (r"re:.*\.layers\.1\..*", False),
        ("re:", False),
    ],
)
def test_patterns_match_whole_names(pattern: str, hit: bool) -> None:
    assert matches(pattern, NAME) is hit


def test_dots_of_a_glob_are_dots() -> None:
    assert not matches("a.b", "aXb")
    assert matches("re:a.b", "aXb")


@pytest.mark.parametrize(
    "pattern", ["", "re:(", "re:[", "re:*", "re:a{99999999999999999999}", r"re:(?P<a>x)(?P<a>y)"]
)
def test_what_cannot_be_a_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="regular expression"):
        compile_pattern(pattern)


@pytest.mark.parametrize("glob", ["[", "[a", "(", "a{9", "\\"])
def test_any_glob_is_a_pattern(glob: str) -> None:
    assert matches(glob, glob)

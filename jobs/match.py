"""Which modules an override speaks of: a glob, or re: and a regular expression, over full names."""

import fnmatch
import re


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Raise ValueError, with what to write instead, for a pattern that cannot be one."""
    if not pattern:
        raise ValueError("write a glob such as '*.down_proj', or re: and a regular expression")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        return re.compile(pattern[3:])
    except (re.error, OverflowError) as error:  # OverflowError: a{99999999999}
        raise ValueError(f"not a regular expression: {error}") from None


def matches(pattern: str, name: str) -> bool:
    return compile_pattern(pattern).fullmatch(name) is not None

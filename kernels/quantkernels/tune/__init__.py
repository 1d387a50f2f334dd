"""The search for launches: `__main__.py` is the command, `subjects.py` what it searches for."""

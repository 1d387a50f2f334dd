"""The search for launches: `__main__.py` is the command, `subjects.py` what it searches for."""

# Llama-3.1-8B's and -70B's, Qwen2.5-7B's: rows by columns, projections that share inputs as one
SHAPES = [
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096),
    (10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672),
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),
]  # fmt: skip

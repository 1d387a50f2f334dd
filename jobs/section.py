"""A section of the job file, and the places that sections name: frozen, unknown keys refused."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _store(text: str) -> str:
    scheme = _scheme(text)
    if scheme not in {"", "file", "s3"}:
        raise ValueError(f"cannot store to '{scheme}://': write a folder or s3://bucket/path")
    return _bucket_named(text)


def _model(text: str) -> str:
    scheme = _scheme(text) if "://" in text else ""
    if scheme not in {"", "s3"}:
        raise ValueError(
            f"cannot read a model from '{scheme}://': write a folder, a .gguf file or s3://bucket/path"
        )
    if scheme == "s3" and text.endswith(".gguf"):
        raise ValueError(
            "a .gguf file is read from a local disk alone: download it, or name the folder of the "
            "model that it was made from"
        )
    return _bucket_named(text)


def _plan(text: str) -> str:
    scheme = _scheme(text)
    if scheme not in {"", "file", "s3"}:
        raise ValueError(
            f"cannot read a plan from '{scheme}://': write a file, or s3://bucket/path/plan.json"
        )
    return _bucket_named(text)


def _scheme(text: str) -> str:
    """As written: S3:// is not s3://."""
    return text.partition(":")[0] if urlsplit(text).scheme else ""


def _bucket_named(text: str) -> str:
    """The text itself, if it is no s3:// or one without credentials in it."""
    parts = urlsplit(text)
    bucket = parts.netloc  # a secret with a slash in it ends up here, after AKIA...:
    if parts.scheme == "s3" and ("@" in bucket or (":" in bucket and bucket[:4] != "arn:")):
        raise ValueError(
            "keep credentials out of the job file: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if parts.scheme == "s3" and not parts.netloc:
        raise ValueError("name the bucket: s3://bucket/path")
    return text


StoreUrl = Annotated[str, Field(min_length=1), AfterValidator(_store)]
ModelPlace = Annotated[str, Field(min_length=1), AfterValidator(_model)]
PlanPlace = Annotated[str, Field(min_length=1), AfterValidator(_plan)]
FilePath = Annotated[Path, Field(description="relative to the job file")]

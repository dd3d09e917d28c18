"""What a configuration says of its data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esper.leyline.base import Contract


class DataConfig(Contract):
    """`limit`, `holdout_limit` and `eval_limit` cap the samples of the three parts; `context` is
    the sequence length of text. Without a cap of its own the holdout shrinks with `limit`."""

    name: Literal["digits", "mnist1d", "fashion_mnist", "text", "teacher_student"]
    batch_size: int = Field(default=64, ge=1, le=65536)
    limit: int | None = Field(default=None, ge=1)
    holdout_limit: int | None = Field(default=None, ge=1)
    eval_limit: int | None = Field(default=None, ge=1)
    path: str | None = None
    context: int = Field(default=64, ge=2, le=4096)

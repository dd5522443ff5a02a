"""Where prompts come from, and what of them each model reads. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from opd_megatron.config.checks import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where prompts come from. `prompts` is a .jsonl or .parquet path, `reasoning_gym:TASK`, or a Hugging Face dataset name."""

    prompts: str
    split: str = "train"
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    task_size: int = 20_000
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_prompts: int = 64
    max_prompt_tokens: int = 1024
    # Prompts whose content hash falls into this share belong to evaluation and are never trained on.
    holdout_fraction: float = 0.05
    grader: Literal["auto", "reasoning_gym", "math_verify", "exact"] = "auto"

    def __post_init__(self) -> None:
        require(bool(self.prompts), "data.prompts is empty; name a .jsonl or .parquet file, reasoning_gym:TASK, or a Hugging Face dataset")
        require(self.batch_prompts >= 1, f"data.batch_prompts={self.batch_prompts} must be at least 1")
        require(self.max_prompt_tokens >= 1, f"data.max_prompt_tokens={self.max_prompt_tokens} must be at least 1")
        require(self.task_size >= 1, f"data.task_size={self.task_size} must be at least 1")
        require(0 <= self.holdout_fraction < 1, f"data.holdout_fraction={self.holdout_fraction} must be in [0, 1)")

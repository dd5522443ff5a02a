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
    # Where a row has its worked solution, which only a privileged teacher reads.
    solution_key: str = "solution"
    # A Jinja file that writes the last user message: `problem` is that message in the data. Null leaves it as it is.
    prompt_template: str | None = None
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


@dataclass(frozen=True, kw_only=True)
class PrivilegedConfig:
    """What the teacher reads in place of the student's prompt: OPSD (arXiv 2601.18734) shows it the reference solution."""

    # A Jinja file that writes the last user message of `problem`, `solution` and `answer`. Null: the teacher reads what the student reads.
    template: str | None = None
    # Options of the chat template for the teacher alone, over `data.chat_template_kwargs`.
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # Where the response begins. student: as the student's prompt ends, before, in or after a block of thinking; template: as the teacher's own template has it.
    thinking: Literal["student", "template"] = "student"
    # Longer ones are dropped with their problem; null: what the response leaves of the teacher's positions.
    max_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_prompt_tokens
        require(self.template != "", "privileged.template is empty; name a Jinja file, or null for a teacher that reads what the student reads")
        require(limit is None or limit >= 1, f"privileged.max_prompt_tokens={limit} must be at least 1, or null for what the teacher's positions leave")
        for name, value in (("chat_template_kwargs", dict(self.chat_template_kwargs)), ("max_prompt_tokens", limit)):
            require(not value or self.template is not None, f"privileged.{name}={value} needs privileged.template")

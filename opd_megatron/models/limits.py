"""How long a prompt may be, so that the response still fits behind it. No torch: the configuration is checked by it as well."""

from __future__ import annotations

from opd_megatron.config import RunConfig
from opd_megatron.models.architecture import Architecture


def longest_response(config: RunConfig) -> tuple[str, int]:
    """Return the key that sets the longest response of the run, and its tokens."""
    budgets = {"rollout.max_response_tokens": config.rollout.max_response_tokens, "evaluation.max_response_tokens": config.evaluation.max_response_tokens or 0}
    key = max(budgets, key=lambda name: budgets[name])
    return key, budgets[key]


def check_length(config: RunConfig, role: str, architecture: Architecture) -> None:
    """Raise ValueError unless prompts and responses at their limits fit into the model's positions."""
    key, response = longest_response(config)
    longest = config.data.max_prompt_tokens + response
    if longest > architecture.max_positions:
        raise ValueError(f"data.max_prompt_tokens + {key} = {longest} exceeds the {role}'s {architecture.max_positions} positions; lower one of them")
    limit = config.privileged.max_prompt_tokens
    if role == "teacher" and limit is not None and (total := limit + config.rollout.max_response_tokens) > architecture.max_positions:
        keys = "privileged.max_prompt_tokens + rollout.max_response_tokens"
        raise ValueError(f"{keys} = {total} exceeds the teacher's {architecture.max_positions} positions; lower one of them")


def longest_teacher_prompt(config: RunConfig, teacher: Architecture) -> int:
    """Return how many tokens a prompt of the teacher may have in training: the student's limit, or, where it reads something else, what the response leaves."""
    if config.privileged.template is None and config.alignment.is_identity:
        return config.data.max_prompt_tokens
    return config.privileged.max_prompt_tokens or teacher.max_positions - config.rollout.max_response_tokens


def planned_teacher_prompt(config: RunConfig, teacher: Architecture) -> int:
    """Return how many tokens of a teacher's prompt a plan counts with: the longest, but of the same messages in another tokenizer as many as the student's."""
    same_messages = config.privileged.template is None
    return config.data.max_prompt_tokens if same_messages else longest_teacher_prompt(config, teacher)


def longest_evaluated_teacher_prompt(config: RunConfig, teacher: Architecture) -> int:
    """Return the same where the teacher itself answers."""
    return min(longest_teacher_prompt(config, teacher), teacher.max_positions - evaluation_tokens(config))


def evaluation_tokens(config: RunConfig) -> int:
    """Return the longest response of an evaluation."""
    return config.evaluation.max_response_tokens or config.rollout.max_response_tokens

"""`KEY=VALUE` words become typed, checked, frozen configurations, and every refusal names the value and a way out.

Not covered: what only the files of a run can tell (tests/unit/test_recipes.py), and what the values do in training.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_megatron.config import (
    DataConfig,
    ImportanceConfig,
    LossConfig,
    ParallelLayout,
    PositionWeightsConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainingConfig,
    all_keys,
    apply_overrides,
)

BASE = RunConfig(
    student=StudentConfig(hf="student"),
    teacher=TeacherConfig(hf="teacher"),
    data=DataConfig(prompts="prompts.jsonl", task_options={"min_word_len": 3}),
    rollout=RolloutConfig(layout=ParallelLayout()),
)
WITHOUT_TEACHER = dataclasses.replace(BASE, teacher=None, training=TrainingConfig(objective="sft"))


def value_of(config: Any, key: str) -> Any:
    """The value at a dotted key; the last name may be an entry of a mapping."""
    for name in key.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def as_word(value: Any) -> str:
    """A value as a user would type it."""
    if value is None or isinstance(value, bool | Mapping | tuple):
        return json.dumps(value)
    return str(value)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys of the nested dictionary of a config. Mappings that are values themselves are told apart by name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and name not in ("task_options", "chat_template_kwargs", "learning_rate_factors"):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def refusal(*overrides: str, config: RunConfig = BASE) -> str:
    with pytest.raises(ValueError) as caught:
        apply_overrides(config, overrides)
    return str(caught.value)


TYPED = [
    ("training.steps=12", 12),
    ("training.steps=1_000", 1000),
    ("seed=-3", -3),
    ("training.learning_rate=3e-4", 3e-4),
    ("training.learning_rate=1", 1.0),
    ("student.layout.tensor=2", 2),
    *((f"rollout.record={word}", True) for word in ("true", "True", "TRUE", "1", "yes")),
    *((f"teacher.self_test={word}", False) for word in ("false", "False", "0", "no")),
    ("loss.kind=jsd", "jsd"),
    ("training.precision=fp32", "fp32"),
    ("loss.pointwise_clip=0.5", 0.5),
    ("loss.chunk_tokens=64", 64),
    ("importance.rule=soft_or_topk", "soft_or_topk"),
    ("importance.ratio=1", 1.0),
    ("importance.entropy_clip_quantile=null", None),
    ("position_weights.enabled=true", True),
    ("rollout.replay=runs/other", "runs/other"),
    ("data.prompts=folder with = sign.jsonl", "folder with = sign.jsonl"),
    ("evaluation.prompts=64", 64),
    ("evaluation.prompts=held_out.jsonl", "held_out.jsonl"),
    ("data.task_options.max_word_len=5", 5),
    ("data.task_options.name=abc", "abc"),
    ("data.task_options.flag=true", True),
    ("data.task_options.sizes=[1, 2]", [1, 2]),
    ("data.chat_template_kwargs.enable_thinking=false", False),
    ('data.task_options={"max_word_len": 5}', {"max_word_len": 5}),
]


@pytest.mark.parametrize(("word", "expected"), TYPED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_value_takes_the_type_of_its_field(word: str, expected: Any) -> None:
    value = value_of(apply_overrides(BASE, [word]), word.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


SECRETS = ("https://me:geheim@host/data.jsonl", "s3://key:secret@bucket", "hf_abcdefghijABCDEFGHIJ0123456789", "x/ghp_abcdefghijABCDEFGHIJ0123456789")


@pytest.mark.parametrize("secret", SECRETS)
def test_a_password_or_token_is_refused_and_not_repeated(secret: str) -> None:
    message = refusal(f"data.prompts={secret}")
    assert message.startswith("data.prompts holds what looks like a password or a token")
    assert "HF_TOKEN" in message
    assert secret not in message


@pytest.mark.parametrize("value", ["https://host:8080/data.jsonl", "reasoning_gym:spell_backward", "/models/hf_export/qwen", "user@host:/data", "hf_a"])
def test_what_is_no_secret_is_taken(value: str) -> None:
    assert apply_overrides(BASE, [f"data.prompts={value}"]).data.prompts == value


@pytest.mark.parametrize("word", ["null", "None", "none", ""])
def test_an_optional_field_can_be_emptied(word: str) -> None:
    config = dataclasses.replace(BASE, loss=LossConfig(pointwise_clip=0.5, chunk_tokens=8))
    config = apply_overrides(config, [f"loss.pointwise_clip={word}", f"loss.chunk_tokens={word}"])
    assert (config.loss.pointwise_clip, config.loss.chunk_tokens) == (None, None)


@settings(deadline=None, derandomize=True)
@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_float_arrives_with_every_bit(value: float) -> None:
    assert apply_overrides(BASE, [f"training.learning_rate={value!r}"]).training.learning_rate == value


def test_an_entry_is_added_to_a_mapping_and_a_whole_mapping_replaces_it() -> None:
    options = "data.task_options"
    assert apply_overrides(BASE, [f"{options}.max_word_len=5"]).data.task_options == {"min_word_len": 3, "max_word_len": 5}
    assert apply_overrides(BASE, [f"{options}.min_word_len=4"]).data.task_options == {"min_word_len": 4}
    assert apply_overrides(BASE, [options + '={"a": 1}']).data.task_options == {"a": 1}


@pytest.mark.parametrize("order", [1, -1])
def test_a_mapping_and_its_entry_together_are_both_applied_or_refused(order: int) -> None:
    words = ['data.task_options={"a": 1}', "data.task_options.b=2"][::order]
    try:
        config = apply_overrides(BASE, words)
    except ValueError:
        return
    assert config.data.task_options == {"a": 1, "b": 2}


def test_overrides_are_applied_at_once() -> None:
    # Of each pair one alone is refused: no source of a student or two, a minimum above the learning rate, sequence without tensor parallelism.
    config = apply_overrides(
        dataclasses.replace(BASE, training=TrainingConfig(learning_rate=1e-4, min_learning_rate=1e-5)),
        [
            *("student.hf=null", "student.checkpoint=X"),
            *("training.learning_rate=1e-6", "training.min_learning_rate=1e-7"),
            *("student.layout.sequence=true", "student.layout.tensor=2"),
        ],
    )
    assert (config.student.hf, config.student.checkpoint) == (None, "X")
    assert (config.training.learning_rate, config.training.min_learning_rate) == (1e-6, 1e-7)
    assert config.student.layout == ParallelLayout(tensor=2, sequence=True)


def test_nothing_else_changes() -> None:
    changed = apply_overrides(BASE, ["training.steps=7"])
    assert changed == dataclasses.replace(BASE, training=dataclasses.replace(BASE.training, steps=7))
    assert BASE.training.steps == TrainingConfig().steps
    assert apply_overrides(BASE, []) == BASE


def test_a_list_of_numbers_is_a_tuple_that_survives_json() -> None:
    config = apply_overrides(BASE, ["effopd.trigger_steps=[1, 2, 4]"])
    assert config.effopd.trigger_steps == (1, 2, 4)
    assert config.to_json()["effopd"]["trigger_steps"] == [1, 2, 4]
    assert apply_overrides(config, ["effopd.trigger_steps=null"]) == BASE


def test_extrapolation_is_due_after_powers_of_two_or_where_the_steps_say_so() -> None:
    due = apply_overrides(BASE, ["effopd.enabled=true"]).effopd
    assert [step for step in range(70) if due.is_due(step)] == [1, 2, 4, 8, 16, 32, 64]
    named = apply_overrides(BASE, ["effopd.enabled=true", "effopd.trigger_steps=[3, 10]"]).effopd
    assert [step for step in range(70) if named.is_due(step)] == [3, 10]
    assert not any(BASE.effopd.is_due(step) for step in range(70))


def test_the_last_of_two_values_wins() -> None:
    assert apply_overrides(BASE, ["training.steps=7", "training.steps=9"]).training.steps == 9


def test_an_absent_section_is_made_from_overrides_alone() -> None:
    config = apply_overrides(WITHOUT_TEACHER, ["teacher.checkpoint=T", "teacher.layout.tensor=2", "teacher.self_test=false", "training.objective=opd"])
    assert config.teacher == TeacherConfig(checkpoint="T", layout=ParallelLayout(tensor=2), self_test=False)
    assert "name the teacher once" in refusal("teacher.layout.tensor=2", config=WITHOUT_TEACHER)


UNKNOWN = {
    "training.step": "training.steps",
    "trainning.steps": "training.steps",
    "learning_rate": "training.learning_rate",
    "student.layout.tensors": "student.layout.tensor",
    "rollout.max_tokens": "rollout.max_response_tokens",
    "teacher.placment": "teacher.placement",
}


@pytest.mark.parametrize("key", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_close_ones(key: str) -> None:
    message = refusal(f"{key}=1")
    assert repr(key) in message
    # A key without its section is close to the last name only.
    assert UNKNOWN[key] in message or UNKNOWN[key].rpartition(".")[2] in message.partition("did you mean")[2]


@pytest.mark.parametrize("key", ["", ".", "zzz.qqq", "training.steps.more", "data.task_options.a.b", "student..hf", "to_json", "student.layout.model_size"])
def test_a_key_that_is_no_field_is_refused(key: str) -> None:
    assert f"unknown key {key!r}" in refusal(f"{key}=1")


@pytest.mark.parametrize("key", ["student", "student.layout", "teacher", "training"])
@pytest.mark.parametrize("config", [BASE, WITHOUT_TEACHER], ids=["full", "without teacher"])
def test_a_section_is_refused_with_its_keys(key: str, config: RunConfig) -> None:
    message = refusal(f"{key}=1", config=config)
    section = {"student": StudentConfig, "student.layout": ParallelLayout, "teacher": TeacherConfig, "training": TrainingConfig}[key]
    assert f"{key!r} is a section" in message
    assert all(f"{key}.{field.name}" in message for field in dataclasses.fields(section))


@pytest.mark.parametrize("word", ["training.steps", "--verbose", "steps:3", ""])
def test_a_word_without_equals_is_refused_with_an_example(word: str) -> None:
    assert refusal(word) == f"{word!r} is not KEY=VALUE; write e.g. training.steps=10"


# What a user may type -> what the message must contain beside the typed value: the field and the way out.
BAD_VALUES = [
    # Wrong types.
    ("training.steps=many", "training.steps='many' must be an integer"),
    ("training.steps=1.5", "training.steps='1.5' must be an integer"),
    ("training.steps=", "training.steps='' must be an integer"),
    ("training.learning_rate=fast", "training.learning_rate='fast' must be a number"),
    ("rollout.record=maybe", "rollout.record='maybe' must be true or false"),
    ("loss.kind=kl", "loss.kind='kl' must be one of reverse_kl, forward_kl, jsd"),
    ("teacher.placement=remote", "teacher.placement='remote' must be one of colocated"),
    ("training.precision=fp8", "training.precision='fp8' must be one of bf16, fp32"),
    ("training.objective=rl", "training.objective='rl' must be one of opd, sft"),
    ("training.lr_schedule=step", "training.lr_schedule='step' must be one of constant, linear, cosine"),
    ("data.grader=llm", "data.grader='llm' must be one of auto, "),
    ("loss.pointwise_clip=none!", "loss.pointwise_clip='none!' must be float or null"),
    ("loss.chunk_tokens=2.5", "loss.chunk_tokens='2.5' must be int or null"),
    ("data.task_options=5", "data.task_options='5' must be a JSON object"),
    ("data.task_options={a:1}", "data.task_options='{a:1}' must be a JSON object"),
    # Wrong sizes and numbers.
    ("world_size=0", "world_size=0 must be at least 1"),
    ("student.layout.tensor=0", "layout.tensor=0 must be at least 1"),
    ("teacher.layout.pipeline=-2", "layout.pipeline=-2 must be at least 1"),
    ("student.layout.virtual=2", "layout.virtual=2 cuts pipeline stages into chunks; it needs layout.pipeline > 1"),
    ("teacher.layout.pipeline=2 teacher.layout.virtual=2", "teacher.layout.virtual=2 is of no use"),
    ("training.micro_batch_tokens=0", "training.micro_batch_tokens=0 must be at least 1, or null for no packing"),
    ("training.micro_batch_tokens=9000 training.micro_batch=2", "training.micro_batch=2 is without effect under training.micro_batch_tokens"),
    ("training.micro_batch_tokens=99999999999", "training.micro_batch_tokens=99999999999 must be below 2**31, or null for no packing"),
    ("data.batch_prompts=99999999999", "= 99999999999 sequences a step are more than 4194304; lower one of them"),
    ("teacher.placement=dedicated", "teacher.placement=dedicated needs teacher.num_ranks"),
    ("training.micro_batch_tokens=100", "training.micro_batch_tokens=100 does not hold one sequence of"),
    ("student.layout.context=0", "layout.context=0 must be at least 1"),
    ("student.layout.expert_tensor=0", "layout.expert_tensor=0 must be at least 1"),
    ("student.layout.sequence=true", "layout.sequence=true needs layout.tensor > 1, got tensor=1"),
    ("teacher.layout.tensor=2 teacher.layout.sequence=true", "teacher.layout.sequence=true is not supported"),
    ("student.hf=null", "name the student once: student.hf=None, student.checkpoint=None"),
    ("student.checkpoint=X", "name the student once: student.hf='student', student.checkpoint='X'"),
    ("student.vocab_multiple=0", "student.vocab_multiple=0 must be at least 1"),
    ("teacher.hf=null", "name the teacher once: teacher.hf=None, teacher.checkpoint=None"),
    ("teacher.checkpoint=X", "name the teacher once: teacher.hf='teacher', teacher.checkpoint='X'"),
    ("teacher.micro_batch=0", "teacher.micro_batch=0 must be at least 1"),
    ("teacher.weights=frozen", "teacher.weights='frozen' must be one of external, initial, ema, live"),
    ("teacher.weights=ema", "teacher.weights=ema are the student's own: teacher.hf='teacher', teacher.checkpoint=None would not be read; set it to null"),
    ("teacher.hf=null teacher.weights=ema teacher.ema_decay=1", "teacher.ema_decay=1.0 must be in [0, 1)"),
    (
        "teacher.hf=null teacher.weights=live teacher.placement=dedicated teacher.num_ranks=1 teacher.staleness=1",
        "teacher.staleness=1 does not go with teacher.weights=live",
    ),
    ("privileged.max_prompt_tokens=0", "privileged.max_prompt_tokens=0 must be at least 1, or null for what the teacher's positions leave"),
    ("privileged.max_prompt_tokens=100", "privileged.max_prompt_tokens=100 needs privileged.template"),
    ("privileged.thinking=closed", "privileged.thinking='closed' must be one of student, template"),
    ("training.objective=sft privileged.template=x.jinja", "privileged.template=x.jinja needs training.objective=opd, not sft; set it to null"),
    ("data.prompts=", "data.prompts is empty; name a .jsonl or .parquet file, reasoning_gym:TASK, or a Hugging Face dataset"),
    ("data.batch_prompts=0", "data.batch_prompts=0 must be at least 1"),
    ("data.max_prompt_tokens=0", "data.max_prompt_tokens=0 must be at least 1"),
    ("data.task_size=0", "data.task_size=0 must be at least 1"),
    ("data.holdout_fraction=1", "data.holdout_fraction=1.0 must be in [0, 1)"),
    ("data.holdout_fraction=-0.1", "data.holdout_fraction=-0.1 must be in [0, 1)"),
    ("data.holdout_fraction=nan", "data.holdout_fraction=nan must be in [0, 1)"),
    ("rollout.max_response_tokens=0", "rollout.max_response_tokens=0 must be at least 1"),
    ("rollout.temperature=-1", "rollout.temperature=-1.0 must not be negative or infinite; 0 is greedy"),
    ("rollout.temperature=nan", "rollout.temperature=nan must not be negative or infinite; 0 is greedy"),
    ("rollout.temperature=0", "rollout.temperature=0 would train on greedy text only; on-policy rollouts need a positive temperature"),
    ("rollout.top_p=0", "rollout.top_p=0.0 must be in (0, 1]"),
    ("rollout.top_p=1.1", "rollout.top_p=1.1 must be in (0, 1]"),
    ("rollout.top_k=-1", "rollout.top_k=-1 must not be negative; 0 keeps the whole vocabulary"),
    ("rollout.samples_per_prompt=0", "rollout.samples_per_prompt=0 must be at least 1"),
    ("rollout.batch_sequences=0", "rollout.batch_sequences=0 must be at least 1"),
    ("rollout.kv_cache_gib=0", "rollout.kv_cache_gib=0.0 must be a positive number, or null for rollout.batch_sequences' need"),
    (
        "rollout.engine=static rollout.kv_cache_gib=4",
        "rollout.kv_cache_gib=4.0 is without effect under rollout.engine=static; use rollout.engine=dynamic, or set it to null",
    ),
    (
        "rollout.engine=static rollout.cuda_graphs=true",
        "rollout.cuda_graphs=true is without effect under rollout.engine=static; use rollout.engine=dynamic, or set it to false",
    ),
    ("rollout.layout.context=2", "rollout.layout.context=2 is of no use: it cuts sequences, and a decoding step has one position; set it to 1"),
    ("rollout.layout.virtual=2 rollout.layout.pipeline=2", "rollout.layout.virtual=2 is of no use: it shortens the bubbles of a backward; set it to 1"),
    (
        "rollout.layout.sequence=true rollout.layout.tensor=2",
        "rollout.layout.sequence=true is of no use: a decoding step has one position; set it to false",
    ),
    ("loss.beta=1.5", "loss.beta=1.5 must be in [0, 1]"),
    ("loss.temperature=0", "loss.temperature=0.0 must be positive"),
    ("loss.pointwise_clip=0", "loss.pointwise_clip=0.0 must be positive, or null for none"),
    ("loss.chunk_tokens=0", "loss.chunk_tokens=0 must be at least 1, or null"),
    ("loss.reduction=mean", "loss.reduction='mean' must be one of auto, token, sequence"),
    ("loss.denominator=sum", "loss.denominator='sum' must be one of kept, weights, all"),
    ("importance.rule=tip", "importance.rule='tip' must be one of all, entropy_sample, entropy_topk, soft_or_topk, q3_topk, div_topk, bottom_topk"),
    ("importance.ratio=0", "importance.ratio=0.0 must be in (0, 1]; importance.rule=all keeps every token"),
    ("importance.ratio=1.01", "importance.ratio=1.01 must be in (0, 1]"),
    ("importance.ratio=nan", "importance.ratio=nan must be in (0, 1]"),
    ("importance.delta=jsd", "importance.delta='jsd' must be one of reverse_kl, forward_kl"),
    ("importance.norm_scope=batch", "importance.norm_scope='batch' must be one of step, sequence"),
    ("importance.entropy_clip_quantile=0", "importance.entropy_clip_quantile=0.0 must be in (0, 1], or null for none"),
    ("importance.rule=soft_or_topk importance.delta_clip_quantile=98", "importance.delta_clip_quantile=98.0 must be in (0, 1], or null for none"),
    ("importance.min_keep=-1", "importance.min_keep=-1 must not be negative"),
    ("importance.temperature=0", "importance.temperature=0.0 must be positive and not infinite"),
    ("importance.rule=q3_topk importance.delta=forward_kl", "importance.delta=forward_kl belongs to soft_or_topk, div_topk and bottom_topk"),
    ("importance.rule=div_topk importance.delta_clip_quantile=0.9", "importance.delta_clip_quantile=0.9 belongs to soft_or_topk and bottom_topk"),
    ("importance.rule=entropy_topk importance.importance_weights=true", "importance.importance_weights=true belongs to entropy_sample"),
    (
        "importance.rule=entropy_sample importance.importance_weights=true importance.min_keep=1",
        "importance.min_keep=1 does not go with importance.importance_weights=true",
    ),
    ("position_weights.minimum=1.5", "position_weights.minimum=1.5 must be in [0, 1]"),
    ("position_weights.center=nan", "position_weights.center=nan must be a finite share of the response"),
    ("position_weights.slope=-0.1", "position_weights.slope=-0.1 must not be negative or infinite; 0 is a step at center"),
    ("training.objective=sft importance.rule=soft_or_topk", "importance.rule=soft_or_topk needs training.objective=opd, not sft; set it to all"),
    ("training.objective=sft position_weights.enabled=true", "position_weights.enabled=true needs training.objective=opd, not sft; set it to false"),
    ("training.objective=sft loss.reduction=sequence", "loss.reduction=sequence needs training.objective=opd, not sft; set it to auto"),
    ("training.objective=sft loss.denominator=all", "loss.denominator=all needs training.objective=opd, not sft; set it to kept"),
    ("alignment.score=raw_logit", "alignment.score=raw_logit has no effect with alignment.kind=identity; leave it at mean_logprob"),
    ("alignment.kind=strict alignment.span_norm=sum", "alignment.span_norm=sum has no effect with alignment.kind=strict; leave it at own_k"),
    ("alignment.kind=uld alignment.units=released", "alignment.units=released has no effect with alignment.kind=uld; leave it at minimal"),
    ("alignment.kind=simct alignment.gh_threshold=1", "alignment.gh_threshold=1.0 must be 0 for none, or more than 1"),
    ("alignment.kind=strict alignment.top_k=1", "alignment.top_k=1 leaves rows of one column, on which models cannot differ; use at least 2, or 0 for all"),
    ("alignment.kind=simct alignment.mask_first_token=true alignment.top_k=2", "alignment.top_k=2 leaves rows of one column"),
    ("alignment.kind=simct alignment.tail=drop", "alignment.tail=drop belongs to alignment.units=released"),
    ("alignment.kind=simct alignment.top_k=-1", "alignment.top_k=-1 must not be negative; 0 looks at all"),
    ("alignment.kind=simct alignment.boundaries=decoded_text", "alignment.boundaries=decoded_text belongs to alignment.units=released"),
    ("alignment.kind=strict loss.kind=jsd", "loss.kind=jsd has no form with alignment.kind=strict; use reverse_kl or forward_kl"),
    ("alignment.kind=uld loss.kind=forward_kl", "loss.kind=forward_kl has no form with alignment.kind=uld; set it to reverse_kl"),
    ("alignment.kind=simct loss.pointwise_clip=0.1", "loss.pointwise_clip=0.1 has no form with alignment.kind=simct; set it to null"),
    ("alignment.kind=simct importance.rule=entropy_topk", "importance.rule=entropy_topk scores tokens, and alignment.kind=simct compares units"),
    ("alignment.kind=strict teacher.hf=null teacher.weights=initial", "teacher.weights=initial is the student itself, with its own tokenizer"),
    ("training.objective=sft alignment.kind=strict", "alignment.kind=strict needs training.objective=opd, not sft; set it to identity"),
    ("effopd.max_k=0", "effopd.max_k=0 must be at least 1"),
    ("effopd.spacing=0", "effopd.spacing=0.0 must be a positive number"),
    ("effopd.min_gain=-1", "effopd.min_gain=-1.0 must be a finite number, not negative"),
    ("effopd.trigger_steps=[0,1]", "effopd.trigger_steps=(0, 1) must be steps from 1 on, each once, in order"),
    ("effopd.trigger_steps=[4,2]", "effopd.trigger_steps=(4, 2) must be steps from 1 on, each once, in order"),
    ("effopd.trigger_steps=[]", "effopd.trigger_steps=() must be steps from 1 on"),
    ("effopd.trigger_steps=4", "effopd.trigger_steps='4' must be a JSON list or null"),
    ("effopd.trigger_steps=[true]", "effopd.trigger_steps='[true]' must be a JSON list or null"),
    ("effopd.accept=better", "effopd.accept='better' must be one of gt, ge"),
    ("effopd.prompts=0", "effopd.prompts=0 must be at least 1, or a source"),
    ("effopd.prompts=", "effopd.prompts is empty"),
    ("effopd.prompts=probe.jsonl effopd.hold_out=true", "effopd.prompts='probe.jsonl' is a source of its own; set it to false"),
    ("effopd.samples_per_prompt=4", "effopd.samples_per_prompt=4 greedy samples would all be equal; set effopd.temperature"),
    ("effopd.temperature=-1", "effopd.temperature=-1.0 must not be negative or infinite"),
    ("effopd.modules=", "effopd.modules is empty"),
    ("training.objective=sft effopd.enabled=true effopd.score=divergence", "effopd.score=divergence needs training.objective=opd, not sft"),
    (
        "teacher.placement=dedicated teacher.num_ranks=1 teacher.staleness=1 effopd.enabled=true effopd.score=divergence",
        "teacher.staleness=1 has one under way then",
    ),
    ("modules.train=", "modules.train is empty; use all, measured, paper, or patterns"),
    ("modules.probe_steps=0", "modules.probe_steps=0 must be at least 1"),
    ("modules.freeze_share=1", "modules.freeze_share=1.0 must be in [0, 1)"),
    ("modules.learning_rate_factors.mlp=0", "modules.learning_rate_factors={'mlp': 0} must be a positive number"),
    ("modules.learning_rate_factors.mlp=fast", "modules.learning_rate_factors={'mlp': 'fast'} must be a positive number"),
    ("training.steps=0", "training.steps=0 must be at least 1"),
    ("training.micro_batch=0", "training.micro_batch=0 must be at least 1"),
    ("training.learning_rate=0", "training.learning_rate=0.0 must be positive"),
    ("training.learning_rate=nan", "training.learning_rate=nan must be positive"),
    ("training.learning_rate=inf", "training.learning_rate=inf must be positive"),
    ("training.min_learning_rate=1", "training.min_learning_rate=1.0 must lie between 0 and learning_rate=1e-06"),
    ("training.warmup_steps=-1", "training.warmup_steps=-1 must not be negative"),
    ("training.clip_grad=-1", "training.clip_grad=-1.0 must not be negative; 0 turns clipping off"),
    ("seed=99999999999999999999999", "seed=99999999999999999999999 must fit into 64 bits"),
    ("training.max_skipped_steps=0", "training.max_skipped_steps=0 must be at least 1"),
    ("checkpoint.every_steps=-1", "checkpoint.every_steps=-1 must not be negative"),
    ("checkpoint.keep=0", "checkpoint.keep=0 must be at least 1"),
    ("evaluation.every_steps=-1", "evaluation.every_steps=-1 must not be negative"),
    ("evaluation.prompts=-1", "evaluation.prompts=-1 must not be negative; 0 turns evaluation off"),
    ("evaluation.samples_per_prompt=0", "evaluation.samples_per_prompt=0 must be at least 1"),
    ("evaluation.temperature=-1", "evaluation.temperature=-1.0 must not be negative or infinite; 0 is greedy"),
    ("evaluation.samples_per_prompt=4", "evaluation.samples_per_prompt=4 greedy samples would all be equal; set evaluation.temperature"),
]


@pytest.mark.parametrize(("words", "message"), BAD_VALUES, ids=[words for words, _ in BAD_VALUES])
def test_a_bad_value_is_refused_with_itself_and_a_way_out(words: str, message: str) -> None:
    assert message in refusal(*words.split(" "))


# Each would crash a run later or silently do something else.
@pytest.mark.parametrize(
    "word",
    [
        "rollout.temperature=inf",
        "loss.temperature=inf",
        "evaluation.temperature=inf",
        "evaluation.max_response_tokens=0",
        "evaluation.max_response_tokens=-5",
        "evaluation.prompts=",
        "training.weight_decay=nan",
        "training.weight_decay=-1",
        "training.adam_beta1=1.5",
        "training.adam_beta2=nan",
    ],
)
def test_a_value_no_run_can_use_is_refused(word: str) -> None:
    assert word.partition("=")[0] in refusal(word)


def test_distillation_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match=r"training\.objective=opd needs a teacher; set teacher\.hf, teacher\.checkpoint or teacher\.weights, or "):
        dataclasses.replace(BASE, teacher=None)


def test_greedy_rollouts_may_be_replayed() -> None:
    assert apply_overrides(BASE, ["rollout.temperature=0", "rollout.replay=runs/other"]).rollout.temperature == 0


def test_position_weights_bring_the_mean_of_each_response_unless_one_is_named() -> None:
    assert BASE.reduction == "token"
    weighted = apply_overrides(BASE, ["position_weights.enabled=true"])
    assert weighted.reduction == "sequence"
    assert apply_overrides(weighted, ["loss.reduction=token"]).reduction == "token"
    assert apply_overrides(BASE, ["loss.reduction=sequence"]).reduction == "sequence"


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 3}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_a_layout_fits_the_worlds_its_product_divides(layout: dict[str, int]) -> None:
    size = math.prod(layout.values())
    for world_size in range(1, 13):
        if world_size % size == 0:
            assert ParallelLayout(**layout).data_size(world_size) * size == world_size
            continue
        with pytest.raises(ValueError) as caught:
            ParallelLayout(**layout).data_size(world_size)
        usable = f"use {world_size // size * size} ranks" if world_size > size else f"use at least {size} ranks"
        assert f"world_size={world_size} is not a multiple of tensor*pipeline*context={size}; {usable} or change the layout" in str(caught.value)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_the_world_must_fit_both_models(role: str) -> None:
    config = apply_overrides(BASE, [f"{role}.layout.tensor=2", f"{role}.layout.pipeline=2", "data.batch_prompts=24"])
    config.check_world(4)
    config.check_world(8)
    with pytest.raises(ValueError, match=rf"^{role}\.layout: world_size=6 is not a multiple of tensor\*pipeline\*context=4; use 4 ranks"):
        config.check_world(6)


def test_supervised_fine_tuning_has_one_sequence_a_prompt() -> None:
    config = apply_overrides(BASE, ["data.batch_prompts=6", "rollout.samples_per_prompt=2"])
    assert config.num_sequences == 12
    assert apply_overrides(config, ["training.objective=sft"]).num_sequences == 6


def test_all_keys_are_the_leaves_of_the_configuration() -> None:
    assert sorted(all_keys(BASE)) == sorted(leaves(BASE.to_json()))


def test_all_keys_of_an_absent_section_are_leaves_too() -> None:
    assert sorted(all_keys(WITHOUT_TEACHER)) == sorted(all_keys(BASE))


@pytest.mark.parametrize("key", all_keys(BASE))
def test_every_key_takes_its_own_value_back(key: str) -> None:
    assert apply_overrides(BASE, [f"{key}={as_word(value_of(BASE, key))}"]) == BASE


def test_the_resolved_configuration_survives_json() -> None:
    config = apply_overrides(BASE, ["data.task_options.sizes=[1, 2]", "loss.pointwise_clip=0.1", "evaluation.prompts=other.jsonl"])
    assert json.loads(json.dumps(config.to_json())) == config.to_json()
    values = {key: value_of(config, key) for key in all_keys(config)}
    assert leaves(config.to_json()) == {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@pytest.mark.parametrize("key", all_keys(BASE))
def test_no_field_can_be_assigned(key: str) -> None:
    *sections, name = key.split(".")
    section = value_of(BASE, ".".join(sections)) if sections else BASE
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section, name, getattr(section, name))


@pytest.mark.parametrize(
    "section",
    [
        *(ParallelLayout, StudentConfig, TeacherConfig, DataConfig, RolloutConfig, LossConfig, ImportanceConfig, PositionWeightsConfig),
        *(TrainingConfig, RunConfig),
    ],
)
def test_fields_are_given_by_name(section: type) -> None:
    with pytest.raises(TypeError, match="positional"):
        section("value")

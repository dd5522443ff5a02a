"""Prompt sources, the held-out split, the order of prompts, tokenization and tokenizer comparison.

Not covered: data sets fetched over the network, and tokenizers of published models.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opd_megatron.config import DataConfig
from opd_megatron.data import Prompt, PromptSet, check_same_tokenizer, load_prompts, load_tokenizer, response_ids, with_targets

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% if think %}<think>{% endif %}{% endif %}"
)
SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer(
    *, merges: tuple[tuple[str, str], ...] = (), specials: list[str] = SPECIALS, template: str | None = TEMPLATE, eos: str | None = "<|end|>"
) -> Any:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    raw = tokenizers.Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, chat_template=template)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is {index} + 1?", "answer": str(index + 1)} for index in range(count)]


def prompt_set(count: int) -> PromptSet:
    return PromptSet(prompts=[Prompt(index=i, messages=({"role": "user", "content": str(i)},), ids=(i,), answer=None, target=None) for i in range(count)])


def contents(prompts: PromptSet) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts.prompts]


# Sources


def test_strings_message_lists_and_a_messages_column_become_the_same_prompt(tmp_path, tokenizer):
    user = {"role": "user", "content": "Hi"}
    rows = [
        {"prompt": "Hi", "response": "Hello", "answer": "unused"},
        {"prompt": [user], "response": "Hello"},
        {"prompt": [user, {"role": "assistant", "content": "Hello"}]},
        {"messages": [user, {"role": "assistant", "content": "Hello", "tool_calls": None}], "response": "unused"},
        {"prompt": "Hi", "answer": "Hello"},
    ]
    loaded = load_prompts(DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer, part="all")
    assert {(prompt.messages[0]["content"], prompt.ids, prompt.target) for prompt in loaded.prompts} == {("Hi", loaded.prompts[0].ids, "Hello")}
    assert [prompt.index for prompt in loaded.prompts] == [0, 1, 2, 3, 4]
    assert [prompt.answer for prompt in loaded.prompts] == ["unused", None, None, None, "Hello"]
    assert tokenizer.decode(loaded.prompts[0].ids) == "<|user|>Hi<|assistant|>"


def test_jsonl_parquet_and_saved_datasets_give_the_same_prompts(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="needs the demo extra: datasets")
    rows = [{"question": [{"role": "user", "content": f"Q{i}"}], "gold": i} for i in range(20)]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved.select(range(5)), "dev": saved}).save_to_disk(str(tmp_path / "many"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", rows), prompt_key="question", answer_key="gold", split="dev")
    sources = [data.prompts, str(tmp_path / "a.parquet"), str(tmp_path / "one"), str(tmp_path / "many")]
    loaded = [load_prompts(replace(data, prompts=source), tokenizer, part="all") for source in sources]
    assert all(other.prompts == loaded[0].prompts for other in loaded)
    assert len({other.fingerprint for other in loaded}) == 1
    assert loaded[0].prompts[3].answer == "3"


BAD_ROWS = [
    ('{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl:2: not valid JSON"),
    ('{"prompt": "a"}\n\n[1]\n', r"a\.jsonl:3: \[1\] is not a JSON object"),
    ('{"question": "a", "answer": "b"}\n', r"a\.jsonl:1: no prompt under 'prompt'.*\['answer', 'question'\]; set data.prompt_key"),
    ('{"prompt": "  "}\n', r"a\.jsonl:1: the prompt is empty"),
    ('{"prompt": 3}\n', "neither a string nor a list of messages"),
    ('{"prompt": []}\n', "neither a string nor a list of messages"),
    ('{"prompt": [{"role": "user"}]}\n', "needs a role and a content"),
    ('{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}\n', "only text messages are supported"),
    ('{"prompt": [{"role": "assistant", "content": "a"}]}\n', "must end with a user turn"),
    ('{"prompt": [{"role": "system", "content": "a"}]}\n', "must end with a user turn"),
    ('{"prompt": "a", "answer": ["b", "c"]}\n', "set data.answer_key"),
    ('{"prompt": "a", "response": 3}\n', "response=3 is not text"),
    ("", "0 rows read; the source is empty"),
]


@pytest.mark.parametrize(("text", "message"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_place_and_the_way_out(tmp_path, tokenizer, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_prompts(DataConfig(prompts=str(path)), tokenizer, part="all")


def test_unreadable_sources_are_refused_by_name(tmp_path, tokenizer):
    (tmp_path / "broken.parquet").write_text("not parquet")
    (tmp_path / "table.csv").write_text("prompt\na\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
    expected = {
        "absent.jsonl": "no such file",
        "absent.parquet": "no such file",
        "broken.parquet": "not a readable Parquet file",
        "table.csv": "convert it to .jsonl or .parquet",
        "latin.jsonl": r"latin\.jsonl:1: not UTF-8 text",
    }
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            load_prompts(DataConfig(prompts=str(tmp_path / name)), tokenizer, part="all")


def test_a_folder_that_is_no_dataset_and_an_absent_split_are_refused(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets", reason="needs the demo extra: datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="could not be loaded as a Hugging Face dataset"):
        load_prompts(DataConfig(prompts=str(tmp_path / "empty")), tokenizer, part="all")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(numbered(2))}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"has the splits \['train'\]; set data.split"):
        load_prompts(DataConfig(prompts=str(tmp_path / "saved"), split="test"), tokenizer, part="all")


def test_a_reasoning_task_is_a_fixed_list_with_entries_and_answers(tokenizer):
    pytest.importorskip("reasoning_gym", reason="needs the demo extra: reasoning-gym")
    data = DataConfig(prompts="reasoning_gym:spell_backward", task_options={"max_word_len": 5}, task_size=50)
    first, again = (load_prompts(data, tokenizer, part="all") for _ in range(2))
    assert first.prompts == again.prompts
    assert len(first) == 50
    assert all(prompt.messages[-1]["content"].endswith(": " + prompt.entry["metadata"]["word"]) for prompt in first.prompts)
    assert all(prompt.target == prompt.answer == prompt.entry["metadata"]["word"][::-1] for prompt in first.prompts)
    other_seed = load_prompts(replace(data, task_options={"max_word_len": 5, "seed": 7}), tokenizer, part="all")
    assert first.fingerprint != other_seed.fingerprint


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("reasoning_gym:spel_backward", {}, "did you mean one of spell_backward"),
        ("reasoning_gym:", {}, "did you mean one of ab, acre"),
        ("reasoning_gym:spell_backward", {"max_len": 5}, "max_len is not an option of spell_backward, which has data_file, max_word_len"),
        ("reasoning_gym:spell_backward", {"size": 5}, "the number of prompts is data.task_size"),
        ("reasoning_gym:spell_backward", {"min_word_len": 9, "max_word_len": 5}, "do not fit spell_backward: max_word_len must be >= min_word_len"),
        ("reasoning_gym:spell_backward", {"max_word_len": "long"}, "do not fit spell_backward"),
    ],
)
def test_an_unknown_task_and_bad_options_are_refused(tokenizer, prompts, options, message):
    pytest.importorskip("reasoning_gym", reason="needs the demo extra: reasoning-gym")
    with pytest.raises(ValueError, match=message):
        load_prompts(DataConfig(prompts=prompts, task_options=options), tokenizer, part="all")


# The held-out split


def test_training_and_evaluation_share_no_prompt_and_together_are_everything(tmp_path, tokenizer):
    rows = numbered(400)
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", [*rows, *rows]), holdout_fraction=0.2)
    train, evaluation, everything = (load_prompts(data, tokenizer, part=part) for part in ("train", "evaluation", "all"))
    assert not set(contents(train)) & set(contents(evaluation))
    assert set(contents(train)) | set(contents(evaluation)) == set(contents(everything))
    # 400 independent draws of probability 0.2: five standard deviations are 40.
    assert abs(len(evaluation) - 80) <= 40
    assert max(Counter(contents(evaluation)).values()) == 1
    assert set(Counter(contents(train)).values()) == {2}


def test_a_prompt_keeps_its_part_when_the_source_grows_or_is_reordered(tmp_path, tokenizer):
    rows = numbered(300)
    small = DataConfig(prompts=write_jsonl(tmp_path / "small.jsonl", rows[:150]), holdout_fraction=0.3)
    large = replace(small, prompts=write_jsonl(tmp_path / "large.jsonl", rows[::-1]))
    held_out = [set(contents(load_prompts(data, tokenizer, part="evaluation"))) for data in (small, large)]
    assert held_out[0] == held_out[1] & {row["prompt"] for row in rows[:150]}


def test_a_limit_takes_the_first_prompts_that_qualify(tmp_path, tokenizer):
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", numbered(300)), holdout_fraction=0.3)
    whole, limited = (load_prompts(data, tokenizer, part="evaluation", limit=limit) for limit in (None, 10))
    assert limited.prompts == whole.prompts[:10]
    with pytest.raises(ValueError, match="limit=0"):
        load_prompts(data, tokenizer, part="evaluation", limit=0)


def test_long_prompts_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "a" * length} for length in (5, 50, 6, 60)]
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_tokens=8)
    loaded = load_prompts(data, tokenizer, part="all")
    # The template adds two tokens: 6 + 2 just fits.
    assert [prompt.index for prompt in loaded.prompts] == [0, 2]
    assert [len(prompt.ids) for prompt in loaded.prompts] == [7, 8]
    assert loaded.num_dropped_long == 2


def test_nothing_left_says_what_was_read_and_dropped(tmp_path, tokenizer):
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", numbered(30)), holdout_fraction=0, max_prompt_tokens=3)
    with pytest.raises(ValueError, match=r"30 rows read, 30 longer than data.max_prompt_tokens=3.*raise data.max_prompt_tokens"):
        load_prompts(data, tokenizer, part="train")
    with pytest.raises(ValueError, match=r"30 belong to the other part \(data.holdout_fraction=0\).*evaluation.prompts=0"):
        load_prompts(data, tokenizer, part="evaluation")


# The order


@pytest.mark.parametrize("size", [1, 7, 10, 23])
def test_every_epoch_is_a_permutation_whatever_the_batch_size(size):
    prompts = prompt_set(10)
    stream = [prompt.index for step in range(30) for prompt in prompts.batch(step, size, seed=3)]
    # 30 steps of any size are whole epochs of 10, three at least.
    epochs = [stream[start : start + 10] for start in range(0, len(stream), 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_stream_does_not_depend_on_the_batch_size():
    prompts = prompt_set(10)
    streams = [[prompt.index for step in range(60 // size) for prompt in prompts.batch(step, size, seed=3)] for size in (2, 5, 30)]
    assert streams[0] == streams[1] == streams[2]


def test_a_batch_is_a_pure_function_of_step_and_seed():
    in_order = [prompt_set(50).batch(step, 8, seed=1) for step in range(20)]
    resumed = prompt_set(50)
    assert [resumed.batch(step, 8, seed=1) for step in reversed(range(20))] == in_order[::-1]
    assert resumed.batch(0, 8, seed=2) != in_order[0]


def test_the_order_is_the_same_in_every_version():
    # A checkpoint written today must resume tomorrow: these numbers must never change.
    assert [prompt.index for prompt in prompt_set(8).batch(0, 16, seed=1234)] == [2, 5, 0, 6, 4, 1, 3, 7, 2, 4, 1, 0, 3, 5, 7, 6]


def test_the_fingerprint_notices_a_changed_answer_and_order(tmp_path, tokenizer):
    rows = numbered(5)
    changed = [*rows[:4], {**rows[4], "answer": "0"}]
    variants = {
        name: write_jsonl(tmp_path / f"{name}.jsonl", content) for name, content in {"a": rows, "same": rows, "changed": changed, "turned": rows[::-1]}.items()
    }
    prints = {name: load_prompts(DataConfig(prompts=path), tokenizer, part="all").fingerprint for name, path in variants.items()}
    assert prints["a"] == prints["same"]
    assert len(set(prints.values())) == 3


# Tokens


def test_batched_encoding_equals_the_chat_template_one_by_one(tmp_path, tokenizer):
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", numbered(700)), chat_template_kwargs={"think": True})
    for prompt in load_prompts(data, tokenizer, part="all").prompts[::97]:
        alone = tokenizer.apply_chat_template(list(prompt.messages), tokenize=True, add_generation_prompt=True, return_dict=True, think=True)
        assert list(prompt.ids) == alone["input_ids"]
        assert tokenizer.decode(prompt.ids).endswith("<think>")


def test_without_a_chat_template_strings_pass_as_they_are_and_message_lists_are_refused(tmp_path):
    bare = byte_tokenizer(template=None)
    text = DataConfig(prompts=write_jsonl(tmp_path / "text.jsonl", [{"prompt": "Once upon"}]))
    assert bare.decode(load_prompts(text, bare, part="all").prompts[0].ids) == "Once upon"
    messages = DataConfig(prompts=write_jsonl(tmp_path / "list.jsonl", [{"prompt": [{"role": "user", "content": "Hi"}]}]))
    with pytest.raises(ValueError, match=r"list\.jsonl:1: .*no chat template"):
        load_prompts(messages, bare, part="all")


def test_what_the_chat_template_refuses_is_the_users_mistake(tmp_path):
    strict = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}]))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: the student's chat template refuses the messages \(roles must alternate\)"):
        load_prompts(data, strict, part="all")
    with pytest.raises(ValueError, match="must not set tokenize"):
        load_prompts(replace(data, chat_template_kwargs={"tokenize": True}), strict, part="all")


def test_a_supervised_response_ends_with_the_end_of_sequence(tmp_path, tokenizer):
    data = DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b c"}, {"prompt": "only"}]))
    with_target, without = load_prompts(data, tokenizer, part="all").prompts
    assert tokenizer.decode(response_ids(with_target, tokenizer)) == "b c<|end|>"
    with pytest.raises(ValueError, match=r"prompt 1 \('only'\) has no text to learn from"):
        response_ids(without, tokenizer)


def test_prompts_too_long_with_their_targets_are_dropped_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "a", "answer": "b" * length} for length in (3, 9, 4)]
    prompts = load_prompts(DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", rows)), tokenizer, part="all")
    whole = len(prompts.prompts[0].ids) + 4 + 1
    kept = with_targets(prompts, tokenizer, max_tokens=whole)
    assert [prompt.target for prompt in kept.prompts] == ["bbb", "bbbb"]
    assert kept.num_dropped_long == 1
    with pytest.raises(ValueError, match="all 3 prompts with their targets are longer than 3 tokens"):
        with_targets(prompts, tokenizer, max_tokens=3)


def test_a_row_without_a_target_is_refused_before_training(tmp_path, tokenizer):
    prompts = load_prompts(DataConfig(prompts=write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "only"}])), tokenizer, part="all")
    with pytest.raises(ValueError, match="no text to learn from"):
        with_targets(prompts, tokenizer, max_tokens=100)


# Tokenizers


def test_a_tokenizer_loads_from_its_folder_and_equals_itself(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_tokenizer(tokenizer, loaded)
    assert loaded.eos_token_id == tokenizer.eos_token_id


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model_only").mkdir()
    (tmp_path / "model_only" / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    byte_tokenizer(eos=None).save_pretrained(tmp_path / "endless")
    expected = {"absent": "does not exist", "empty": "tokenizer", "model_only": "tokenizer", "endless": "no end-of-sequence token"}
    for name, message in expected.items():
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)


def swapped_letters() -> Any:
    other = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(other)), eos_token="<|end|>")


def lowercasing() -> Any:
    other = byte_tokenizer()
    other.backend_tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    return other


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (lambda: byte_tokenizer(merges=(("t", "h"),)), "token .* is .* for the student and .* for the teacher"),
        (swapped_letters, "token 'a' is"),
        (lambda: byte_tokenizer(specials=[*SPECIALS, "<|tool|>"]), "'<|tool|>' is absent for the student"),
        (lowercasing, "encode 'The quick brown fox"),
    ],
    ids=["another merge", "swapped ids", "one more special token", "another normalizer"],
)
def test_the_first_difference_between_tokenizers_is_named(tokenizer, teacher, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_same_tokenizer(tokenizer, teacher())
    assert "alignment.kind=identity" in str(raised.value)


def test_equal_ids_with_another_end_of_sequence_are_the_same_tokenizer(tokenizer, caplog):
    check_same_tokenizer(tokenizer, byte_tokenizer(eos="<|system|>"))
    assert "the student ends with '<|end|>', the teacher with '<|system|>'" in caplog.text

"""What loaders ask of a Hugging Face folder, vLLM's among them, without their packages."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open

# vLLM also reads these, and would take a pickle for weights of its own.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")


def assert_loadable_by_rule(folder: Path) -> None:
    """Weights in safetensors files with metadata, each tensor in one of them, an index that agrees, architecture, dtype and tokenizer named."""
    files = sorted(folder.glob("*.safetensors"))
    assert files
    assert not [file for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern)]
    holders: dict[str, str] = {}
    num_bytes = 0
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata()["format"] == "pt"
            for name in opened.keys():  # noqa: SIM118
                assert name not in holders, f"{name} is in {holders[name]} and {file.name}"
                holders[name] = file.name
                num_bytes += opened.get_tensor(name).nbytes
    index = folder / "model.safetensors.index.json"
    if len(files) > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"] == holders
        assert content["metadata"]["total_size"] == num_bytes
        assert [file.name for file in files] == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    else:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not index.exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"]
    assert config.get("dtype") or config.get("torch_dtype")
    assert config["vocab_size"]
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "tokenizer_config.json").is_file()

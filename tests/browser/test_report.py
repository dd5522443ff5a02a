"""The report in a real browser that has no network: every picture is decoded, nothing is asked for, nothing is complained of, nothing hangs over the edge.

Each test prints where its screenshot is. Not covered: whether it is beautiful, and browsers other than Chromium.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from opd_megatron.reporting import MetricsWriter, RunDirectory
from opd_megatron.reporting.report import write_report
from tests.browser.browser import Browser

SCREENSHOTS = Path(__file__).parents[2] / "runs" / "screenshots"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def record_run(path: Path, *, rate: float, num_steps: int, kept: float, last_accuracy: float) -> Path:
    """Write a run as the trainer would, with every kind of number the report draws."""
    config = {
        "seed": 1234,
        "student": {"hf": "models/Qwen3-1.7B", "layout": {"tensor": 2, "pipeline": 2}},
        "teacher": {"hf": "models/Qwen3-8B", "layout": {"tensor": 4}},
        "loss": {"kind": "reverse_kl"},
        "importance": {"rule": "all" if kept == 1 else "soft_or_topk", "ratio": kept},
        "training": {"steps": num_steps, "learning_rate": 1e-6},
    }
    run = RunDirectory.open(path, recipe="qwen3_1p7b_from_8b_8gpu_h100" + ("" if kept == 1 else "_tip"), config=config, may_change=())
    writer = MetricsWriter(run, first_step=1)
    writer.log_evaluation(evaluation(0, "teacher", 0.82))
    writer.log_evaluation(evaluation(0, "student", 0.31))
    noise = np.random.default_rng(int(100 * kept))
    for step in range(1, num_steps + 1):
        seconds = {"rollout_seconds": 6 + noise.normal(0, 0.3), "teacher_seconds": 1.2, "train_seconds": 3.1 * (0.6 + 0.4 * kept)}
        writer.log_step(
            {
                "step": step,
                "loss": 0.8 * math.exp(-rate * step) + 0.05 + abs(noise.normal(0, 0.01)),
                "divergence": 0.9 * math.exp(-rate * step) + 0.02,
                "student_entropy": 0.6 + 0.2 * math.exp(-rate * step),
                "kept_fraction": kept,
                "response_tokens": 60_000 + 100 * step,
                "response_length_mean": 600 + step,
                "truncated_fraction": 0.1 / step,
                "grad_norm": 0.4 + abs(noise.normal(0, 0.1)),
                "lr": 1e-6 * min(1, step / 10),
                "tokens_per_second": 9000 + noise.normal(0, 300),
                "rollout_drift_mean": 1e-3,
                "rollout_drift_max": 0.2,
                **seconds,
                "step_seconds": sum(seconds.values()) + 0.4,
            }
        )
        if step % (num_steps // 4) == 0:
            writer.log_evaluation(evaluation(step, "student", 0.31 + (last_accuracy - 0.31) * (1 - math.exp(-3 * step / num_steps))))
    writer.close("finished")
    run.write_status("finished")
    return path


def evaluation(step: int, who: str, accuracy: float) -> dict[str, Any]:
    examples = [
        {
            "prompt": f"What is {17 * i} + {i}?",
            "response": f"Let me add them. {17 * i} + {i} = {18 * i + (step == 0)}",
            "answer": str(18 * i),
            "score": float(step > 0),
        }
        for i in range(1, 4)
    ]
    numbers = {"accuracy": accuracy, "pass_at_k": {"1": accuracy}, "prompts": 512, "seconds": 40.0, "temperature": 0.0}
    return {"step": step, "who": who, **numbers, "examples": examples}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [
        record_run(folder / "all_tokens", rate=0.03, num_steps=100, kept=1.0, last_accuracy=0.74),
        record_run(folder / "tip_half", rate=0.05, num_steps=100, kept=0.5, last_accuracy=0.77),
    ]


@pytest.mark.parametrize("which", ["one", "two"])
@pytest.mark.parametrize("width", [1280, 420])
def test_a_report_is_whole_in_a_browser_without_a_network(
    browser: Browser, runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str, width: int
) -> None:
    report = write_report(runs[: 1 if which == "one" else 2], tmp_path / "report.html")
    visit = browser.visit(report, width)
    assert [picture for picture in visit.pictures if not (picture["decoded"] and picture["width"] > 0 and picture["height"] > 0)] == []
    assert len(visit.pictures) == report.read_text().count("<img ") > 10
    assert all(picture["shown"] > 300 for picture in visit.pictures)
    assert visit.requests == []
    assert visit.complaints == []
    assert browser.value("document.documentElement.scrollWidth") <= width, "nothing hangs over the edge"
    assert browser.value("[...document.querySelectorAll('.wide')].every(table => table.scrollWidth <= table.clientWidth)"), "no column is out of sight"
    out = browser.screenshot(SCREENSHOTS / f"report_of_{which}_{width}.png")
    with capsys.disabled():
        print(f"\nscreenshot: {out}")
    pixels = (255 * matplotlib.image.imread(out)[..., :3]).astype(np.uint8)
    assert pixels.shape[1] == width
    # One number per colour.
    colors = pixels.astype(np.int32) @ (1 << 16, 1 << 8, 1)
    found, counts = np.unique(colors, return_counts=True)
    assert len(found) > 1000, "curves, text, and what lies between their edges and the page"
    assert counts.max() < 0.97 * counts.sum(), "a page that is not blank"
    # Every picture is there where it is drawn, and not white.
    for box in browser.value(
        "[...document.images].map(image => { const r = image.getBoundingClientRect(); return [r.left, r.top + scrollY, r.width, r.height]; })"
    ):
        left, top, wide, high = map(int, box)
        picture = colors[top : top + high, left : left + wide]
        assert picture.shape == (high, wide)
        assert len(np.unique(picture)) > 50


def test_the_browser_sees_what_a_report_must_not_do(browser: Browser, tmp_path: Path) -> None:
    """A check that sees nothing always passes: a picture from elsewhere, a damaged one, a script that fails."""
    page = tmp_path / "page.html"
    page.write_text(
        '<img alt="elsewhere" src="http://example.invalid/a.png"><img alt="damaged" src="data:image/png;base64,AAAA">'
        '<img alt="beside" src="missing.png"><script>console.error("oh"); nothing.at.all</script>'
    )
    visit = browser.visit(page)
    found = {picture["name"]: (picture["decoded"], picture["width"]) for picture in visit.pictures}
    assert found == {"elsewhere": (False, 0), "damaged": (False, 0), "beside": (False, 0)}
    assert "http://example.invalid/a.png" in visit.requests
    assert (tmp_path / "missing.png").as_uri() in visit.requests
    assert "oh" in visit.complaints
    assert any("Uncaught" in text for text in visit.complaints)

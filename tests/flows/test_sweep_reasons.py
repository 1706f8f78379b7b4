"""Why a trial of a sweep failed, and which score selects the best one."""

from __future__ import annotations

import pytest

from flows.sweep.reasons import failure_reason
from flows.sweep.trials import Sweep, make_grid, selection_scores
from lotlip.config.params import Params, load_params
from lotlip.core.section import ConfigError
from lotlip.evaluate.records import BenchmarkScores
from tests.workspace import ROOT

INFO = "12:00:01.123 | INFO    | Flow run 'pretrain-lotlip' - lotlip seed 0: step 10/400"
DVC = "ERROR: failed to reproduce 'pretrain@lotlip': failed to run: python -m flows pretrain lotlip, exited with 1"


@pytest.mark.parametrize(
    ("lines", "status", "expected"),
    [
        (
            [INFO, "error in pretrain a: the loss is nan", INFO, DVC],
            1,
            "error in pretrain a: the loss is nan",
        ),
        ([INFO, "Traceback (most recent call last):", "KeyError: 'x'", DVC, INFO], 1, "KeyError: 'x'"),
        ([INFO, "torch.OutOfMemoryError: CUDA out of memory.", DVC], 1, "torch.OutOfMemoryError: CUDA out of memory."),
        (
            [INFO, "12:00:02.000 | ERROR   | Flow run 'a' - went wrong", INFO],
            1,
            "| ERROR   | Flow run 'a' - went wrong",
        ),
        ([INFO, DVC, INFO], 255, DVC),
        ([INFO, INFO], -9, "killed by SIGKILL"),
        ([INFO, INFO], 137, "killed by SIGKILL"),
        ([INFO], 3, "status 3"),
        ([], 1, "status 1"),
    ],
)
def test_the_reason_is_an_error_and_never_an_informational_line(lines: list[str], status: int, expected: str):
    reason = failure_reason("\n".join(lines), status)
    assert expected in reason
    assert "INFO" not in reason


# --- the score that selects the best trial ----------------------------------------------------------------------


def params_with_benchmarks(*names: str) -> Params:
    """The shipped params.yaml with other benchmarks in this order."""
    data = load_params(ROOT / "params.yaml").model_dump(mode="json", exclude_unset=True)
    published = {"folder": "published", "partial": True}
    benchmarks = {name: {"kind": "held-out"} if name == "held-out" else published for name in names}
    return Params.model_validate({**data, "registry": None, "findings": {}, "evaluate": {"benchmarks": benchmarks}})


SCORES = {
    "coco": {"short.text_to_image.r1": 0.9, "short.image_to_text.r1": 0.7},
    "held-out": {"short.text_to_image.r1": 0.2, "short.image_to_text.r1": 0.1, "short.text_to_image.r5": 0.5},
}


def selected(params: Params, select_by: str | None = None) -> dict[str, float]:
    sweep = Sweep(name="s", seeds=[0], select_by=select_by)
    (trial,) = make_grid(sweep, params)
    names = sorted(params.evaluate.names)  # like the keys of JSON files
    results = {name: BenchmarkScores(seeds={0: SCORES[name.removesuffix("-partial")]}) for name in names}
    return selection_scores(sweep, trial, results)


@pytest.mark.slow
def test_the_first_benchmark_of_params_yaml_selects_regardless_of_its_name():
    assert selected(params_with_benchmarks("held-out", "coco")) == {
        "short.image_to_text.r1": 0.1,
        "short.text_to_image.r1": 0.2,
    }
    assert selected(params_with_benchmarks("coco", "held-out")) == SCORES["coco"]


def test_a_sweep_names_the_score_that_selects():
    params = params_with_benchmarks("held-out", "coco")
    assert selected(params, "coco-partial.short.text_to_image.r1") == {"short.text_to_image.r1": 0.9}
    assert selected(params, "held-out.short.text_to_image.r5") == {"short.text_to_image.r5": 0.5}
    with pytest.raises(
        ConfigError, match=r"benchmark held-out has no long.text_to_image.r1 to .*short.text_to_image.r5"
    ):
        selected(params, "held-out.long.text_to_image.r1")


@pytest.mark.parametrize("name", ["held-out.short.text_to_image.r2", "short.text_to_image.r1", "scenes.long"])
def test_an_unknown_score_is_an_error_before_any_trial(name: str):
    with pytest.raises(ConfigError, match=f"select_by: no score '{name}'") as caught:
        make_grid(Sweep(name="s", select_by=name), params_with_benchmarks("held-out", "coco"))
    assert "did you mean" in str(caught.value) or name == "scenes.long"
    assert "coco-partial.classification.top1" in str(caught.value)
    assert "mean_rank" not in str(caught.value)  # lower is better

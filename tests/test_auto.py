"""`import lotlip` is fast and registers the model with transformers, in either order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.integration
def test_importing_the_package_imports_no_heavy_package():
    heavy = "torch, transformers, timm, pandas, mlflow, prefect, great_expectations, PIL, pydantic"
    loaded = run(f"import sys, lotlip; print([name for name in {heavy.split(', ')} if name in sys.modules])")
    assert loaded == "[]"


ASK = """
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = type(AutoConfig.for_model("lotlip"))
for mapping in (AutoModel._model_mapping, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING):
    print(mapping[config])
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    "first",
    [
        "import lotlip",
        pytest.param("from transformers import AutoModel; import lotlip", marks=pytest.mark.system),
        pytest.param("import lotlip.models.text.text_tower", marks=pytest.mark.system),
    ],
)
def test_auto_classes_know_the_model(first):
    model, processor, image_processor = run(f"{first}\n{ASK}").splitlines()
    assert "lotlip.models.lotlip.LotlipModel" in model
    assert "lotlip.models.processing.LotlipProcessor" in processor
    assert "lotlip.models.image_processing.LotlipImageProcessor" in image_processor


def test_unknown_names_are_attribute_errors():
    import lotlip

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lotlip.nothing  # noqa: B018
    assert lotlip.LotlipConfig.model_type == "lotlip"

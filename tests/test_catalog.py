import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace import catalog, techniques
from headrace.errors import ConfigError

MANIFEST = """
from headrace.seams.technique import Technique
TECHNIQUE = Technique(name={name!r}, title="t", paper="p", url="https://p", is_lossless=True, measured="m")
"""
Add = Callable[[str, str], None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Add a technique folder in a place of its own."""
    monkeypatch.setattr(techniques, "__path__", [*techniques.__path__, str(tmp_path)])

    def write(name: str, text: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"headrace.techniques.{name}", raising=False)

    return write


@pytest.mark.parametrize("name", catalog.names())
def test_every_technique_has_a_manifest_of_its_name(name: str) -> None:
    assert catalog.load(name).name == name


@pytest.mark.parametrize("name", catalog.names())
def test_every_technique_says_where_its_paper_can_be_read(name: str) -> None:
    assert catalog.load(name).url.startswith("https://")


@pytest.mark.parametrize("name", catalog.names())
def test_every_technique_fills_a_seam(name: str) -> None:
    assert catalog.load(name).seams


def test_a_new_folder_is_listed_and_loaded_at_once(add: Add) -> None:
    add("fresh_folder", MANIFEST.format(name="fresh_folder"))
    assert "fresh_folder" in catalog.names()
    assert catalog.load("fresh_folder").title == "t"


def test_an_unknown_technique_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no technique 'sarati'; known are .*sarathi"):
        catalog.load("sarati")


def test_a_manifest_that_calls_itself_otherwise_is_refused(add: Add) -> None:
    add("copied_folder", MANIFEST.format(name="original"))
    with pytest.raises(ConfigError, match="copied_folder calls itself 'original'"):
        catalog.load("copied_folder")


def test_a_folder_without_a_manifest_is_refused(add: Add) -> None:
    add("bare_folder", "")
    with pytest.raises(ConfigError, match="bare_folder has no TECHNIQUE of type Technique"):
        catalog.load("bare_folder")


def test_loading_all_manifests_imports_no_torch() -> None:
    code = (
        "import sys; from headrace import catalog; [catalog.load(n) for n in catalog.names()];"
        " print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

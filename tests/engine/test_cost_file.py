"""The cost of steps kept between starts: of this instance, sound, and readable, or none."""

import json
import logging
from dataclasses import fields, replace

import pytest

from headrace.core.cost import CostModel
from headrace.engine.cost_file import CostFile, Instance

COST = CostModel(step_s=0.01, prompt_s=0.002, token_s=1e-3, pair_s=1e-7, decode_s=2e-3, context_s=1e-6, r2=0.97)
INSTANCE = Instance(
    fingerprint="f" * 64, device="cpu", threads=2, pack="varlen", processor="Fast, 2 cores", kernels="native-1.so"
)


def test_a_sound_cost_is_read_as_it_was_written(tmp_path):
    CostFile(tmp_path / "new", INSTANCE).write(COST)
    assert CostFile(tmp_path / "new", INSTANCE).read() == COST


@pytest.mark.parametrize("field", [field.name for field in fields(Instance)])
def test_another_instance_or_machine_has_none_even_in_the_place_of_this_one(tmp_path, field):
    other = CostFile(tmp_path, replace(INSTANCE, **{field: 1 if field == "threads" else "other"}))
    CostFile(tmp_path, INSTANCE).write(COST)
    assert other.read() is None
    CostFile(tmp_path, INSTANCE).path.rename(other.path)
    assert other.read() is None


def test_a_fit_that_explains_its_samples_badly_is_neither_kept_nor_believed(tmp_path):
    kept = CostFile(tmp_path, INSTANCE)
    kept.write(replace(COST, r2=0.8))
    assert not list(tmp_path.iterdir())
    kept.write(COST)
    kept.path.write_text(kept.path.read_text().replace("0.97", "0.8"))
    assert kept.read() is None


def test_a_bad_fit_leaves_the_good_one_of_before(tmp_path):
    kept = CostFile(tmp_path, INSTANCE)
    kept.write(COST)
    kept.write(replace(COST, r2=0.8))
    assert kept.read() == COST


def without_a_coefficient(content):
    content["cost"].pop("token_s")


def below_zero(content):
    content["cost"]["token_s"] = -1.0


def no_number(content):
    content["cost"]["token_s"] = "fast"


def not_finite(content):
    content["cost"]["token_s"] = float("nan")


def no_cost(content):
    content.pop("cost")


@pytest.mark.parametrize("damage", [without_a_coefficient, below_zero, no_number, not_finite, no_cost])
def test_a_file_that_makes_no_sense_counts_for_nothing(tmp_path, damage):
    kept = CostFile(tmp_path, INSTANCE)
    kept.write(COST)
    content = json.loads(kept.path.read_text())
    damage(content)
    kept.path.write_text(json.dumps(content))
    assert kept.read() is None


@pytest.mark.parametrize("text", ["", "{", "[]", "\N{REPLACEMENT CHARACTER}"])
def test_a_torn_file_counts_for_nothing_and_is_written_over(tmp_path, text):
    kept = CostFile(tmp_path, INSTANCE)
    kept.write(COST)
    kept.path.write_text(text, encoding="utf-16")
    assert kept.read() is None
    kept.write(COST)
    assert kept.read() == COST


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        CostFile(tmp_path / "file" / "folder", INSTANCE).write(COST)
    assert "measurement not kept" in caplog.text

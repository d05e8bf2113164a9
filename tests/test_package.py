"""`import headrace` is light and gives what it promises."""

import subprocess
import sys

import pytest

import headrace

HEAVY = ("torch", "triton", "transformers", "numpy", "fastapi", "grpc", "nixl_cu12", "prometheus_client")


def modules_after(statement):
    code = f"import sys\n{statement}\nsys.stdout.write(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not modules_after("import headrace").intersection(HEAVY)


def test_catching_an_error_loads_no_grpc():
    assert not modules_after("from headrace import Saturated").intersection(HEAVY)


def test_a_client_loads_grpc_and_nothing_else_that_is_heavy():
    loaded = modules_after("from headrace import AsyncClient, Client")
    assert loaded.intersection(HEAVY) == {"grpc"}


@pytest.mark.parametrize("name", headrace.__all__)
def test_every_public_name_can_be_had(name):
    assert getattr(headrace, name) is not None
    assert name in dir(headrace)


def test_public_names_are_sorted_and_unique():
    assert headrace.__all__ == sorted(set(headrace.__all__))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = headrace.Server


def test_every_error_is_public():
    from headrace.errors import by_code

    assert {kind.__name__ for kind in by_code().values()} <= set(headrace.__all__)

"""Every example in a docstring is executed, with the printed numbers it shows."""

import doctest
import importlib
import pkgutil

import pytest

import reroll

# Importing `__main__` would start the command line.
MODULES = [m.name for m in pkgutil.walk_packages(reroll.__path__, "reroll.") if not m.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        pytest.skip(f"{name} needs an extra that is not installed: {missing}")
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0

"""Compiled kernels are kept for as long as no kernel's source changes."""

import numba

from reroll.kernels import jit
from reroll.kernels.recurrence import cpu


def test_the_folder_is_named_by_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "KERNELS", tmp_path)
    (tmp_path / "inner").mkdir()
    source = tmp_path / "inner" / "cpu.py"
    names = []
    for text in ("a = 1", "a = 2", "a = 1"):
        source.write_text(text)
        names.append(jit.folder.__wrapped__())
    assert names[0] == names[2] != names[1]


def test_kernels_are_kept_there_and_the_setting_is_put_back(monkeypatch):
    assert cpu.loop.stats.cache_path.startswith(jit.folder())
    assert cpu.execute.stats.cache_path.startswith(jit.folder())
    before = numba.config.CACHE_DIR
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/somewhere")
    assert jit.folder.__wrapped__().startswith("/somewhere/numba-")
    jit.jit(lambda: None)
    assert numba.config.CACHE_DIR == "/somewhere"
    monkeypatch.undo()
    assert before == numba.config.CACHE_DIR


def test_compiling_is_said_once_and_only_of_our_own_kernels(monkeypatch, caplog):
    monkeypatch.setattr(jit.ANNOUNCER, "said", False)
    caplog.set_level("WARNING", "reroll.kernels.jit")
    for module, said in (("mine", 0), (None, 0), ("reroll.kernels.a", 1), ("reroll.kernels.b", 1)):
        kernel = numba.njit(lambda: None)
        kernel.py_func.__module__ = module
        kernel()
        assert len(caplog.messages) == said
    assert caplog.messages[0].startswith("Compiling some kernels for this processor (kept for next time): ")

"""`reroll.measure`: what is known beforehand is what it finds."""

import os
import signal
import threading
import time

import pytest
import torch

import reroll
from reroll.data.task import sequence_losses
from reroll.errors import RunError, UsageError
from reroll.grad import Backprop, CentralDifference
from reroll.keys import Key
from tests.models import a_batch, build

NOISE = 1_500_000
"""Bytes of pages that a process touches beside what is asked for."""


def held(megabytes):
    """A tensor of so many MB, every page of it written."""
    return torch.full((megabytes * 250_000,), 1.5)


@pytest.mark.parametrize("megabytes", [7, pytest.param(91, marks=pytest.mark.slow)])
def test_the_peak_is_what_was_held_at_once(megabytes):
    """A small tensor comes and goes, then the large one with half of it: the peak is of these two, nothing else."""
    before = held(40)  # what is there already does not count

    def call():
        held(megabytes // 2).sum()
        large = held(megabytes)
        return large[0] + held(megabytes // 2).sum() + before[0]

    expected = (megabytes + megabytes // 2) * 1_000_000
    assert abs(reroll.measure(call).peak_bytes - expected) < NOISE


@pytest.mark.slow
def test_what_is_kept_from_the_warm_up_does_not_count():
    kept = []

    def call():
        if not kept:
            kept.append(held(50))
        return kept[0].sum()

    assert reroll.measure(call).peak_bytes < NOISE
    assert reroll.measure(call, warmup=0).peak_bytes > 49_000_000


@pytest.mark.slow
def test_memory_the_c_library_holds_on_to_counts_when_it_is_used_again():
    """Small pieces are freed into its heap, which cannot shrink below the last of them, which is kept."""
    kept = []

    def call():
        pieces = [torch.full((2000,), 1.5) for _ in range(3000)]
        if not kept:
            kept.append(torch.full((2000,), 1.5))
        return pieces

    assert abs(reroll.measure(call).peak_bytes - 24_000_000) < 2 * NOISE


def test_passes_seconds_and_threads_are_of_one_call_elsewhere(tmp_path):
    model, batch, calls, file = build("gru"), a_batch(), [], tmp_path / "threads"

    def call():
        calls.append(1)
        CentralDifference(9, 0.01)(model, sequence_losses, batch, Key(0))
        Backprop()(model, sequence_losses, batch, Key(0))
        file.write_text(f"{torch.get_num_threads()} threads, call {len(calls)}")
        time.sleep(0.2)

    found = reroll.measure(call, warmup=2, threads=3)
    assert found.forward_passes == 2 * 9 + 1
    assert found.seconds >= 0.2
    assert file.read_text() == "3 threads, call 3"
    assert calls == []


def fail():
    raise ValueError("the seventh seal is missing")


def test_a_failure_is_told_in_its_words():
    with pytest.raises(RunError, match="The measured call failed: ValueError: the seventh seal is missing"):
        reroll.measure(fail)


@pytest.mark.slow
def test_a_process_that_dies_without_a_word_is_told_of():
    with pytest.raises(RunError, match=r"The measured call failed: no message; its process exited with -9"):
        reroll.measure(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_what_cannot_be_sent_is_refused():
    lock = threading.Lock()
    with pytest.raises(UsageError, match="cannot be sent to a fresh process .TypeError: cannot pickle.*Create"):
        reroll.measure(lambda: lock.acquire())


@pytest.mark.gpu
def test_the_peak_on_a_card_is_the_allocators():
    before = torch.zeros(1 << 20, device="cuda")
    found = reroll.measure(lambda: (before + 1).sum() + torch.ones(1 << 22, device="cuda").sum())
    assert 4 << 22 <= found.peak_bytes < (4 << 22) + (5 << 20)

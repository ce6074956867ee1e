import numpy as np
import pytest
import torch

from reroll.errors import UsageError
from reroll.kernels.philox import philox, random_integers, random_words, stream_id
from reroll.keys import Key

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
@pytest.mark.parametrize("kind", ["python", "numpy", "torch"])
def test_published_vectors(counter, key, words, kind):
    wrap = {"python": int, "numpy": lambda c: np.array([c]), "torch": lambda c: torch.tensor([c])}[kind]
    assert tuple(int(torch.as_tensor(w)) for w in philox(*map(wrap, counter), key)) == words


def test_stream_known_answers():
    key, stream = Key(0).at(0), stream_id("rnn.weight")
    assert stream == 0xC611F971
    assert philox(0, 0, 0, stream, key.words) == (0x11552D0D, 0x68A754B3, 0x63A11955, 0x9F4EFF27)
    assert philox(0, 0, 5, stream, key.words) == (0xB790A62B, 0xC4FD2C13, 0x83109EE1, 0x1A2701EF)


def test_words_do_not_depend_on_how_many_are_asked_for():
    assert np.array_equal(random_words(Key(3), 1001)[:17], random_words(Key(3), 17))


def test_integers_fill_their_range_evenly():
    draws = random_integers(Key(1), (300, 100), high=7, low=-2)
    counts = np.bincount((draws + 2).ravel(), minlength=9)
    assert counts[9:].sum() == 0
    expected = draws.size / 9
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


def test_integers_reject_an_empty_range():
    with pytest.raises(UsageError, match="low=3, high=3"):
        random_integers(Key(0), 4, 3, low=3)

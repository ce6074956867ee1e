import numpy as np
import pytest

from reroll.errors import UsageError
from reroll.keys import Key


def test_known_answers():
    assert Key(0).digest.hex() == "f351ebb07a78ce3e"
    assert Key(0).at(0).digest.hex() == "93b8755c74c34196"


def test_words_are_the_little_endian_halves():
    low, high = Key(0).at(0).words
    assert low.to_bytes(4, "little") + high.to_bytes(4, "little") == Key(0).at(0).digest


def test_paths_do_not_collide():
    # Added seeds collide here: base + parameter + chunk is the same for (0, 1) and (1, 0).
    keys = {Key(s).at(a).at(b) for s in range(4) for a in range(20) for b in range(20)}
    assert len(keys) == 4 * 20 * 20
    assert Key(1).at("1") != Key(1).at(1)


def test_numpy_integers_are_integers():
    assert Key(np.int64(5)).at(np.uint8(3)) == Key(5).at(3)


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, None])
def test_bad_seed_names_the_argument(seed):
    with pytest.raises(UsageError, match="seed="):
        Key(seed)


def test_bad_index():
    with pytest.raises(UsageError, match=r"index=-3 must lie in \[0, 2\*\*64\)"):
        Key(0).at(-3)


def test_round_trip_through_bytes():
    key = Key(7).at("x")
    assert Key.from_bytes(key.digest) == key
    with pytest.raises(UsageError, match="8 bytes; got 3"):
        Key.from_bytes(b"abc")

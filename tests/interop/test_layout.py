"""A layout says what it says in words: beside each pattern, the same in numpy."""

import numpy as np
import pytest

from gptjax.interop.layout import axes, shape, sizes, view

SIZES = {"N": 2, "K": 1, "H": 3, "D": 5, "F": 4, "E": 2, "G": 2, "J": 2}


@pytest.mark.parametrize(
    ("theirs", "ours", "same"),
    [
        ("(N H) D", "D N H", lambda x: x.T.reshape(5, 2, 3)),
        ("D (N H)", "N H D", lambda x: x.T.reshape(2, 3, 5)),
        ("D (N+[N]+N H)", "D N H", lambda x: np.split(x, 3, axis=1)[1].reshape(5, 2, 3)),
        ("([N]+K+K H) D", "D N H", lambda x: x[:6].T.reshape(5, 2, 3)),
        ("(N+K+[K] H) D", "D K H", lambda x: x[9:].T.reshape(5, 1, 3)),
        ("(N H+[H]+H) D", "D N H", lambda x: x.reshape(2, 3, 3, 5)[:, 1].transpose(2, 0, 1)),
        ("E D (F 1+[1])", "E D F", lambda x: x[..., 1::2]),
        ("(F+[F]) D", "D F", lambda x: x[4:].T),
        ("(J [G]+1+1 H) D", "D (J G) H", lambda x: x.reshape(2, 4, 3, 5)[:, :2].transpose(3, 0, 1, 2)),
        ("(J G+1+[1] H) D", "D J H", lambda x: x.reshape(2, 4, 3, 5)[:, 3].transpose(2, 0, 1)),
    ],
)
def test_a_pattern_picks_and_orders_without_a_copy(theirs, ours, same):
    tensor = np.arange(np.prod(shape(theirs, SIZES))).reshape(shape(theirs, SIZES))
    picked = view(tensor, theirs, ours, SIZES)
    np.testing.assert_array_equal(picked, same(tensor))
    assert np.shares_memory(picked, tensor)
    merged = tuple(np.prod([SIZES[letter] for letter in axis.split()]) for axis in axes(ours))
    found = sizes(ours, merged, {"J": 2})
    assert found == {letter: SIZES[letter] for letter in found}

"""Stop strings: where a text ends, however it is divided, and that nothing of a stop is ever passed on."""

import random

import pytest

from gemma_deploy.errors import UsageError
from gemma_deploy.text import StopStrings


def divided(text, rng):
    """Pieces of a text, empty ones among them."""
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def ends(text, stops):
    """(the text before the stop that is complete first, which one), a character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def passed(pieces, stops):
    strings = StopStrings(stops)
    shown = "".join([strings.push(piece) for piece in pieces])
    return shown + strings.flush(), strings.found


def test_any_division_of_a_text_ends_where_the_whole_does():
    rng, stopped = random.Random(3), 0
    for _ in range(4000):
        text = "".join(rng.choice("ab€") for _ in range(rng.randrange(1, 14)))
        stops = ["".join(rng.choice("ab€") for _ in range(rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        expected = ends(text, stops)
        stopped += expected[1] is not None
        assert passed(divided(text, rng), stops) == expected, (text, stops)
    assert 1000 < stopped < 3900


def test_text_is_held_back_no_longer_than_it_may_begin_a_stop():
    strings = StopStrings(["<end>"])
    assert [strings.push(piece) for piece in ("a<", "e", "x", "<<end", ">b", "c")] == ["a", "", "<ex", "<", "", ""]
    assert (strings.found, strings.flush()) == ("<end>", "")
    strings = StopStrings(["<end>"])
    assert (strings.push("a<en"), strings.flush(), strings.found) == ("a", "<en", None)


def test_without_stops_everything_passes_and_one_text_is_one_stop():
    assert passed(["a", "", "b"], ()) == ("ab", None)
    assert passed(["xab", "c"], "ab") == ("x", "ab")
    with pytest.raises(UsageError, match="a stop string is empty"):
        StopStrings(["a", ""])

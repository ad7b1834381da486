"""Which runs of a sweep are best, against what the words say, pair by pair."""

import numpy as np
import pytest

from stillroom.run.sweep import front


def test_equal_runs_are_listed_once() -> None:
    point = {"quality": 0.9, "latency": 2.0}
    assert front({"b": point, "a": point, "c": {"quality": 0.8, "latency": 3.0}}) == ["b"]
    assert front({"0": {"quality": 0.9}, "1": {"quality": 0.9}, "2": {"quality": 0.1}}) == ["0"]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_every_point_that_none_beats(seed: int) -> None:
    """Few values, so that many runs are equal in one objective or in all."""
    chance = np.random.default_rng(seed)
    # The better the slower, as it is.
    found = {
        f"{i:02}": {"quality": float(q), "latency": float(q + t), "size": float(s)}
        for i, (q, t, s) in enumerate(chance.integers(0, 4, size=(30, 3)))
    }

    def better(a: dict[str, float], b: dict[str, float]) -> bool:
        gains = [a["quality"] - b["quality"], b["latency"] - a["latency"], b["size"] - a["size"]]
        return min(gains) >= 0 and max(gains) > 0

    best = front(found)
    points = [tuple(found[name].values()) for name in best]
    unbeaten = {
        tuple(mine.values()) for mine in found.values() if not any(better(x, mine) for x in found.values())
    }
    assert set(points) == unbeaten and len(points) == len(unbeaten) > 1
    qualities = [found[name]["quality"] for name in best]
    assert qualities == sorted(qualities, reverse=True)

"""Who makes what: one claim a cohort, and a dead or silent owner's is taken over, whatever the clocks say."""

from __future__ import annotations

from pathlib import Path

import pytest

from handful.runs.claims import Claims, Timeouts


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def seen(claims: Claims, key: str) -> str | None:
    return claims.holder(key, claims.claimed()[key])


def test_a_cohort_is_claimed_once_and_counts_while_its_worker_is_there(tmp_path: Path):
    one, other = Claims(tmp_path, "r"), Claims(tmp_path, "r")
    with other.working():
        with one.working():
            assert one.claim("a-0000") == 0
            assert other.claim("a-0000") is None
            assert seen(other, "a-0000") == one.worker
            assert other.others() == [one.worker]
        assert seen(other, "a-0000") is None, "its worker has left"
        assert other.claim("a-0000", 0) == 1
        assert not one.still_mine("a-0000", 0)
        assert other.still_mine("a-0000", 1)
    other.sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_worker_of_this_machine_is_gone_at_once(tmp_path: Path):
    dead, alive = Claims(tmp_path, "r"), Claims(tmp_path, "r")
    with alive.working():
        block = dead.working(beat=1e6)
        block.__enter__()
        dead.claim("a-0000")
        assert seen(alive, "a-0000") == dead.worker
        assert dead._lock is not None
        dead._lock.release()  # as the system does for a process that is killed
        assert seen(alive, "a-0000") is None
        dead._stop.set()


@pytest.mark.parametrize("offset", [-7200.0, 0.0, 7200.0])
def test_a_worker_of_another_machine_is_gone_when_its_heart_stands_still_for_the_observer(tmp_path: Path, offset: float):
    here, there = Clock(), Clock()
    there.now = offset  # their clocks differ by hours: no time of the other is ever looked at
    far = Claims(tmp_path, "r", machine="far", clock=there)
    near = Claims(tmp_path, "r", machine="near", clock=here, timeouts=Timeouts(90))
    with near.working(beat=1e6), far.working(beat=1e6):
        far.claim("a-0000")
        for _ in range(5):  # it beats, and time goes on
            far.join()
            here.now += 80
            assert seen(near, "a-0000") == far.worker
        here.now += 91
        assert seen(near, "a-0000") is None, "no beat for 91 s of the observer's own clock"


def test_a_worker_that_hangs_falls_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    claims = Claims(tmp_path, "r", clock=clock)
    claims.join()
    beats: list[None] = []
    monkeypatch.setattr(claims, "join", lambda: beats.append(None))
    monkeypatch.setattr(claims._stop, "wait", lambda beat: len(beats) > 2 or clock.now > 1e5)
    claims._beating(1.0)
    assert len(beats) == 3
    beats.clear()
    clock.now = 1801.0  # no step of the work for half an hour
    once = iter([False, True])
    monkeypatch.setattr(claims._stop, "wait", lambda beat: next(once))
    claims._beating(1.0)
    assert beats == []


def test_a_claim_of_another_recipe_and_a_damaged_one_count_for_nothing(tmp_path: Path):
    clock = Clock()
    one, other = Claims(tmp_path, "r"), Claims(tmp_path, "another")
    watch = Claims(tmp_path, "r", clock=clock)
    with one.working(), other.working(), watch.working():
        other.claim("a-0000")
        assert seen(watch, "a-0000") is None
        (tmp_path / "claims" / "b-0000.0").write_text("{")
        assert seen(watch, "b-0000") is not None, "it may be being written just now"
        clock.now += 11
        assert seen(watch, "b-0000") is None


def test_failures_are_tried_again_by_the_next_start_only(tmp_path: Path):
    one, other = Claims(tmp_path, "r"), Claims(tmp_path, "r")
    with one.working():
        one.fail("a-0000", "no")
        with other.working():
            assert not other.start_afresh()
            assert other.failures() == {"a-0000": "no"}, "the worker that says so is here"
    third = Claims(tmp_path, "r")
    with third.working():
        assert third.start_afresh()
        assert third.failures() == {}


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe\x00", b"5", b"[]", None])
def test_a_damaged_file_counts_for_a_while_then_for_nothing(tmp_path: Path, damage: bytes | None):
    clock = Clock()
    claims = Claims(tmp_path, "r", clock=clock)
    for name in ("workers/w", "claims/a-0000.0", "failed/a-0000"):
        path = tmp_path / name
        path.parent.mkdir()
        path.mkdir() if damage is None else path.write_bytes(damage)
    assert claims.others() == ["w"]
    assert seen(claims, "a-0000") is not None, "it may be being written"
    assert claims.failures() == {}
    assert not claims.start_afresh()
    clock.now = 91.0
    assert claims.others() == []
    assert seen(claims, "a-0000") is None
    assert claims.claim("a-0000", 0) == 1
    assert claims.start_afresh()

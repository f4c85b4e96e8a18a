"""Traffic: who writes when, in open and in closed loop, drawn or replayed; and that it is let go when it is due."""

from __future__ import annotations

import asyncio
import gzip
import math
import os
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

import msgspec
import pytest
import virtual

from whisper_fast import clock
from whisper_fast.errors import SettingsError
from whisper_fast.lab import pace as pacing
from whisper_fast.lab import users
from whisper_fast.lab.pace import Pace
from whisper_fast.lab.replay import Replay, channel, recorded, requests
from whisper_fast.lab.traffic import Arrival, Length, Sessions, Traffic, arrivals, gap, rest

DATA = Path(os.environ.get("WHISPER_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
FAR = 1e9


def drawn(traffic):
    return list(arrivals(Sessions(traffic)))


@pytest.mark.parametrize("gaps", ["exponential", "lognormal", "constant"])
def test_arrivals_are_seeded_ordered_and_as_many_as_asked_from_the_first_second_on(gaps):
    traffic = Traffic(users=1000, period=20.0, seconds=40.0, seed=7, gaps=gaps)
    found = drawn(traffic)
    assert found == drawn(traffic)
    assert found != drawn(replace(traffic, seed=8))
    assert all(a.at <= b.at for a, b in pairwise(found))
    numbers = {}
    for arrival in found:
        assert arrival.number == numbers.get(arrival.user, -1) + 1
        numbers[arrival.user] = arrival.number
    for begin in range(0, 40, 10):  # 500 in each ten seconds; no more scattered than a Poisson count, five deviations
        assert abs(sum(begin <= a.at < begin + 10 for a in found) - 500) < 5 * 500**0.5


@pytest.mark.parametrize("gaps", ["exponential", "lognormal", "constant"])
def test_gaps_have_the_mean_that_was_asked_for(gaps):
    draw, rng = gap(Traffic(1, 3.0, 1.0, gaps=gaps)), Random(1)
    assert fmean(draw(rng) for _ in range(40_000)) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize(("gaps", "square"), [("exponential", 2.0), ("lognormal", math.e), ("constant", 1.0)])
def test_what_is_left_of_a_gap_is_what_renewal_theory_says(gaps, square):
    """Its mean is E[gap squared] / (2 E[gap]), which for heavy tails is more than half of a gap."""
    draw, rng = gap(Traffic(1, 3.0, 1.0, gaps=gaps)), Random(2)
    assert fmean(rest(draw, rng) for _ in range(60_000)) == pytest.approx(3.0 * square / 2, rel=0.05)


def test_people_leave_after_a_session_and_come_back_when_they_were_away_long_enough():
    traffic = Traffic(users=50, period=1.0, seconds=400.0, seed=3, session=10.0, away=60.0)
    source = Sessions(traffic)
    times = defaultdict(list)
    for arrival in arrivals(source):
        times[arrival.user].append(arrival.at)
    assert len(times) > 150  # others came
    assert source.people >= len(times)
    pauses = [b - a for mine in times.values() for a, b in pairwise(mine)]
    long = [pause for pause in pauses if pause > 12]  # e^-12 of the gaps within a session are as long
    assert len(long) > 300  # they returned
    assert min(long) > 10
    total = sum(len(mine) for mine in times.values())
    assert total / (len(long) + len(times)) == pytest.approx(10.0, rel=0.15)
    for second in range(0, 400, 50):
        here = sum(any(second <= at < second + 5 for at in mine) for mine in times.values())
        assert 40 <= here <= 90  # fifty places, all taken


def test_nobody_leaves_without_sessions():
    assert {arrival.user for arrival in drawn(Traffic(10, 0.1, 20.0, session=0))} == set(range(10))


def test_in_closed_loop_a_user_writes_again_only_after_the_reply():
    source = Sessions(Traffic(users=2, period=1.0, seconds=100.0, closed=True, gaps="constant", session=0))
    first, second = source.take(), source.take()
    assert {first.user, second.user} == {0, 1}
    assert source.next == 100.0  # both wait
    source.over(second.user, 7.0)
    assert source.next == 8.0
    assert source.take() == Arrival(8.0, second.user, 1)
    source.over(first.user, 99.5)
    assert source.next == 100.0
    assert source.take() is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"users": 0}, {"users": -1}, {"period": 0.0}, {"period": -45.0}, {"period": math.nan}, {"seconds": 0.0},
        {"seconds": math.inf}, {"session": 0.5}, {"session": -1}, {"away": 0.0}, {"gaps": "often"},
    ],
)  # fmt: skip
def test_traffic_that_nobody_could_make_is_refused(wrong):
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        Traffic(**{"users": 1, "period": 1.0, "seconds": 1.0, **wrong})


# what was recorded


CSV = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,374,44\n2023-11-16 18:15:47.75,396,109\n"
IRC = (
    "### 2004-12-25\n[23:58] <ann> hello\n=== bob has joined\n[23:58] <bob> hi ann\n[23:59] <ann>  \n"
    "### 2005-03-01\n[00:01] <ann> back again\n[00:00] <bob> the clock went back\n"
)


def written(path, text):
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_a_trace_is_replayed_with_its_times_and_lengths(tmp_path):
    found = recorded(written(tmp_path / "trace.csv.gz", CSV), Traffic(1, 1.0, 1.0))
    assert found == [Arrival(0.0, 0, 0, None, Length(374, 44)), Arrival(1.25, 0, 1, None, Length(396, 109))]


def test_a_channel_is_replayed_with_its_users_and_words(tmp_path):
    found = recorded(written(tmp_path / "days.txt", IRC), Traffic(1, 1.0, 1.0))
    assert [(a.user, a.number, a.words) for a in found] == [
        (0, 0, "hello"), (1, 0, "hi ann"), (0, 1, "back again"), (1, 1, "the clock went back"),
    ]  # fmt: skip
    assert found[0].at == 0
    assert all(a.at <= b.at for a, b in pairwise(found))
    assert found[1].at < 60 < found[2].at < 240  # the next day follows at once
    assert found == channel(tmp_path / "days.txt")


@pytest.mark.parametrize("name", ["trace.csv.gz", "days.txt.gz"])
def test_a_file_that_is_cut_in_half_is_refused(tmp_path, name):
    text = CSV + "2023-11-16 18:15:48.0,1,2\n" * 5000 if "csv" in name else IRC + "[00:02] <ann> again\n" * 5000
    path = written(tmp_path / name, text)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SettingsError, match="cut off"):
        recorded(path, Traffic(1, 1.0, 1.0))


@pytest.mark.parametrize("text", ["", "### 2004-12-25\n", "a letter\n", CSV[:-8], CSV.replace("374", "many")])
def test_a_file_that_is_neither_is_refused(tmp_path, text):
    with pytest.raises(SettingsError):
        recorded(written(tmp_path / "file.txt", text), Traffic(1, 1.0, 1.0))
    with pytest.raises(SettingsError, match="cannot be read"):
        recorded(tmp_path / "missing", Traffic(1, 1.0, 1.0))


def test_a_replay_runs_as_fast_as_asked_and_ends_with_the_file_or_the_time():
    kept = [Arrival(0.0, 0, 0), Arrival(4.0, 1, 0), Arrival(8.0, 0, 1)]
    assert [a.at for a in arrivals(Replay(kept, FAR, 2.0))] == [0.0, 2.0, 4.0]
    assert [a.at for a in arrivals(Replay(kept, 3.0, 2.0))] == [0.0, 2.0]
    assert Replay(kept, FAR).people == 2
    with pytest.raises(SettingsError, match="speed"):
        Replay(kept, FAR, 0.0)


def test_the_real_recordings_are_replayed_whole():
    if not DATA.is_dir():
        pytest.skip(f"there are no recordings in {DATA} (WHISPER_FAST_DATA says where the data is)")
    found = requests(next((DATA / "llm_trace").glob("*.csv.gz")), Traffic(100, 1.0, 1.0))
    assert len(found) == 9683
    assert len({a.user for a in found}) == 100
    spoken = channel(next((DATA / "irc").glob("*.txt.gz")))
    assert len(spoken) > 90_000
    assert all(a.at <= b.at for a, b in pairwise(spoken))
    assert Counter(a.user for a in spoken).most_common(1)[0][1] > 1000


# what is said


def test_no_user_ever_says_anothers_word_or_the_same_twice():
    said = [users.message(user, number) for user in range(30) for number in range(10)]
    said += [users.message(user, number, words="ok") for user in range(30) for number in range(10, 20)]
    assert len({message.text for message in said}) == len({message.id for message in said}) == 600
    for message in said:
        assert users.word(int(message.user.partition("-")[2])) in message.text
        assert message.text.count("zq") == 1


def test_users_lead_the_conversations_of_locomo_in_their_order(tmp_path):
    turns = [{"speaker": "a", "dia_id": f"D1:{n}", "text": f"turn {n}"} for n in range(5)]
    talk = {"session_1": turns, "session_1_date_time": "1:56 pm on 8 May, 2023", "qa": []}
    (tmp_path / "1.json").write_bytes(msgspec.json.encode(talk))
    talks = users.Talks(tmp_path)
    said = [talks(7, number) for number in range(6)]
    start = int(said[0].split()[1])
    assert said == [f"turn {(start + n) % 5}" for n in range(6)]
    assert len({talks(user, 0) for user in range(50)}) == 5
    (tmp_path / "2.json").write_text("{}{")
    with pytest.raises(SettingsError, match="no conversation"):
        users.Talks(tmp_path)
    with pytest.raises(SettingsError, match="no conversations"):
        users.Talks(tmp_path / "missing")


# when it is let go


TIMERS = {
    "file": pytest.param(None, id="file", marks=pytest.mark.skipif(pacing.libc() is None, reason="needs timerfd")),
    "loop": pytest.param(lambda: None, id="loop"),
}


@pytest.fixture(params=TIMERS.values())
def any_timer(request, monkeypatch):
    if request.param is not None:
        monkeypatch.setattr(pacing, "libc", request.param)


async def test_every_message_is_let_go_once_in_order_and_never_early(any_timer):
    traffic = Traffic(users=100, period=0.1, seconds=0.4, seed=5)
    sent, began = [], clock.monotonic() + 0.01
    pace = Pace(Sessions(traffic), lambda arrival: sent.append((arrival, clock.monotonic() - began)), began)
    await pace.run()
    assert [arrival for arrival, _ in sent] == drawn(traffic)
    assert all(now > arrival.at - 1e-6 for arrival, now in sent)
    assert pace.late.count == len(sent)
    assert clock.monotonic() - began >= 0.4  # it lasts to the end


async def test_what_came_due_while_the_loop_was_held_is_let_go_at_once_and_counted_as_late(any_timer):
    kept = [Arrival(n / 1000, 0, n) for n in range(100)]
    sent, began = [], clock.monotonic()

    def hold(arrival):
        sent.append(arrival)
        if arrival.number == 10:
            while clock.monotonic() - began < 0.12:
                pass

    pace = Pace(Replay(kept, FAR), hold, began)
    await pace.run()
    assert sent == kept
    assert pace.late.largest > 0.1
    assert pace.late.quantile(0.5) > 0.02


async def test_a_closed_loop_is_woken_by_the_reply(any_timer):
    source = Sessions(Traffic(users=1, period=0.02, seconds=0.3, closed=True, gaps="constant"))
    sent, began = [], clock.monotonic()
    loop = asyncio.get_running_loop()

    def send(arrival):
        sent.append(arrival)
        loop.call_later(0.03, pace.over, arrival.user)

    pace = Pace(source, send, began)
    await pace.run()
    assert 1 <= len(sent) <= 6
    assert all(b.at - a.at > 0.045 for a, b in pairwise(sent))
    await asyncio.sleep(0.05)  # a reply after the end is heard and does nothing


async def test_an_error_of_the_sender_ends_the_run_and_a_cancelled_run_leaves_no_file(any_timer):
    def fail(arrival):
        raise LookupError(arrival.number)

    kept = [Arrival(0.01, 0, 0), Arrival(60.0, 0, 1)]
    open_files = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    with pytest.raises(LookupError):
        await Pace(Replay(kept, FAR), fail, clock.monotonic()).run()
    running = asyncio.create_task(Pace(Replay(kept, FAR), print, clock.monotonic()).run())
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    if open_files:
        assert set(os.listdir("/proc/self/fd")) == open_files


def test_in_virtual_time_nothing_is_late():
    async def main(now):
        with clock.replaced(monotonic=now, wall=now):
            kept = drawn(Traffic(users=50, period=600.0, seconds=3600.0))
            sent = []
            pace = Pace(Replay(kept, FAR), lambda arrival: sent.append(now() - arrival.at), 0.0)
            await pace.run()
            return sent, pace.late.largest

    sent, latest = virtual.run(main)
    assert len(sent) > 200
    assert max(sent) < 1e-6
    assert latest < 1e-6

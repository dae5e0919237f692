"""The collapse alarm on curves that were measured and on curves made up."""

from __future__ import annotations

import json
import math

import pytest

from gmm_jepa.train.alarm import Alarm, Watch, read_alarms

HEALTHY = {  # cpu preset, first 100 steps
    "usage_entropy": [0.269, 0.315, 0.379, 0.453, 0.479, 0.561, 0.585, 0.573, 0.607, 0.595],
    "online_std": [0.155, 0.664, 0.848, 1.23, 0.867, 0.999, 1.24, 0.966, 1.14, 1.02],
    "online_effective_rank": [94.8, 27.9, 23, 20.9, 25.7, 25.2, 23.2, 27.1, 24.5, 26.8],
    "online_mean_cosine": [0.866, 0.343, 0.243, 0.198, 0.22, 0.101, 0.142, 0.137, 0.105, 0.13],
    "front_end_std": [0.092, 0.646, 0.837, 1.21, 0.853, 0.984, 1.23, 0.955, 1.13, 1.01],
    "front_end_mean_cosine": [0.607, 0.305, 0.224, 0.18, 0.201, 0.094, 0.138, 0.131, 0.1, 0.12],
}
SMOKE = {  # a healthy toy: slow to start
    "usage_entropy": [0.481, 0.285, 0.324, 0.548, 0.483, 0.604, 0.718, 0.652, 0.67, 0.692],
    "online_std": [0.0993, 0.119, 0.238, 0.609, 0.695, 0.82, 0.707, 0.801, 0.903, 0.881],
    "online_effective_rank": [21.4, 19.7, 15.5, 10.5, 9.42, 8.48, 8.89, 8.78, 8.25, 8.12],
    "online_mean_cosine": [0.883, 0.892, 0.766, 0.451, 0.398, 0.387, 0.349, 0.343, 0.308, 0.343],
    "front_end_mean_cosine": [0.859, 0.834, 0.73, 0.504, 0.42, 0.396, 0.376, 0.37, 0.315, 0.369],
}
COLLAPSED = {  # no anchor, teacher decay 0
    "usage_entropy": [0.573, 0.028, 0.256, 0.204, 0.159, 0.156, 0.146, 0.145, 0.135, 0.139],
    "online_std": [0.155, 0.0795, 0.0605, 0.0556, 0.0533, 0.0606, 0.056, 0.0529, 0.0564, 0.0543],
    "online_effective_rank": [94.9, 76.5, 76.2, 76, 76.1, 77.1, 77.5, 77.5, 77.2, 77.8],
    "online_mean_cosine": [0.858, 0.971, 0.975, 0.961, 0.952, 0.937, 0.938, 0.941, 0.935, 0.937],
    "front_end_mean_cosine": [0.674, 0.901, 0.872, 0.835, 0.827, 0.829, 0.867, 0.849, 0.851, 0.821],
}


def lines(curves, every=10, first=5):
    count = len(next(iter(curves.values())))
    return [
        {"step": first + every * i} | {name: values[i] for name, values in curves.items()}
        for i in range(count)
    ]


def events(curves, steps=1200, **options):
    watch = Watch(steps, **options)
    return [event for line in lines(curves) for event in watch.see(line)]


@pytest.mark.parametrize("curves", [HEALTHY, SMOKE])
@pytest.mark.parametrize("steps", [100, 1200])
def test_healthy_runs_do_not_ring(curves, steps):
    assert events(curves, steps) == []


def test_a_collapse_rings_at_the_front_end_and_at_the_output():
    found = {event.meter: event for event in events(COLLAPSED, steps=400)}
    assert set(found) == {
        "usage_entropy", "online_std", "online_mean_cosine", "front_end_mean_cosine"
    }  # fmt: skip
    assert found["online_mean_cosine"].step == 55  # the second line past the start
    assert "above 0.8" in str(found["front_end_mean_cosine"])
    assert "collapse alarm at step 55: online_mean_cosine" in str(found["online_mean_cosine"])


def test_rank_alone_rings_only_where_almost_nothing_is_left():
    def ranks(*values):
        return [e.step for e in events({"online_effective_rank": list(values)}, 400)]

    assert ranks(95, 60, 30, 21, 12, 10) == []
    assert ranks(95, 60, 30, 21, 9, 8) == [55]


def test_one_bad_line_is_no_alarm_and_a_meter_rings_once():
    dips = {"front_end_std": [1, 1, 0.1, 0.1, 0.1, 1, 0.1, 0.1, 0.1, 1, 0.1, 0.1]}
    assert [event.step for event in events(dips, 400)] == [75]


def test_absent_and_broken_values_pass():
    watch = Watch(10)
    assert watch.see({"step": 60, "loss": 1.0}) == []
    for value in (None, math.nan, math.inf, "0"):
        assert watch.see({"step": 100, "online_mean_cosine": value}) == []


def test_the_start_of_a_long_run_is_not_judged():
    watch, line = Watch(10_000), {"online_mean_cosine": 0.97}
    assert not [e for step in range(20, 500, 20) for e in watch.see({"step": step, **line})]
    assert [e.step for step in range(500, 600, 20) for e in watch.see({"step": step, **line})] == [
        520
    ]


def test_a_new_model_is_not_compared_with_the_one_before():
    curves = {"online_std": [0.2, 0.9, 1.0, 0.9, 0.2, 0.3], "online_mean_cosine": [0.9] * 6}
    assert {e.meter for e in events(curves, 400)} == {"online_std", "online_mean_cosine"}
    assert events(curves, 400, starts=(0, 30)) == []


def test_a_meter_rings_once_for_each_model():
    curves = {"online_mean_cosine": [0.9] * 12}
    assert [e.step for e in events(curves, 400, starts=(0, 60))] == [55, 115]


def test_events_are_written_and_follow_from_the_metrics(tmp_path, capsys):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "alarms.jsonl"
    alarm = Alarm(path, metrics, 400)
    for line in lines(HEALTHY):
        alarm.see(line)
    assert not path.exists()
    alarm = Alarm(path, metrics, 400)
    for line in lines(COLLAPSED):
        alarm.see(line)
    assert "warning: collapse alarm at step 55: usage_entropy" in capsys.readouterr().err
    whole = path.read_text()
    assert len(read_alarms(path)) == len(whole.splitlines()) == 4

    # A resume at step 45: later events are forgotten, and come again as they were.
    kept = lines(COLLAPSED)[:5]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))
    alarm = Alarm(path, metrics, 400)
    assert capsys.readouterr().err == ""
    assert read_alarms(path) == []
    for line in lines(COLLAPSED)[5:]:
        alarm.see(line)
    assert path.read_text() == whole

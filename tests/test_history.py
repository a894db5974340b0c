"""History: lines that survive what is beside them, change points of series whose changes are known, and the drawing."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from edgecompile import history, render_history
from edgecompile.errors import InputError
from edgecompile.history import Entry, append, change_points, read

DAY = "2026-11-{:02}T12:00:00+00:00"


def entry(day: int = 1, value: float = 0.004, model: str = "shvit_s1", **changes) -> Entry:
    bounds = {"latency_p50": (value * 0.99, value * 1.01)}
    made = Entry(
        DAY.format(day), "gate", model, "ort", "fp32", {"latency_p50": value}, bounds,
        "machine-a", "0123456789abcdef", digest="d" * 64, verdict="PASS",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "deep" / "history.jsonl"


# -- the file ----------------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read_again(file):
    written = [entry(1), entry(2, model="zoo\n\x1b[31m|<é\u2028\ud800"), entry(3, math.inf, intervals={})]
    for one in written:
        append(one, file)
    assert read(file) == written
    lines = file.read_text("ascii").splitlines()  # str splits at more than b"\n"
    assert [json.loads(line)["schema"] for line in lines] == ["edgecompile.history/1"] * 3


def test_every_line_is_json_that_anybody_can_read(file):
    append(entry(), file)
    (line,) = file.read_bytes().splitlines()
    document = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert document["values"] == {"latency_p50": 0.004} and document["commit"] == "0123456789abcdef"


def test_entries_are_picked_and_ordered_by_time(file):
    for one in (entry(3), entry(1, model="other"), entry(2, fingerprint="machine-b"), entry(1)):
        append(one, file)
    assert [e.when.day for e in read(file)] == [1, 1, 2, 3]
    assert read(file, model="other") == [entry(1, model="other")]
    assert read(file, fingerprint="machine-b") == [entry(2, fingerprint="machine-b")]
    assert read(file, "other", "machine-b") == []


def test_times_of_other_zones_are_compared_in_utc(file):
    late = entry(time="2026-11-01T10:00:00-05:00")  # 15:00 in UTC
    early = entry(time="2026-11-01T14:00:00Z")
    append(late, file)
    append(early, file)
    assert read(file) == [early, late]


def test_no_file_is_no_history(file):
    assert read(file) == []


def test_now_fills_what_it_can(tmp_path):
    made = Entry.now("bench", "m", "ort", "fp32", {"latency_p50": 1.0}, fingerprint="f", commit="c")
    assert (made.kind, made.fingerprint, made.commit) == ("bench", "f", "c")
    assert made.version == __import__("edgecompile").__version__
    assert made.when.tzinfo is not None and made.time.endswith("+00:00")


FOREIGN = [
    b"garbage",
    b"\xff\xfe\x00",
    b"{}",
    b"[1, 2]",
    b"null",
    b'{"schema": "edgecompile.history/2"}',
    b'{"schema": "edgecompile.history/1"}',
    b"[" * 100_000,
    b'{"schema": ' + b"9" * 5000 + b"}",
    b'{"schema": "edgecompile.history/1", "time": "yesterday", "kind": "", "model": "", "target": "", "precision": "", '
    b'"values": {}, "intervals": {}, "fingerprint": "", "commit": "", "version": "", "digest": "", "verdict": ""}',
]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_a_foreign_line_is_left_out_with_a_warning_and_kept_in_the_file(file, line):
    append(entry(1), file)
    with open(file, "ab") as opened:
        opened.write(line + b"\n")
    append(entry(2), file)
    said: list[str] = []
    assert read(file, warn=said.append) == [entry(1), entry(2)]
    assert len(said) == 1 and f"{file}: line 2 cannot be read" in said[0]
    assert file.read_bytes().splitlines()[1] == line
    with pytest.warns(UserWarning, match="line 2"):
        read(file)


def test_an_interval_of_three_numbers_is_foreign(file):
    append(entry(intervals={"latency_p50": (1.0, 2.0, 3.0)}), file)
    said: list[str] = []
    assert read(file, warn=said.append) == [] and said


@pytest.mark.parametrize("cut", [1, 2, 50])
def test_a_torn_line_costs_itself_only(file, cut):
    append(entry(1), file)
    append(entry(2), file)
    torn = file.read_bytes()[:-cut]
    file.write_bytes(torn)
    append(entry(3), file)
    assert file.read_bytes().startswith(torn + b"\n")
    said: list[str] = []
    # Without its end of line only, the second line is still whole.
    assert read(file, warn=said.append) == [entry(1), *([entry(2)] if cut == 1 else []), entry(3)]
    assert bool(said) == (cut != 1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(st.data())
def test_damage_never_raises_and_never_reaches_other_lines(tmp_path, data):
    file = tmp_path / "h.jsonl"
    file.unlink(missing_ok=True)
    for day in range(1, 6):
        append(entry(day), file)
    lines = file.read_bytes().split(b"\n")
    hurt = data.draw(st.integers(0, 4))
    at = data.draw(st.integers(0, len(lines[hurt])))
    lines[hurt] = lines[hurt][:at] + data.draw(st.binary(min_size=1, max_size=9)) + lines[hurt][at + 3 :]
    file.write_bytes(b"\n".join(lines))
    found = read(file, warn=lambda _: None)
    whole = [entry(day) for day in range(1, 6) if day != hurt + 1]
    assert [e for e in found if e in whole] == whole


APPENDER = """
import sys
from pathlib import Path
from edgecompile.history import Entry, append
for i in range(20):
    entry = Entry("2026-11-01T12:00:00", "bench", sys.argv[2], "ort", "fp32", {"n": i}, version="x" * 5000)
    append(entry, Path(sys.argv[1]))
"""


def test_many_processes_append_at_once(file):
    running = [subprocess.Popen([sys.executable, "-c", APPENDER, str(file), f"m{i}"]) for i in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    found = read(file, warn=lambda text: pytest.fail(text))
    assert len(found) == 80
    for i in range(4):
        assert [e.values["n"] for e in found if e.model == f"m{i}"] == list(range(20))


FULL = """
import resource, sys
from pathlib import Path
from edgecompile.errors import InputError
from edgecompile.history import Entry, append
file = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 40,) * 2)
try:
    append(Entry.now("bench", "m", "ort", "fp32", {}), file)
except InputError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_file_as_it_was(file):
    append(entry(1), file)
    before = file.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL, str(file)], capture_output=True, text=True)
    assert f"cannot append to {file}" in done.stdout, done.stderr
    assert file.read_bytes() == before


def test_what_cannot_be_written_or_read_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot append"):
        append(entry(), tmp_path / "file" / "history.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)


def test_the_commit_is_that_of_the_checkout(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert history.commit(tmp_path) == ""  # no checkout
    git("init", "-q")
    assert history.commit(tmp_path) == ""  # no commit
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert re.fullmatch("[0-9a-f]{40}", history.commit(tmp_path))
    assert history.commit(tmp_path) == git("rev-parse", "HEAD")
    assert history.commit(tmp_path / "missing") == ""


# -- change points -----------------------------------------------------------------------------------------------------


def noise(rng, n: int, spread: float = 0.02, tails: bool = False) -> np.ndarray:
    drawn = rng.standard_t(3, n) if tails else rng.standard_normal(n)
    return 0.004 * np.exp(spread * drawn)


@pytest.mark.parametrize("tails", [False, True])
def test_noise_alone_has_no_change_points(tails):
    rng = np.random.default_rng(7)
    alarms = sum(bool(change_points(noise(rng, int(rng.integers(10, 90)), tails=tails))) for _ in range(1000))
    assert alarms <= 10


@pytest.mark.parametrize(
    ("n", "at", "step", "spread"),
    [(30, 15, 1.05, 0.01), (40, 30, 0.95, 0.01), (60, 20, 1.05, 0.015), (100, 90, 1.05, 0.01), (300, 140, 1.06, 0.015)],
)
def test_a_step_is_found_where_it_is(n, at, step, spread):
    rng = np.random.default_rng(n)
    right = 0
    for _ in range(50):
        values = noise(rng, n, spread)
        values[at:] *= step
        found = change_points(values)
        right += len(found) == 1 and abs(found[0].index - at) <= 2 and (found[0].change > 0) == (step > 1)
    assert right >= 48


def test_the_size_of_a_step_is_told():
    values = noise(np.random.default_rng(0), 60, 0.01)
    values[25:] *= 1.08
    (found,) = change_points(values)
    assert found.change == pytest.approx(0.08, abs=0.01)
    assert found.before == pytest.approx(0.004, rel=0.01) and found.p < 1e-6


def test_several_steps_are_told_apart():
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = noise(rng, 200, 0.01)
        values[50:120] *= 1.06
        values[160:] *= 1.1
        found = [p.index for p in change_points(values)]
        assert len(found) == 3
        assert np.abs(np.array(found) - [50, 120, 160]).max() <= 2


@pytest.mark.parametrize(("n", "start", "end"), [(60, 20, 40), (60, 27, 34), (200, 95, 105)])
def test_a_level_that_comes_back_is_told_twice(n, start, end):
    rng = np.random.default_rng(n)
    right = 0
    for _ in range(50):
        values = noise(rng, n, 0.01)
        values[start:end] *= 1.06
        found = [p.index for p in change_points(values)]
        right += len(found) == 2 and abs(found[0] - start) <= 2 and abs(found[1] - end) <= 2
    assert right >= 48


def test_what_is_too_small_or_too_short_is_not_told():
    rng = np.random.default_rng(1)
    values = noise(rng, 200, 0.002)
    values[100:] *= 1.01
    assert change_points(values) == []
    assert [p.index for p in change_points(values, magnitude=0.005)] == pytest.approx([100], abs=2)
    values = noise(rng, 60, 0.01)
    values[30:32] *= 1.5  # two odd runs are no level
    assert change_points(values) == []


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 5, [2.0] * 50, [0.0] * 20, [math.nan] * 20, [-1.0] * 20])
def test_series_without_a_change(values):
    assert change_points(values) == []


def test_a_step_without_any_noise():
    (found,) = change_points([100.0] * 10 + [110.0] * 10)
    assert (found.index, found.p) == (10, 0.0)
    assert found.change == pytest.approx(0.1)


def test_values_that_cannot_be_compared_keep_their_places():
    values = list(noise(np.random.default_rng(0), 40, 0.005))
    values[20:] = [v * 1.1 for v in values[20:]]
    values[5] = values[30] = math.nan
    values[6] = 0.0
    assert [p.index for p in change_points(values)] == [20]


def test_units_do_not_matter():
    values = noise(np.random.default_rng(5), 80, 0.01)
    values[33:] *= 1.1
    here, there = change_points(values), change_points(values * 1e6)
    assert [p.index for p in here] == [p.index for p in there] == [33]


def test_the_energy_statistic_is_that_of_the_paper():
    logs = np.random.default_rng(2).standard_normal(15)
    logs[9:] += 2

    def q(at: int) -> float:
        x, y = logs[:at], logs[at:]
        between = np.mean([[abs(a - b) for b in y] for a in x])
        inside = sum(np.mean([[abs(a - b) for b in part] for a in part]) for part in (x, y))
        return len(x) * len(y) / len(logs) * (2 * between - inside)

    assert history._best_split(logs) == max(range(5, 11), key=q)


# -- trends ------------------------------------------------------------------------------------------------------------


def stepped(days: int = 24, at: int = 12, **changes) -> list[Entry]:
    values = noise(np.random.default_rng(0), days, 0.005)
    values[at:] *= 1.1
    return [replace(entry(i + 1, float(v), commit=f"{i:040x}"), **changes) for i, v in enumerate(values)]


def test_only_what_is_comparable_is_compared():
    slow = [replace(e, values={"latency_p50": 0.4}, intervals={}, fingerprint="machine-b") for e in stepped()]
    mixed = [e for pair in zip(stepped(), slow, strict=True) for e in pair]
    found = history.trends(mixed)
    assert [(t.entries[0].fingerprint, len(t.entries), [p.index for p in t.points]) for t in found] == [
        ("machine-a", 24, [12]),
        ("machine-b", 24, []),
    ]


def test_each_metric_has_its_trend():
    entries = [replace(e, values={**e.values, "peak_memory": 5e7}) for e in stepped()]
    assert [t.metric for t in history.trends(entries)] == ["latency_p50", "peak_memory"]
    assert [t.metric for t in history.trends(entries, "peak_memory")] == ["peak_memory"]


def test_trends_for_machines():
    document = json.loads(json.dumps(history.as_dict(history.trends(stepped())), allow_nan=False))
    (trend,) = document["trends"]
    assert (trend["model"], trend["metric"], len(trend["runs"])) == ("shvit_s1", "latency_p50", 24)
    (point,) = trend["change_points"]
    assert point["index"] == 12 and point["commit"] == f"{12:040x}" and point["change"] == pytest.approx(0.1, abs=0.01)
    assert trend["runs"][0]["interval"] == pytest.approx([trend["runs"][0]["value"] * k for k in (0.99, 1.01)])


# -- what is drawn -----------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e\"'&[bold]x[/bold]\n|"


def printed(entries, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding), width=160, color_system=None)
    render_history.print_table(entries, console)
    console.file.flush()
    return raw.getvalue().decode(encoding)


def test_the_table():
    said = printed(stepped())
    assert "shvit_s1 ort fp32" in said and "machine-a" in said
    assert "changed: shvit_s1 ort fp32 latency_p50 4.0" in said and "commit 00000000" in said and "2026-11-13" in said
    assert "│" in said
    flat = printed([entry(i + 1) for i in range(24)])
    assert "changed" not in flat and "│" not in flat
    assert printed([]).strip() == "Nothing was recorded."


def test_the_table_without_unicode():
    said = printed(stepped(model="é"), "ascii")
    assert "|" in said and "->" in said and "\\xe9" in said


def test_sparklines():
    def draw(values, unicode=True, points=()):
        entries = tuple(entry(1, v) for v in values)
        return render_history.sparkline(history.Trend("latency_p50", entries, tuple(points)), unicode)

    assert draw([1.0, 2.0, 3.0]) == "▁▅█"
    assert draw([2.0, 2.0]) == "▁▁"
    assert draw([1.0, math.nan, 3.0]) == "▁ █"
    assert draw([1.0, 3.0], False, [history.ChangePoint(1, 1.0, 3.0, 0.0)]) == "_|#"
    assert len(draw([1.0] * 500)) == 24


def test_foreign_names_are_harmless_on_a_terminal():
    said = printed(stepped(model=HOSTILE, fingerprint=HOSTILE))
    assert "\x1b" not in said and "\u202e" not in said
    assert "<script>alert(1)</script>\\x1b[31m\\u202e\"'&[bold]x[/bold] |" in said  # as it is, no markup of rich


class Page:
    """A page that parses as XML, which unescaped names would break."""

    def __init__(self, entries):
        self.source = render_history.page(entries)
        body = self.source[self.source.index("<body>") : self.source.index("</body>") + len("</body>")]
        self.body = ET.fromstring(body)

    def count(self, tag: str, class_: str | None = None) -> int:
        found = self.body.iter(tag)
        return sum(class_ is None or class_ in e.get("class", "").split() for e in found)


def test_the_page():
    page = Page(stepped())
    assert page.count("svg") == 1
    assert page.count("circle", "run") == page.count("line", "whisker") == 24
    assert page.count("line", "change") == page.count("line", "worse") == 1
    assert page.count("line", "level") == 2
    assert page.count("line", "trend") == 23
    assert page.count("tr") == 25
    flat = Page([entry(i + 1) for i in range(24)])
    assert flat.count("line", "change") == flat.count("line", "level") == 0
    assert Page([]).body.findtext(".//p[2]", "").strip() == "Nothing was recorded."
    assert Page([entry(1, intervals={})]).count("line", "whisker") == 0
    assert Page([entry(1, math.nan, intervals={})]).count("circle") == 0


def test_faster_is_marked_better():
    values = [0.004] * 10 + [0.003] * 10
    page = Page([entry(i + 1, v) for i, v in enumerate(values)])
    assert (page.count("line", "better"), page.count("line", "worse")) == (1, 0)


def test_the_page_asks_for_nothing_and_runs_nothing():
    page = Page(stepped(model=HOSTILE, commit=HOSTILE, verdict=HOSTILE, fingerprint=HOSTILE))
    assert "default-src 'none'" in page.source
    assert "<script" not in page.source and "\x1b" not in page.source and "\u202e" not in page.source
    assert not re.search(r"""(?:src|href|url)\s*[=(]|https?:|@import|\son\w+=["']""", page.source)
    assert "<script>alert(1)</script>" in "".join(page.body.itertext())


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(), min_size=1, max_size=12),
    st.sampled_from(["latency_p50", "peak_memory", "accuracy"]),
    st.floats(),
)
def test_any_numbers_can_be_drawn(values, metric, bound):
    intervals = {metric: (bound, values[0])}
    entries = [entry(i + 1, values={metric: v}, intervals=intervals) for i, v in enumerate(values)]
    page = Page(entries)
    assert page.count("circle") == sum(abs(v) < render_history.LARGEST for v in values)
    printed(entries)


def test_long_histories_are_cut():
    many = [entry(1, 0.004, time=f"2026-{1 + i // 28 % 12:02}-{1 + i % 28:02}T00:00:00") for i in range(700)]
    page = Page(many)
    assert page.count("circle") == render_history.MOST_RUNS
    assert page.count("tr") == render_history.MOST_RUNS + 1


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("latency_p50", 0.0041, "4.10 ms"),
        ("build_time", 12.0, "12.0 s"),
        ("peak_memory", 3 * 2**20, "3.00 MiB"),
        ("engine_size", 2**30, "1.00 GiB"),
        ("accuracy", 0.7712345, "0.7712"),
        ("latency_p50", math.inf, "–"),
    ],
)
def test_values_have_the_unit_of_their_metric(metric, value, said):
    assert render_history.written(metric, value) == said

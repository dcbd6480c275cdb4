"""The report: self-contained, with correct pictures, and complete even if data is missing."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rcmae.config import to_toml
from rcmae.engine.run import run_lock
from rcmae.engine.schedules import fraction_of_run
from rcmae.methods.rcmae import RCMAE
from rcmae.report import curves as drawing
from rcmae.report import pictures, write_report
from rcmae.report.curves import SMALL, Line, by_depth, plot
from tests.conftest import Undrawn, small
from tests.mutations import catches

TEACHER_FIGURES = [
    "advantage",
    "cosine",
    "shrink",
    "momentum",
    "half-life",
    "distance",
    "ratio",
    "blocks",
    "gap",
    "drift",
]
HEALTH_FIGURES = ["rank", "spread", "uniformity", "alpha"]
pytestmark = pytest.mark.usefixtures("drawn")


def snapshot(seed: int = 0, target: str = "normalized", **changes) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    order = np.stack([rng.permutation(64) for _ in range(5)])
    tensors = {
        "image": rng.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8),
        "visible": order[:, :16],
        "hidden": order[:, 16:],
        "student": rng.normal(size=(5, 48, 48)).astype(np.float32),
        "teacher": rng.normal(size=(5, 48, 48)).astype(np.float32),
    }
    meta = {
        "step": "10",
        "patch": "4",
        "target": target,
        "target_eps": "0.5",
        "mean": "[0.4, 0.5, 0.6]",
        "std": "[0.2, 0.25, 0.3]",
    }
    return tensors | changes, meta


def read(tmp_path: Path, tensors: dict, meta: dict) -> pictures.Snapshot:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "x.safetensors", meta)
    return pictures.read_snapshot(tmp_path / "x.safetensors")


IMAGES = 200
"Test images of the synthetic probes."


def write_probe(run: Path, step: int, **scores: dict[str, float]) -> None:
    """Results for each test image with these accuracies."""
    rng = np.random.default_rng(step)
    tensors = {
        f"{network}/{probe}": rng.permutation(np.arange(IMAGES) < round(accuracy / 100 * IMAGES))
        for network, by_probe in scores.items()
        for probe, accuracy in by_probe.items()
    }
    (run / "probes").mkdir(exist_ok=True)
    save_file(tensors, run / "probes" / f"{step:08d}.safetensors")


def run_directory(root: Path, teacher: bool = True, labeled: bool = True) -> Path:
    """A small synthetic run directory."""
    root.mkdir(parents=True)
    (root / "recipe.toml").write_text(
        to_toml(small("rcmae" if teacher else "mae", data="images <b>of</b> mine"))
    )
    (root / "machine.json").write_text(
        json.dumps({"rcmae": "0", "steps": 60, "device": "cpu", "cpu": "<script>alert(1)</script>"})
    )
    lines = [{"kind": "reference", "step": 0, "zero": 0.8, "patch_mean": 0.5, "nearest_visible": 0.9}]
    if labeled:
        baselines = {
            "raw_pixels": {"linear": 25.0, "knn": 50.0},
            "random_init": {"linear": 20.0, "knn": 10.0},
        }
        lines.append({"kind": "baseline", "step": 0, **baselines})
        write_probe(root, 0, **baselines)
    for step in range(1, 61):
        line = {
            "kind": "train",
            "step": step,
            "loss": 1 / step,
            "reconstruction": 0.4 + 0.4 / step,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "images_per_s": 900.0,
            "data_wait": 0.03,
            "skipped": 0,
        }
        if teacher:
            line |= {
                "consistency": 0.01,
                "teacher_reconstruction": 0.39 + 0.4 / step,
                "momentum": 0.97,
                "drift": 0.01,
            }
            line |= {
                "half_life_steps": 22.5,
                "half_life_images": 180.0,
                "half_life_epochs": 4.5,
                "half_life_fraction": 0.375,
            }
        lines.append(line)
    if labeled:
        for step in (30, 60):
            scores = {"linear": 30.0 + step / 3, "knn": 12.0}
            networks = {"student": scores} | ({"teacher": scores} if teacher else {})
            lines.append({"kind": "probe", "step": step, **networks})
            write_probe(root, step, **networks)
    lines.append({"kind": "event", "step": 7, "text": "step 7 was not finite and was skipped"})
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "bad_files.jsonl").write_text(
        '{"index": 1, "where": "a<b>.png", "reason": "truncated"}\n{"index": 2, "wh'
    )
    (root / "snapshots").mkdir()
    for k, step in enumerate((0, 30, 60)):
        tensors, meta = snapshot(k)
        if not teacher:
            del tensors["teacher"]
        save_file(
            {n: np.ascontiguousarray(v) for n, v in tensors.items()},
            root / "snapshots" / f"{step:08d}.safetensors",
            meta | {"step": str(step)},
        )
    for network in ("student", "teacher") if teacher else ("student",):
        (root / "export" / network).mkdir(parents=True)
        (root / "export" / network / "config.json").write_text("{}")
    return root


def recorded(run: Path) -> Path:
    """The same run with the diagnostics of rcmae.lab and one alarm."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train" and "momentum" in line:
            momentum = 0.97 + 0.0003 * line["step"]
            line |= {
                "momentum": momentum,
                "measured_momentum": momentum,
                "expected_momentum": 0.97,
                "half_life_steps": 22.5 + line["step"],
            }
            line |= {
                "teacher_advantage": 0.02,
                "output_cosine": 0.1,
                "last_cosine": -0.4,
                "last_ratio": 0.2,
                "last_shrink": 0.9,
            }
    teacher = any("momentum" in line for line in lines)
    blocks = [
        "encoder patch_embed",
        "encoder 0",
        "encoder 1",
        "encoder norm",
        "decoder embed",
        "decoder 0",
        "decoder pred",
    ]
    for step in (20, 40, 60):
        look = {
            "kind": "health",
            "step": step,
            "rankme": 5.25 + step,
            "alpha_req": 1.5,
            "uniformity": -1.25,
            "spread": 0.5,
        }
        if teacher:
            one = {"cosine": -0.3, "ratio": 0.3, "shrink": 0.8}
            look |= {
                "distance": dict.fromkeys(blocks, 1 / step),
                "gradient": one,
                "gradient_by_block": dict.fromkeys(blocks, one),
            }
        lines += [look, {"kind": "health", "step": step, "lidar": 7.0}]
    lines.append(
        {
            "kind": "alarm",
            "step": 41,
            "name": "teacher-drag",
            "text": "the teacher is <drag>; shorten --half-life",
        }
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def undrawn(monkeypatch):
    """Without figures, for tests of the text."""
    monkeypatch.setattr(drawing, "Figure", Undrawn)


def words(page: str) -> str:
    """The visible text: without tags and styles."""
    page = re.sub("<style.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub("<[^>]+>", " ", page)))


def part(page: str, opens: str, closes: str) -> str:
    """The part of a page between two marks."""
    return page.split(opens, 1)[1].split(closes, 1)[0]


def curves(svg: str) -> list[list[float]]:
    """Heights of every curve, in points above the bottom, without grid and reference lines."""
    paths = re.findall(r'<path d="([^"]+)" clip-path="[^"]+" style="[^"]*var\(--(\w+)\)', svg)
    return [
        [-float(y) for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", d)]
        for d, color in paths
        if color not in ("faint", "baseline")
    ]


@pytest.mark.parametrize("teacher", [True, False])
def test_the_diagnostics_are_shown(tmp_path, teacher):
    """Each has a figure and a sentence; a method without a teacher shows only its features."""
    page = write_report(recorded(run_directory(tmp_path / "run", teacher))).read_text()
    for name in TEACHER_FIGURES:
        assert (f'id="figure-{name}"' in page) == teacher
    for name in HEALTH_FIGURES:
        assert f'id="figure-{name}"' in page
    for name in [*TEACHER_FIGURES * teacher, *HEALTH_FIGURES]:
        figure = part(page, f'id="figure-{name}"', "</figure>")
        assert len(max(curves(figure), key=len, default=[])) > 1, f"{name} has no curve"
        assert len(words(part(figure, "<figcaption>", "</figcaption>"))) > 40
    text = words(part(page, 'id="health"', "</table>"))
    assert "RankMe: directions in use 25.25 65.25 1" in text
    assert "uniformity on the sphere −1.25 −1.25 0" in text


def test_curves_follow_the_numbers(tmp_path):
    page = write_report(recorded(run_directory(tmp_path / "run"))).read_text()
    shown = {
        name: curves(part(page, f'id="figure-{name}"', "</figure>"))
        for name in ("half-life", "momentum", "rank")
    }
    expected, measured = shown["momentum"]
    rank, lidar = shown["rank"]
    for rises in (shown["half-life"][0], measured, rank):
        assert rises[-1] > rises[0] + 20
    for level in (expected, lidar):
        assert level[-1] == level[0]
    assert "momentum per step 0.97030 0.97930 0.98800" in words(part(page, 'id="teacher"', "</table>"))


def test_alarms_come_first_in_the_verdict(tmp_path):
    page = write_report(recorded(run_directory(tmp_path / "run"))).read_text()
    first = part(page, 'id="verdict"', "</li>")
    assert '<li class="bad">' in first
    assert "Alarm teacher-drag at step 41: the teacher is <drag>; shorten --half-life ." in words(first)
    assert "--half-life</code>" in first, "options do not wrap"
    events = words(part(page, 'id="events"', "</table>"))
    assert "step 7 step 7 was not finite" in events
    assert "step 41 alarm teacher-drag: the teacher is <drag>; shorten --half-life" in events
    assert "No alarm" not in page


def test_no_alarms_are_reported_only_for_a_monitored_run(tmp_path):
    run = run_directory(tmp_path / "run")
    page = write_report(run).read_text()
    assert "larm" not in words(page).replace(str(tmp_path), "")
    assert 'id="health"' not in page
    assert 'id="figure-advantage"' in page, "older runs contain the data for this figure"
    assert 'id="figure-cosine"' not in page
    lines = [
        line
        for line in recorded(run).joinpath("metrics.jsonl").read_text().splitlines()
        if '"alarm"' not in line
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert "No alarm: the run's diagnostics found no fault" in words(write_report(run).read_text())


def test_a_figure_over_depth_has_a_gap_between_encoder_and_decoder():
    values = {"encoder patch_embed": 3.0, "encoder 0": 2.0, "decoder 0": 1.0, "decoder pred": 0.5}
    svg = by_depth({"step 1": ("teacher", values), "step 2": ("ink", values)}, "distance", log=True)
    for label in ("patch embed", "pred", "encoder, then decoder", "step 1", "step 2"):
        assert f">{label}<" in svg
    assert [len(curve) for curve in curves(svg)] == [2, 2, 2, 2]


def test_a_curve_without_a_name_uses_the_logarithmic_axis():
    """On a logarithmic axis, powers of ten are equally spaced, with a legend entry or without."""
    svg = plot([Line("", "ink", [0, 1, 2], [1.0, 10.0, 100.0])], log=True)
    one, ten, hundred = curves(svg)[0]
    assert ten - one == pytest.approx(hundred - ten, abs=0.01)


def texts(svg: str) -> dict[str, float]:
    """The height of every text above the bottom, in points."""
    return {
        name: -float(y)
        for y, name in re.findall(
            r'<text[^>]*?(?:transform="translate\([\d.]+ |y=")([\d.]+)[^>]*>([^<]+)<', svg
        )
    }


def _levels_only(old):
    return lambda figure, axes, levels: [
        axes.annotate(name, (1, v), xycoords=("axes fraction", "data")) for name, v in levels.items()
    ]


@catches("labels of close levels overlap", "rcmae.report.curves:_label", _levels_only)
@pytest.mark.parametrize("log", [False, True])
def test_close_levels_are_two_lines_with_labels_that_do_not_overlap(log):
    levels = {"raw pixels": 48.1, "random": 47.6, "third": 48.5, "far": 5.0}
    svg = plot([Line("", "student", [0, 1], [40.0, 60.0])], levels, log=log)
    assert len(set(re.findall(r'<path d="(M [^"]+)"[^>]*stroke-dasharray', svg))) == 4
    height = texts(svg)
    labels = [height[name] for name in ("far", "random", "raw pixels", "third")]
    assert min(np.diff(labels)) >= SMALL


def test_an_axis_contains_its_baselines_and_does_not_start_below_zero():
    line = [Line("", "student", [0, 1], [0.2, 60.0])]
    ticks = texts(plot(line, {"baseline": 45.0}))
    assert not any(name.startswith("\N{MINUS SIGN}") for name in ticks)
    svg = plot([Line("", "student", [0, 1], [50.0, 60.0])], {"baseline": 30.0})
    assert min(float(name) for name in texts(svg) if re.fullmatch(r"[\d.]+", name) and float(name) > 1) <= 30
    assert "\N{MINUS SIGN}" in plot([Line("", "student", [0, 1], [-3.0, 5.0])]), "losses may be negative"


def test_text_in_a_figure_is_readable_on_a_phone():
    """At least 11 px if the figure is 360 px wide, also with many blocks."""
    blocks = {f"encoder {i}": 1.0 + i for i in range(24)} | {f"decoder {i}": 1.0 for i in range(8)}
    svg = by_depth({"step 1": ("teacher", blocks), "step 2": ("ink", blocks)}, "distance", {"level": 2.0})
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])
    assert len(sizes) > 10 and min(sizes) * 360 / width >= 11


def test_a_smooth_curve_is_a_running_mean():
    y = [0.0, 2.0] * 50
    svg = plot([Line("", "ink", list(range(100)), y, smooth=True)])
    raw, mean = curves(svg)
    assert len(mean) == 100
    assert max(mean[10:-10]) - min(mean[10:-10]) < 0.2 * (max(raw) - min(raw))
    assert np.mean(mean) == pytest.approx(np.mean(raw), abs=1)


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_hidden_pixels_cannot_reach_the_picture(tmp_path, network):
    """If every hidden pixel changes, the hidden part of the picture stays equal to the bit; visible patches
    are shown unchanged."""
    tensors, meta = snapshot()
    one = read(tmp_path, tensors, meta)
    hidden = (
        np.stack([np.isin(np.arange(64), h) for h in tensors["hidden"]])
        .reshape(5, 8, 8)
        .repeat(4, 1)
        .repeat(4, 2)
    )
    changed = np.where(hidden[:, None], 255 - tensors["image"], tensors["image"])
    two = read(tmp_path, tensors | {"image": changed}, meta)
    for i in range(5):
        a, b = pictures.picture(one, i, network), pictures.picture(two, i, network)
        assert np.array_equal(a[hidden[i]], b[hidden[i]])
        assert np.array_equal(a[~hidden[i]], tensors["image"][i].transpose(1, 2, 0)[~hidden[i]])
        c, e = (pictures.picture(s, i, network, true_statistics=True) for s in (one, two))
        assert not np.array_equal(c[hidden[i]], e[hidden[i]]), (
            "the column with true statistics depends on hidden pixels"
        )
        assert np.array_equal(pictures.visible(one, i), pictures.visible(two, i))


@pytest.mark.parametrize("target", ["normalized", "pixels"])
def test_a_perfect_prediction_reproduces_the_picture(tmp_path, target):
    tensors, meta = snapshot(target=target)
    loaded = read(tmp_path, tensors, meta)
    for i in range(5):
        patches = pictures.cut((tensors["image"][i].transpose(1, 2, 0) / 255 - loaded.mean) / loaded.std, 4)[
            tensors["hidden"][i]
        ]
        if target == "normalized":
            patches = (patches - patches.mean(1, keepdims=True)) / np.sqrt(
                patches.var(1, ddof=1, keepdims=True) + 0.5
            )
        tensors["student"][i] = patches
    loaded = read(tmp_path, tensors, meta)
    for i in range(5):
        error = pictures.picture(loaded, i, "student", true_statistics=True).astype(int) - tensors["image"][
            i
        ].transpose(1, 2, 0)
        assert np.abs(error).max() <= 1


def test_cut_and_join_are_inverse():
    x = np.random.default_rng(0).integers(0, 256, (8, 12, 3))
    assert np.array_equal(pictures.join(pictures.cut(x, 4), 8, 12, 4), x)


@pytest.mark.parametrize(("teacher", "labeled"), [(True, True), (True, False), (False, True)])
def test_the_page_is_complete(tmp_path, teacher, labeled):
    page = write_report(run_directory(tmp_path / "run", teacher, labeled)).read_text()
    for figure in ["figure-loss", "verdict", "reconstructions", "strip", "load", "bad", "events"]:
        assert f'id="{figure}"' in page
    assert ('id="teacher"' in page) == teacher
    assert ('id="figure-probe"' in page) == ('id="scores"' in page) == labeled
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:|//)""", page), (
        "no external resources"
    )
    assert "<script" not in page
    assert "images &lt;b&gt;of&lt;/b&gt; mine" in page
    assert "a&lt;b&gt;.png" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_the_verdict_is_in_plain_words(tmp_path):
    page = write_report(run_directory(tmp_path / "run")).read_text()
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", "", page))
    assert "Finished at step 60 of 60." in text
    assert "so 49% of the variance of hidden patches is explained" in text
    answer = words(part(page, 'id="answer"', "</div>"))
    assert "Learned: yes" in answer
    assert (
        "on the teacher's features has an accuracy of 50.0 % on 200 test images: above the randomly" in answer
    )
    assert "(20.0 %; +30.0 points, " in answer and "above raw pixels (25.0 %; +25.0 points, " in answer
    rows = [words(row) for row in part(page, 'id="scores"', "</table>").split("<tr>")]
    assert any("randomly initialized encoder 20.0 ± 5.5 10.0 ± 4.2" in row for row in rows)
    assert any("teacher 50.0 ± 6.9 12.0 ± 4.5" in row for row in rows)
    assert "2.5% lower than the student" in text or "2.4% lower than the student" in text
    assert "1 image could not be read" in text


def test_flat_images_have_no_variance_to_explain(tmp_path):
    run = run_directory(tmp_path / "run")
    record = run / "metrics.jsonl"
    record.write_text(record.read_text().replace('"zero": 0.8', '"zero": 0.0'))
    assert "so none of the variance of hidden patches is explained" in re.sub(
        r"\s+", " ", write_report(run).read_text()
    )


def test_fractions_below_zero_and_above_one_are_described_in_words(tmp_path):
    """A loss above that of predicting zero, a teacher far behind, and a half-life of many times the run."""
    run = run_directory(tmp_path / "run")
    record = re.sub('"zero": 0.8', '"zero": 0.3', (run / "metrics.jsonl").read_text())
    record = re.sub(r'"half_life_fraction": [\d.]+', '"half_life_fraction": 577.57', record)
    record = re.sub(r'"teacher_reconstruction": [\d.]+', '"teacher_reconstruction": 80.0', record)
    (run / "metrics.jsonl").write_text(record)
    text = words(write_report(run).read_text())
    assert "Predicting zero would score 0.300, so none of the variance of hidden patches is explained" in text
    assert "577.6 times the run" in text and "57757" not in text
    assert re.search(r"the teacher's reconstruction error is [\d.,]+ times the student's: it lags", text)
    assert not re.search(r"-\d+ ?% of|\d{4,}(?:\.\d+)? ?%", text)


def test_a_half_life_longer_than_the_run_is_given_in_multiples_of_the_run():
    assert [fraction_of_run(fraction) for fraction in (0.005, 1.0, 577.57)] == [
        "0.50% of the run",
        "100.00% of the run",
        "577.6 times the run",
    ]


def test_missing_data_is_left_out(tmp_path):
    run = run_directory(tmp_path / "run")
    for name in ("metrics.jsonl", "machine.json", "bad_files.jsonl"):
        (run / name).unlink()
    shutil.rmtree(run / "snapshots")
    assert "Stopped before its first recorded step" in write_report(run).read_text()
    (run / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 1, "loss": null, "reconstruction": null, "lr": 0.0}\n{"kind": "tra'
    )
    assert "not finite" in write_report(run).read_text()


def test_without_results_by_image_there_is_no_answer_and_no_interval(tmp_path, undrawn):
    run = run_directory(tmp_path / "run")
    shutil.rmtree(run / "probes")
    page = write_report(run).read_text()
    assert "Learned: not shown" in words(part(page, 'id="answer"', "</div>"))
    assert "teacher 50.0 12.0" in words(part(page, 'id="scores"', "</table>"))


@pytest.mark.parametrize(("zero", "word"), [(0.8, "not shown"), (0.4, "no")])
def test_without_labels_the_loss_can_only_refute(tmp_path, undrawn, zero, word):
    """Against the loss of predicting zero: far below it, and no better."""
    run = run_directory(tmp_path / "run", labeled=False)
    record = (run / "metrics.jsonl").read_text().replace('"zero": 0.8', f'"zero": {zero}')
    (run / "metrics.jsonl").write_text(record)
    answer = words(part(write_report(run).read_text(), 'id="answer"', "</div>"))
    assert re.search(rf"Learned: {word}\b(?! shown)", answer) and "no labels" in answer


def test_a_run_is_running_while_a_process_holds_its_lock(tmp_path, undrawn):
    run = run_directory(tmp_path / "run")
    (run / "machine.json").write_text('{"steps": 100}')

    def verdict(**running: bool) -> str:
        page = write_report(run, **running).read_text()
        assert "Learned so far: yes" in words(part(page, 'id="answer"', "</div>"))
        return words(part(page, 'id="verdict"', "</ul>"))

    stopped, running = "Stopped at step 60 of 100", "Running, at step 60 of 100 when this page was drawn."
    with run_lock(run):
        assert running in verdict() and stopped in verdict(running=False)
    assert stopped in verdict()
    with run_lock(run):  # drawing has not kept it
        pass


def test_a_teacher_near_the_student_is_no_success(tmp_path, undrawn, monkeypatch):
    """The page says so once, folds its panel only, and neither praises it nor reports that there were no
    alarms."""
    (teacher,) = RCMAE.panels()
    other = teacher._replace(id="other", title="Another panel", figures=(), more=())
    monkeypatch.setattr(RCMAE, "panels", classmethod(lambda cls: (teacher, other)))
    run = recorded(run_directory(tmp_path / "run"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    short = [
        line | ({"half_life_steps": 3.0} if line["kind"] == "train" else {})
        for line in lines
        if line["kind"] != "alarm"
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in short))
    page = write_report(run).read_text()
    first = words(part(page, 'id="verdict"', "</li>"))
    assert "The teacher's half-life is 3 steps: it is nearly the student" in first
    assert "No alarm" not in page and "it is ahead" not in page
    assert page.count("it is nearly the student") == 1
    assert "<details>" in part(page, "<h2>The mean teacher</h2>", 'id="teacher"')
    assert "<details>" not in part(page, "<h2>Another panel</h2>", 'id="other"')


def test_evaluations_are_shown_and_distinguished(tmp_path):
    """Of the run's networks, of what was fine-tuned from them, and whether pre-training paid off."""
    run = run_directory(tmp_path / "run")
    record = {
        "task": "linear",
        "network": "teacher",
        "data": "CLASSES",
        "train_images": 36,
        "test_images": 100,
        "metrics": {"top1": 50.0},
    }
    record |= {
        "per_class": {"a": 40.0, "b": 60.0},
        "images_per_class": {"a": 20, "b": 80},
        "labels_percent": 100,
        "seed": 0,
        "settings": {"probe": "linear"},
    }
    record |= {"hashes": {"test": "1"}, "backbone": str(run / "evaluate" / "finetune-teacher")}
    shifted = record | {
        "task": "robustness",
        "network": "classifier",
        "details": {"errors": {"C-style": {"fog": [10, 20, 30, 40, 50]}}},
    }
    names = (
        "linear-teacher",
        "linear-teacher-mae",
        "linear-teacher-10-percent-seed-3",
        "finetune-teacher/evaluate/robustness-classifier",
    )
    for name, content in zip(names, [record] * 3 + [shifted], strict=True):
        (run / "evaluate" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "evaluate" / f"{name}.json").write_text(json.dumps(content))
    (run / "evaluate" / "worth-it").mkdir()
    (run / "evaluate" / "worth-it" / "worth-it.json").write_text(
        json.dumps({"verdict": ["With 1 % of the labels, teacher: it <paid>"]})
    )
    page = write_report(run).read_text()
    rows = part(page, 'id="evaluations"', "</table>").split("<tr>")[2:]
    assert len(rows) == 4 and all(any(f"<code>{name}</code>" in row for row in rows) for name in names)
    assert all("50.0 ± 9.6" in row and "a (40.0 % of 20 images)" in row for row in rows)
    assert "teacher: it &lt;paid&gt;" in part(page, 'id="worth"', "</ul>")
    assert "Accuracy by severity of corruption: C-style" in page


def chromium(page: str, folder: Path, width: int, **expressions: str) -> dict:
    """The values of JavaScript expressions in headless Chromium, in a window of that width."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium on this machine; CI installs Debian's")
    fields = ", ".join(f"{name}: {expression}" for name, expression in expressions.items())
    probe = (
        '<script>window.addEventListener("load", () => '
        f"{{ document.title = JSON.stringify({{ {fields} }}) }})</script></body>"
    )
    (folder / "probed.html").write_text(page.replace("</body>", probe))
    command = [
        program,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},900",
        "--virtual-time-budget=3000",
        "--dump-dom",
        (folder / "probed.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return json.loads(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1])


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_window_of_a_browser(tmp_path, width):
    """In headless Chromium: the figures have a size, and the page is no wider than the window."""
    page = (
        write_report(recorded(run_directory(tmp_path / "run")))
        .read_text()
        .replace("<details", "<details open")
    )
    layout = chromium(
        page,
        tmp_path,
        width,
        over="document.documentElement.scrollWidth - window.innerWidth",
        names='[...document.querySelectorAll("figure[id]")]'
        ".filter(e => e.getBoundingClientRect().height > 100).map(e => e.id)",
        alarm='getComputedStyle(document.querySelector("li.bad")).backgroundColor',
        figures='[...document.querySelectorAll("figure svg, table.shots img")]'
        ".map(e => e.getBoundingClientRect().width)",
    )
    assert layout["over"] <= 0
    assert len(layout["figures"]) > 35
    assert {f"figure-{name}" for name in TEACHER_FIGURES + HEALTH_FIGURES} <= set(layout["names"])
    assert layout["alarm"] != "rgba(0, 0, 0, 0)", "alarms are highlighted"
    assert min(layout["figures"]) > 40

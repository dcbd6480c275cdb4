"""Write the tables of README.md from results/*.json: `python -m benchmarks.tables`. tests/test_house.py holds them in step."""

import json
import re
from pathlib import Path

from benchmarks.paper.experiments import EXPERIMENTS

ROOT = Path(__file__).parent.parent


def embedded() -> str:
    """The main job's last table."""
    r = json.loads((ROOT / "results" / "embedded.json").read_text())
    rows = ["| percent right on mean-pooled patches | linear probe | k-NN |", "| --- | ---: | ---: |"]
    rows += [f"| {name} | {s['linear']:.1f} | {s['knn']:.1f} |" for name, s in r["scores"].items()]
    m = r["machine"]
    note = f"Seed {r['seed']}, {r['steps']:,} steps, {r['minutes']:.1f} minutes on {m['threads']} cores "
    note += f"({m['cpu']}, {m['precision']}), recipe {r['recipe_hash']}."
    return "\n".join([*rows, "", note])


def step() -> str:
    """Ratios of benchmarks/step.py."""
    r = json.loads((ROOT / "results" / "step_cpu.json").read_text())
    sizes = {"tiny": "128 wide, 32 px", "ti": "ViT-Ti/16", "s": "ViT-S/16", "b": "ViT-B/16"}
    names = [n for n in dict.fromkeys(row["name"] for row in r["rows"]) if not n.startswith("plain")]
    rows = ["| | " + " | ".join(sizes[s] for s in dict.fromkeys(row["size"] for row in r["rows"])) + " |"]
    rows.append("| --- |" + " ---: |" * (rows[0].count("|") - 2))
    for name in names:
        cells = [f"{row['ratio']:.2f}x [{row['lowest']:.2f}-{row['highest']:.2f}]" for row in r["rows"] if row["name"] == name]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    c = r["conditions"]
    return "\n".join(
        [
            *rows,
            "",
            f"Median and range of {c['rounds']} interleaved rounds; {c['cpu']}, {c['threads']} threads, torch {c['torch']}.",
            _misses(r["rows"], sizes),
        ]
    )


def _misses(rows: list[dict], sizes: dict[str, str]) -> str:
    """Where RC-MAE's step does not reach what was wanted of it."""
    by = {(row["size"], row["name"]): row for row in rows}
    missed = []
    for size, label in sizes.items():
        plain = by[size, "plain RC-MAE fp32"]
        for name, wanted in (("fp32", 1.15), ("bf16", 2.3)):
            own = by[size, f"ours RC-MAE {name}"]
            if own["ratio"] < wanted:
                missed.append(f"{name} at {label} is {own['ratio']:.2f}x")
            if own["peak_mib"] > plain["peak_mib"]:
                missed.append(f"{name} at {label} takes {own['peak_mib']:,.0f} MiB, the plain step {plain['peak_mib']:,.0f}")
    return f"Wanted: 1.15x in float32, 2.3x in bf16, and no more peak memory. Missed: {'; '.join(missed) or 'nothing'}."


def digits() -> str:
    """benchmarks/digits_difficulty.py."""
    r = json.loads((ROOT / "results" / "digits_difficulty.json").read_text())
    rows = ["| | |", "| --- | ---: |"]
    rows += [
        f"| linear probe on raw pixels | {r['raw_pixels']:.1f} % |",
        f"| linear probe on an untrained encoder | {r['untrained']:.1f} % |",
    ]
    rows += [f"| four convolutions trained with labels, {r['epochs']} epochs | {r['supervised']:.1f} % |"]
    rows += [f"| time to draw an image | {r['ms_per_image']:.2f} ms |", f"| version, hash | {r['generator']}, `{r['set_hash'][:16]}` |"]
    return "\n".join(rows)


def lab_linear() -> str:
    """benchmarks/lab.py: `rcmae lab linear` beside its reference values."""
    r = json.loads((ROOT / "results" / "lab_linear.json").read_text())
    rows = ["| optimizer | alpha | same input | other input | nothing in common |", "| --- | ---: | ---: | ---: | ---: |"]
    for found in (r["table"][i : i + 3] for i in range(0, len(r["table"]), 3)):
        cells = [f"{f['previous']:.3f}" + (f" ({f['reference']:.3f})" if f["reference"] is not None else "") for f in found]
        rows.append(f"| {found[0]['optimizer']} | {found[0]['alpha']} | " + " | ".join(cells) + " |")
    note = f"Medians of {r['setting']['seeds']} seeds, {r['setting']['width']} values, rank {r['setting']['rank']}, "
    return "\n".join([*rows, "", note + f"{r['setting']['kept']:.0%} seen; in brackets the reference value, where there is one."])


def lab_gradients() -> str:
    """benchmarks/lab.py: `rcmae lab gradients` on the main job's run."""
    r = json.loads((ROOT / "results" / "lab_gradients.json").read_text())
    rows = ["| after a step on batch B | similarity of features | cosine with that step | with AdamW's moment | ratio |"]
    rows += ["| --- | ---: | ---: | ---: | ---: |"]
    for line in r["summary"]:
        cells = ("{:.3f} [{:.3f}, {:.3f}]".format(*line[key]) for key in ("similarity", "previous", "moment", "ratio"))
        rows.append(f"| {line['condition']}: {line['what']} | " + " | ".join(cells) + " |")
    a = r["about"]
    note = (
        f"Step {a['step']:,}; {a['batches']} steps of {a['batch_size']} images after {a['settle']} to settle, learning rate {a['lr']:.2g}, "
    )
    note += f"half-life {a['half_life']:.1f} steps; means with 95 % bootstrap intervals."
    return "\n".join([*rows, "", note, "", *(f"- {text}" for _, text in r["said"])])


def half_life() -> str:
    """benchmarks/half_life.py."""
    r = json.loads((ROOT / "results" / "half_life.json").read_text())
    rows = ["| arm | half-life in steps | linear probe | against MAE | against MAE, averaged |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in r["rows"]:
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*row["linear"])]
        cells += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*row[f"against {other}"]) for other in ("MAE", "MAE, averaged")]
        remembers = "" if row["arm"] == "MAE" else f"{row['half_life']:.1f}"
        rows.append(f"| {row['arm']} | {remembers} | " + " | ".join(cells) + " |")
    m = r["machine"]
    note = f"{len(r['seeds'])} paired seeds, {r['steps']:,} steps; means with 95 % t intervals, differences within a seed. "
    note += f"{m['cpu']}, {m['precision']}."
    return "\n".join([*rows, "", note, "", half_life_verdict()])


def half_life_verdict() -> str:
    """What the sweep supports, in sentences."""
    r = json.loads((ROOT / "results" / "half_life.json").read_text())
    return "\n".join(f"- {text}." for text in r["verdicts"].values())


def verify() -> str:
    """`rcmae verify METHOD --json results/verify_METHOD.json`."""
    rows = ["| | | loss | gradient | student | teacher |", "| --- | --- | ---: | ---: | ---: | ---: |"]
    for file in sorted((ROOT / "results").glob("verify_*.json"), reverse=True):
        r = json.loads(file.read_text())
        for row in r["rows"]:
            cells = [f"{row['differences'][k]:.0e}" if k in row["differences"] else "" for k in ("loss", "gradient", "student", "teacher")]
            rows.append(
                f"| {r['method']}: {row['name']} | {'not run' if not row['differences'] else 'yes' if row['holds'] else 'NO'} | "
                + " | ".join(cells)
                + " |"
            )
    return "\n".join(rows)


def alarms() -> str:
    """benchmarks/alarms.py."""
    r = json.loads((ROOT / "results" / "alarms.json").read_text())
    faults, healthy = ([row for row in r["rows"] if bool(row["alarm"]) == kind] for kind in (True, False))
    rows = ["| fault that was put in | alarm | at step | what it said |", "| --- | --- | ---: | --- |"]
    for row in faults:
        line = row["lines"][0].partition(": ")[2] if row["lines"] else "nothing"
        rows.append(f"| {row['run']} | {', '.join(row['called'])} | {', '.join(map(str, row['steps']))} of {r['steps']} | {line} |")
    called = sum(bool(row["called"]) for row in healthy)
    return "\n".join([*rows, "", f"Healthy runs on which an alarm was called: {called} of {len(healthy)}."])


def monitor_cost() -> str:
    """benchmarks/monitor_cost.py."""
    r = json.loads((ROOT / "results" / "monitor_cost.json").read_text())
    lengths = list(r["rows"][0]["by_length"])
    head = ["model", "a step", "log lines", "gradients and health", "LiDAR", "in all", *(f"{int(n):,} steps" for n in lengths)]
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in r["rows"]:
        s, (low, high) = row["shares"], row["interval"]
        parts = [f"{1000 * row['step_seconds']:.0f} ms", f"{s['log lines, paired blocks']:.1%} [{low:.1%}, {high:.1%}]"]
        parts += [f"{v:.1%}" for v in (s["gradients and health"], s["LiDAR"], row["cost"], *(row["by_length"][n] for n in lengths))]
        rows.append(f"| {row['size']} | " + " | ".join(parts) + " |")
    note = f"A run of {r['rows'][0]['steps']:,} steps; log lines by paired blocks with and without, in one run, with a 95 % interval; "
    return "\n".join([*rows, "", note + "other lengths from the timed parts."])


def cost() -> str:
    """`rcmae compare cost --out DIR`, whose cost.json is results/cost.json."""
    r = json.loads((ROOT / "results" / "cost.json").read_text())
    a = r["about"]
    head = ["model", "method", "GFLOP an image", "ratio", "kept, MB an image", "ratio", "static, GiB", f"worst at {a['batch']}, GiB"]
    rows = ["| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in r["rows"]:
        cells = [row["model"], row["name"], f"{row['flops'] / 1e9:.1f}", f"{row['flops_ratio']:.2f}x", f"{row['saved'] / 1e6:.1f}"]
        cells += [f"{row['saved_ratio']:.2f}x", f"{row['static'] / 2**30:.2f}", f"{row['peak'] / 2**30:.1f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([*rows, "", f"{a['precision']}, torch {r['machine']['torch']}; ratios to {a['first']}."])


def peaks() -> str:
    """`rcmae compare cost --models vit_small_patch16 --measure --measured-batch 8 --out DIR`, whose cost.json is results/cost_cpu.json."""
    r = json.loads((ROOT / "results" / "cost_cpu.json").read_text())
    a, m = r["about"], r["machine"]
    rows = [
        "| model | method | predicted, GiB | measured, GiB | measured / predicted | images/s |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in r["rows"]:
        p, q = row["predicted_there"] / 2**30, row["measured_peak"] / 2**30
        rows.append(f"| {row['model']} | {row['name']} | {p:.2f} | {q:.2f} | {q / p:.2f} | {row['images_per_second']:.1f} |")
    device = m["cpu"] if m["device"] == "cpu" else m["device"]
    return "\n".join([*rows, "", f"{a['measured_batch']} images, {a['precision']}; {device}, {m['threads']} threads, torch {m['torch']}."])


def race() -> str:
    """`rcmae compare race`, whose race.json is results/race.json."""
    return _race(json.loads((ROOT / "results" / "race.json").read_text()))


def _race(r: dict) -> str:
    first, about, m = r["rows"][0]["arm"], r["about"], r["machine"]
    rows = [f"| arm | images | linear | attentive | k-NN | linear against {first} | attentive against {first} |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in r["rows"]:
        cells = [row["arm"], f"{row['images']:,}", *(f"{_mean(row[kind]):.1f}" for kind in ("linear", "attentive", "knn"))]
        against = (row[f"{kind} against"].get(first) for kind in ("linear", "attentive"))
        cells += ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*a) if a else "" for a in against]
        rows.append("| " + " | ".join(cells) + " |")
    untrained = ", ".join(f"{kind} {_mean(r['rows'][0][f'{kind} untrained']):.1f}" for kind in ("linear", "attentive", "knn"))
    note = f"Percent right, {about['budget']} an arm, {about['seeds']} paired seeds, in brackets 95 % intervals. Untrained: {untrained}. "
    return "\n".join([*rows, "", note + f"{m['cpu'] if m['device'] == 'cpu' else m['device']}, {m['precision']}, torch {m['torch']}."])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def race_verdict() -> str:
    """What the race says in words."""
    return "\n".join(f"- {text}" for text in json.loads((ROOT / "results" / "race.json").read_text())["said"])


def learns() -> str:
    """benchmarks/learns.py, or as long as it has not been run, the race: does each method learn, and is it alive?"""
    file = ROOT / "results" / "learns.json"
    r = json.loads((file if file.exists() else ROOT / "results" / "race.json").read_text())
    rows = ["| method | steps | linear probe | above the untrained encoder | rank of the features | entropy, nats | prototypes in use |"]
    rows += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in r["rows"]:
        cells = [row["arm"], str(row["steps"]), f"{_mean(row['linear']):.1f}", "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row["linear gain"])]
        for key in ("rankme", "entropy", "prototypes_used"):
            known = [h[key] for h in row["health"] if key in h]
            cells.append(f"{_mean(known):.1f}" if known else "")
        rows.append("| " + " | ".join(cells) + " |")
    m = r["machine"]
    seeds = r["seeds"] if file.exists() else r["about"]["seeds"]
    above = [row["arm"] for row in r["rows"] if row["linear gain"][1] > 0]
    unsure = [row["arm"] for row in r["rows"] if row["arm"] not in above]
    rows += ["", f"Above the untrained encoder: {', '.join(above) or 'none'}. Cannot be told: {', '.join(unsure) or 'none'}."]
    text = f"{seeds} seeds, 95 % intervals; {m['cpu']}, {m['precision']}, torch {m['torch']}"
    for row in r["rows"]:
        if (own := row.get("machine")) and own["precision"] != m["precision"]:
            text += f"; {row['arm']}: {own['cpu']}, {own['precision']}, torch {own['torch']}"
    return "\n".join([*rows, "", f"{text}."])


def paper() -> str:
    """benchmarks/paper: each table of the paper, its numbers and commands, and what our small form gave."""
    parts = []
    for name, experiment in EXPERIMENTS.items():
        parts += [f"### {name}", "", f"{experiment.claim}.", ""]
        columns = list(experiment.rows[0].paper)
        parts += ["| | " + " | ".join(f"{c} (the paper's)" for c in columns) + " |", "| --- |" + " ---: |" * len(columns)]
        parts += [f"| {row.name} | " + " | ".join(str(row.paper[c] or "not known") for c in columns) + " |" for row in experiment.rows]
        parts += ["", "```sh", *(row.command for row in experiment.rows), "```", ""]
        file = ROOT / "results" / f"paper_{name}.json"
        if not experiment.small:
            parts += [f"Its small form is `{experiment.elsewhere}`.", ""]
            continue
        if not file.exists():
            parts += [f"Small form: `python -m benchmarks.paper {name} --run`. It has not been run yet.", ""]
            continue
        parts += [f"Small form on the embedded set, our numbers (`python -m benchmarks.paper {name} --run`):", ""]
        r = json.loads(file.read_text())
        for title, one in r.get("races", {}).items():
            parts += [f"{title}:", "", _race(one | {"machine": r["machine"]}), "", *(f"- {text}" for text in one["said"]), ""]
        if "races" not in r:
            parts += [_resources(r), ""]
    return "\n".join(parts).rstrip()


def corruptions() -> str:
    """benchmarks/corruptions.py."""
    r = json.loads((ROOT / "results" / "corruptions.json").read_text())
    rows = ["| milliseconds an image | 32 px | 224 px |", "| --- | ---: | ---: |"]
    rows += [f"| {row['name']}{'' if row['standard'] else ' (extra)'} | {row['32']:.2f} | {row['224']:.1f} |" for row in r["rows"]]
    rows.append(f"| mean of the 15 | {r['mean']['32']:.2f} | {r['mean']['224']:.1f} |")
    m = r["machine"]
    hours = 15 * 5 * 50_000 * r["mean"]["224"] / 3.6e6
    note = f"One core ({m['cpu']}), processor time, mean of the five severities. ImageNet's 50,000 validation images under all 15: "
    return "\n".join([*rows, "", f"{note}{hours:.1f} hours of one core, beside reading them."])


WHAT = {"knn": "k-NN", "linear": "linear probe", "attentive": "attentive probe", "finetune": "fine-tuning"}
NOT_YET = "This has not been run yet."


def evaluation() -> str:
    """benchmarks/evaluation.py: accuracy by backbone, task and share of the labels; clean, corrupted and attacked."""
    file = ROOT / "results" / "evaluation.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    measures = {
        "clean": "clean",
        "corrupted": "corrupted",
        "FGSM": f"FGSM {r['eps']:g}/255",
        "PGD": f"PGD-{r['pgd_steps']} {r['eps']:g}/255",
    }
    rows = [
        "| task | labels | backbone | " + " | ".join(measures.values()) + " | corrupted, against MAE |",
        "| --- | ---: | --- |" + 5 * " ---: |",
    ]
    for task, name in WHAT.items():
        for row in (row for percent in (1, 10, 100) for row in r["rows"] if (row["task"], row["percent"]) == (task, percent)):
            cells = [f"{_mean(row[m]['seeds']):.1f}" for m in measures]
            against = row["corrupted"].get("against MAE")
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*against) if against else "")
            rows.append(f"| {name} | {row['percent']} % | {row['backbone']} | " + " | ".join(cells) + " |")
    m = r["machine"]
    note = f"Percent right, means of {len(r['seeds'])} paired seeds; corrupted: mean of 15 corruptions at 5 severities (not ImageNet-C) "
    note += f"of {r['corrupted']} images a seed; attacks: {r['attacked']} images a seed. In brackets 95 % intervals. "
    if r["failed_checks"]:
        note += f"{len(r['failed_checks'])} sanity checks of attacks failed (results/evaluation.json names them). "
    return "\n".join([*rows, "", f"{note}{m['cpu']}, {m['precision']}, torch {m['torch']}."])


def evaluation_verdict() -> str:
    """Is RC-MAE more robust than MAE, and better at all, on the embedded set?"""
    file = ROOT / "results" / "evaluation.json"
    if not file.exists():
        return NOT_YET
    said, rows = [], [r for r in json.loads(file.read_text())["rows"] if r["backbone"] == "RC-MAE, teacher"]
    for other in ("MAE", "MAE, averaged"):
        for percents, labels in (((100,), "all labels"), ((1, 10), "1 and 10 % of the labels")):
            found: dict[str, list[str]] = {"better": [], "worse": [], "can't tell": []}
            for row in (r for r in rows if r["percent"] in percents):
                for measure in ("clean", "corrupted", "FGSM", "PGD"):
                    gain, low, high = row[measure][f"against {other}"]
                    word = _word(low, high)
                    share = "" if percents == (100,) else f" at {row['percent']} %"
                    found[word].append(f"{WHAT[row['task']]}{share}, {measure} ({gain:+.1f} points, {low:+.1f} to {high:+.1f})")
            tally = ", ".join(f"{word} in {len(cases)}" for word, cases in found.items())
            which = [f"  - {word}: {case}." for word in ("better", "worse") for case in found[word]]
            count = sum(map(len, found.values()))
            said += [f"- RC-MAE's teacher against {other}, {labels}, {count} comparisons (task, images): {tally}.", *which]
    said.append("\nOf a hundred 95 % intervals about five exclude zero by chance.")
    return "\n".join(said)


def _word(low: float, high: float) -> str:
    """What an interval of a gain says."""
    return "better" if low > 0 else "worse" if high < 0 else "can't tell"


def detection_verdict() -> str:
    """Did pre-training help to find objects, and RC-MAE more than MAE?"""
    file = ROOT / "results" / "detection.json"
    if not file.exists():
        return NOT_YET
    said = []
    for own, other in (("MAE", "untrained"), ("RC-MAE, teacher", "untrained"), ("RC-MAE, teacher", "MAE")):
        for row in (r for r in json.loads(file.read_text())["rows"] if r["backbone"] == own):
            parts = [(n, row[n][f"against {other}"]) for n in ("box AP", "mask AP")]
            gains = ", ".join(f"{n} {_word(*gain[1:])} ({gain[0]:+.1f} points, {gain[1]:+.1f} to {gain[2]:+.1f})" for n, gain in parts)
            said.append(f"- {own} against {other}, {row['scenes']:,} labelled scenes: {gains}.")
    return "\n".join(said)


def detection() -> str:
    """benchmarks/detection.py: average precision on embedded scenes by backbone and number of labelled scenes."""
    file = ROOT / "results" / "detection.json"
    if not file.exists():
        return NOT_YET
    r = json.loads(file.read_text())
    numbers = ("box AP", "box AP50", "mask AP", "mask AP50")
    head = [*numbers, "mask AP, against untrained", "mask AP, against MAE"]
    rows = ["| labelled scenes | backbone | " + " | ".join(head) + " |", "| ---: | --- |" + len(head) * " ---: |"]
    for row in r["rows"]:
        cells = [f"{_mean(row[n]['seeds']):.1f}" for n in numbers]
        for other in ("untrained", "MAE"):
            gain = row["mask AP"].get(f"against {other}")
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain) if gain else "")
        rows.append(f"| {row['scenes']:,} | {row['backbone']} | " + " | ".join(cells) + " |")
    m = r["machine"]
    note = f"Embedded scenes, in percent: means of {len(r['seeds'])} paired seeds, {r['test_scenes']} test scenes, {r['steps']:,} steps of "
    note += (
        f"{r['batch_size']} scenes after {r['pretraining_steps']:,} of pre-training, {r['core_minutes']:.0f} minutes of a core in all. In "
    )
    note += f"brackets 95 % intervals over seeds (Student's t). {m['cpu']}, {m['precision']}, torch {m['torch']}.\n\n"
    heart = r["overfit"]
    note += f"Four scenes are learned by heart in {heart['steps']:,} steps, from new weights: "
    note += f"box AP {heart['box AP']:.1f}, mask AP {heart['mask AP']:.1f}."
    if long := r.get("longer"):
        what = f"{long['backbone']}, {long['scenes']:,} labelled scenes, {long['steps']:,} steps"
        scores = ", ".join(f"{n} {long[n]:.1f}" for n in numbers)
        note += f"\n\nOne longer run ({what}, {long['seconds'] / 60:.0f} minutes of one core): {scores}."
    return "\n".join([*rows, "", note])


def detection_step() -> str:
    """benchmarks/detection_step.py, on a CPU and, if it was measured, on a GPU."""
    tables = []
    for file in (ROOT / "results" / f"detection_step{suffix}.json" for suffix in ("", "_cuda")):
        if file.exists():
            r = json.loads(file.read_text())
            c = r["conditions"]
            rows = ["| | images/s | speed against torchvision's | peak memory, MiB |", "| --- | ---: | ---: | ---: |"]
            for row in r["rows"]:
                ratio = f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
                rows.append(f"| {row['name']} | {row['images_per_s']:.2f} | {ratio} | {row['peak_mib']:,.0f} |")
            where = c["cpu"] if c["device"] == "cpu" else c["device"]
            note = f"{c['side']} px, {r['rows'][0]['batch']} images a step, {c['rounds']} rounds; {where}, {c['threads']} threads, "
            note += f"torch {c['torch']}."
            tables.append("\n".join([*rows, "", note]))
    return "\n\n".join(tables) or "`python -m benchmarks.detection_step` has not been run yet."


def _resources(r: dict) -> str:
    rows = ["| | GFLOP an image | kept, MB an image | worst memory, GiB | images/s |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in r["rows"]:
        cells = [
            f"{row['flops'] / 1e9:.1f}",
            f"{row['saved'] / 1e6:.1f}",
            f"{row['measured_peak'] / 2**30:.2f}",
            f"{row['images_per_second']:.1f}",
        ]
        rows.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    a, m = r["about"], r["machine"]
    return "\n".join(
        [*rows, "", f"{r['rows'][0]['model']}, {a['measured_batch']} images, {a['precision']}; {m['cpu']}, {m['threads']} threads."]
    )


TABLES = {
    f.__name__: f
    for f in (
        embedded, step, digits, lab_linear, lab_gradients, half_life, half_life_verdict, verify, alarms, monitor_cost, cost, peaks,
        race, race_verdict, learns, paper, corruptions, evaluation, evaluation_verdict, detection,
        detection_verdict, detection_step,
    )
}  # fmt: skip
PAGES = (
    "README.md",
    "docs/embedded.md",
    "docs/lab.md",
    "docs/compare.md",
    "docs/paper.md",
    "docs/robustness.md",
    "docs/evaluation.md",
    "docs/detection.md",
)


def filled(text: str) -> str:
    """The text with every table between its markers written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

"""Write the tables of README.md from results/*.json: `python -m benchmarks.tables`. tests/test_house.py holds them in step."""

import json
import re
from pathlib import Path

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
    sizes = {"tiny": "embedded, 32 px", "ti": "ViT-Ti/16", "s": "ViT-S/16", "b": "ViT-B/16"}
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
        ]
    )


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


TABLES = {"embedded": embedded, "step": step, "digits": digits}
PAGES = ("README.md", "docs/embedded.md")


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

"""Tables of what commands write as JSON: `rcmae compare cost`, `rcmae compare race`, `rcmae verify`."""

from typing import Any

from benchmarks.markdown import bullets, device_name, mean, signed, table

KINDS = ("linear", "attentive", "knn")


def cost_table(results: dict[str, Any]) -> str:
    """cost.json of `rcmae compare cost --out DIR`, copied to results/cost.json."""
    about = results["about"]
    head = ["model", "method", "GFLOP per image", "ratio", "saved activations, MB per image", "ratio"]
    head += ["model and optimizer state, GiB", f"peak at batch {about['batch']}, GiB"]
    rows = [
        [
            row["model"],
            row["name"],
            f"{row['flops'] / 1e9:.1f}",
            f"{row['flops_ratio']:.2f}x",
            f"{row['saved'] / 1e6:.1f}",
            f"{row['saved_ratio']:.2f}x",
            f"{row['state'] / 2**30:.2f}",
            f"{row['peak'] / 2**30:.1f}",
        ]
        for row in results["rows"]
    ]
    note = f"{about['precision']}, torch {results['machine']['torch']}; ratios to {about['first']}."
    return table(head, rows, note, left=(0, 1))


def peak_table(results: dict[str, Any]) -> str:
    """cost.json of `rcmae compare cost --models vit_small_patch16 --measure --measured-batch 8 --out DIR`,
    copied to results/cost_cpu.json."""
    about, machine, rows = results["about"], results["machine"], []
    for row in results["rows"]:
        predicted, measured = row["predicted_peak"] / 2**30, row["measured_peak"] / 2**30
        cells = [row["model"], row["name"], f"{predicted:.2f}", f"{measured:.2f}"]
        rows.append([*cells, f"{measured / predicted:.2f}", f"{row['images_per_second']:.1f}"])
    return table(
        ["model", "method", "predicted peak, GiB", "measured peak, GiB", "measured / predicted", "images/s"],
        rows,
        f"{about['measured_batch']} images, {about['precision']}; {device_name(machine)}, "
        f"{machine['threads']} threads, torch {machine['torch']}.",
        left=(0, 1),
    )


def resource_table(results: dict[str, Any]) -> str:
    """What `rcmae compare cost --measure` counts and measures for one model."""
    about, machine = results["about"], results["machine"]
    rows = [
        [
            row["name"],
            f"{row['flops'] / 1e9:.1f}",
            f"{row['saved'] / 1e6:.1f}",
            f"{row['measured_peak'] / 2**30:.2f}",
            f"{row['images_per_second']:.1f}",
        ]
        for row in results["rows"]
    ]
    return table(
        ["", "GFLOP per image", "saved activations, MB per image", "measured peak, GiB", "images/s"],
        rows,
        f"{results['rows'][0]['model']}, {about['measured_batch']} images, {about['precision']}; "
        f"{machine['cpu']}, {machine['threads']} threads.",
    )


def race_table(results: dict[str, Any]) -> str:
    """race.json of `rcmae compare race`."""
    about, machine, first = results["about"], results["machine"], results["rows"][0]
    rows = [
        [
            row["arm"],
            f"{row['images']:,}",
            *(f"{mean(row[kind]):.1f}" for kind in KINDS),
            *(signed(row[f"{kind} against"].get(first["arm"])) for kind in ("linear", "attentive")),
        ]
        for row in results["rows"]
    ]
    head = ["arm", "images", "linear", "attentive", "k-NN"]
    head += [f"{kind} against {first['arm']}" for kind in ("linear", "attentive")]
    random_init = ", ".join(f"{kind} {mean(first[f'{kind} random_init']):.1f}" for kind in KINDS)
    return table(
        head,
        rows,
        f"Accuracy in percent, {about['budget']} per arm, {about['seeds']} paired seeds, 95 % intervals in "
        f"brackets. Random initialization: {random_init}. {device_name(machine)}, {machine['precision']}, "
        f"torch {machine['torch']}.",
    )


def race_verdict(results: dict[str, Any]) -> str:
    """The conclusions of the race in sentences."""
    return bullets(results["verdict"])


def verify_table(*results: dict[str, Any]) -> str:
    """The files of `rcmae verify METHOD --json results/verify_METHOD.json`, rcmae first."""
    rows = []
    for method in reversed(results):
        for row in method["rows"]:
            differences = row["differences"]
            state = "not run" if not differences else "yes" if row["holds"] else "NO"
            quantities = ("loss", "gradient", "student", "teacher")
            cells = [f"{differences[name]:.0e}" if name in differences else "" for name in quantities]
            rows.append([f"{method['method']}: {row['name']}", state, *cells])
    return table(["", "", "loss", "gradient", "student", "teacher"], rows, left=(0, 1))

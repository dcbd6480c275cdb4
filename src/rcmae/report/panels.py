"""The two panels of the instruments that a run carries (`lab/monitor.py`): the mean teacher, and whether the features are alive."""

from typing import Any, NamedTuple

from .curves import Line, by_depth, column, plot

SHADES = ("memory1", "memory2", "memory3")
"Colours of what has an order, from the first to the last."


class Shown(NamedTuple):
    """A figure, its id on the page, and the sentence that says how to read it."""

    id: str
    svg: str
    caption: str


def teacher_panel(train: list[dict], health: list[dict]) -> dict[str, Any] | None:
    """The clock of the teacher in all units, what it does to the student, and, less important, how far it is from it."""
    lines = [line for line in train if line.get("momentum") is not None]
    if not lines:
        return None
    steered = len({line["momentum"] for line in lines}) > 1
    chosen = {"at the start": lines[0], "halfway": lines[len(lines) // 2], "now": lines[-1]} if steered else {"now": lines[-1]}
    return {
        "columns": list(chosen),
        "units": {
            "momentum an optimizer step": [f"{line['momentum']:.5f}" for line in chosen.values()],
            "half-life in steps": [_number(line.get("half_life_steps")) for line in chosen.values()],
            "half-life in images": [_number(line.get("half_life_images")) for line in chosen.values()],
            "half-life in epochs": [_number(line.get("half_life_epochs")) for line in chosen.values()],
            "half-life as a share of the run": [_share(line.get("half_life_share")) for line in chosen.values()],
        },
        "figures": _what_it_does(lines, health, steered),
        "more": _how_far_it_is(lines, health),
    }


def _what_it_does(lines: list[dict], health: list[dict], steered: bool) -> list[Shown]:
    x = column(lines, "step")
    full, measured = [h for h in health if h.get("gradient")], [line for line in lines if line.get("measured_momentum") is not None]
    full_x = column(full, "step")
    advantage = [
        100 * (r - t) / r if r and t is not None else None
        for r, t in zip(column(lines, "reconstruction"), column(lines, "teacher_reconstruction"), strict=True)
    ]
    found = []
    if _any(advantage):
        text = "How much less the teacher errs than the student on the same batch. Above 0 it has something to teach; "
        text += "if it stays below 0 past the first third of the run, shorten --half-life."
        svg = plot([Line("", "teacher", x, advantage, smooth=True)], {"equal": 0.0}, "teacher advantage, %", symlog=1.0)
        found.append(Shown("figure-advantage", svg, text))
    if _any(column(lines, "last_cosine")):
        text = "Where the teacher pulls, against where the images pull: 1 is the same way, 0 across, −1 straight back. "
        text += "Below 0 it takes back part of the steps before, as the theory says; above 0 it hurries the student on."
        curves = [
            Line("errors of the output", "ink", x, column(lines, "output_cosine"), smooth=True),
            Line("gradients, last layer", "both", x, column(lines, "last_cosine"), smooth=True),
            Line("gradients, whole network", "both", full_x, [h["gradient"]["cosine"] for h in full], "o"),
        ]
        found.append(Shown("figure-cosine", plot(curves, {"": 0.0}, "cosine"), text))
        text = "Length of the gradient with the teacher over its length without. Near 1 the teacher hardly matters; above 1 both push the "
        text += "same way; if it stays far below 1 the teacher cancels what is learned: shorten --half-life or lower --gamma."
        curves = [
            Line("last layer", "both", x, column(lines, "last_shrink"), smooth=True),
            Line("whole network", "both", full_x, [h["gradient"]["shrink"] for h in full], "o"),
        ]
        found.append(Shown("figure-shrink", plot(curves, {"no teacher": 1.0}, "step with / without"), text))
    if measured:
        text = "What the teacher kept of itself in a step, measured on its weights, against what the recipe says. The thin line belongs "
        text += "inside the broad one: above it the teacher stands still, below it moves too often, for example once a micro-batch."
        expected = Line("expected", "teacher", column(measured, "step"), column(measured, "expected_momentum"), "band")
        kept = Line("measured", "ink", column(measured, "step"), column(measured, "measured_momentum"))
        found.append(Shown("figure-momentum", plot([expected, kept], ylabel="momentum a step", span=0.01), text))
    half_lives = column(lines, "half_life_steps")
    if steered and _any(half_lives):
        last = next(line for line in reversed(lines) if line.get("half_life_steps"))
        share = 100 * last["half_life_share"] / last["half_life_steps"]
        text = (
            "The teacher's memory over the run. Steered by --half-life auto, it grows while the teacher is ahead and shrinks while it is "
        )
        text += "behind, between 2 steps and a tenth of the run; otherwise it follows its schedule."
        svg = plot([Line("", "teacher", x, half_lives)], ylabel="half-life, steps", right=("% of the run", share))
        found.append(Shown("figure-half-life", svg, text))
    apart = [h for h in health if h.get("distance")]
    if apart:
        text = (
            "Distance of student and teacher in each block, as a share of its weights: it falls with the learning rate. A block far above "
        )
        text += "its neighbours still changes fast; one without a point does not learn."
        times = {h["step"]: h for h in (apart[0], apart[len(apart) // 2], apart[-1])}
        colours = SHADES[-len(times) :]
        groups = {f"step {step:,}": (c, h["distance"]) for c, (step, h) in zip(colours, times.items(), strict=True)}
        found.append(Shown("figure-distance", by_depth(groups, "distance", log=True), text))
    return found


def _how_far_it_is(lines: list[dict], health: list[dict]) -> list[Shown]:
    x, found = column(lines, "step"), []
    full = [h for h in health if h.get("gradient")]
    if _any(column(lines, "last_ratio")):
        text = "Length of the consistency gradient over that of the reconstruction gradient. Far below 1 the images lead, as they should; "
        text += "above 1 the teacher does: lower --gamma if the loss stands still."
        curves = [
            Line("last layer", "both", x, column(lines, "last_ratio"), smooth=True),
            Line("whole network", "both", column(full, "step"), [h["gradient"]["ratio"] for h in full], "o"),
        ]
        found.append(Shown("figure-ratio", plot(curves, {"equal": 1.0}, "gradient ratio", log=True), text))
    if full and full[-1].get("gradient_by_block"):
        text = (
            f"Cosine of both gradients by block, at step {full[-1]['step']:,}: which part of the network the teacher holds back (below 0)."
        )
        values = {block: v["cosine"] for block, v in full[-1]["gradient_by_block"].items()}
        found.append(Shown("figure-blocks", by_depth({"": ("both", values)}, "cosine", {"": 0.0}), text))
    gap = [v**0.5 if v is not None else None for v in column(lines, "consistency")]
    if _any(gap):
        text = "Gap in output: root mean square of student minus teacher on hidden patches. It follows the learning rate."
        found.append(Shown("figure-gap", plot([Line("", "both", x, gap)], ylabel="output gap", log=True), text))
    if _any(column(lines, "drift")):
        text = "Gap in weights: |student − teacher| / |student|. A sudden rise means a learning rate that is too high."
        found.append(Shown("figure-drift", plot([Line("", "both", x, column(lines, "drift"))], ylabel="weight gap", log=True), text))
    return found


MEASURES = {
    "rankme": ("RankMe: directions in use", "1"),
    "lidar": ("LiDAR: directions that tell images apart", "1"),
    "spread": ("spread of the features", "0"),
    "uniformity": ("uniformity on the sphere", "0"),
    "alpha_req": ("alpha-ReQ: fall of the spectrum", "far above 1"),
}
"A health number's name, and its value when all features have become the same."


def health_panel(health: list[dict]) -> dict[str, Any] | None:
    """Numbers on the representation that need no labels, first and now, and over time."""

    def line(key: str, colour: str = "student", name: str = "") -> Line:
        own = [h for h in health if h.get(key) is not None]
        return Line(name, colour, column(own, "step"), column(own, key))

    known = {key: values for key in MEASURES if (values := line(key).y)}
    if not known:
        return None
    main, more = [], []
    if "rankme" in known or "lidar" in known:
        text = (
            "How many directions the features use (RankMe), and how many tell images apart whatever is masked (LiDAR). Rising or level is "
        )
        text += "healthy; falling towards 1 is collapse: lower --base-lr or lengthen --warmup."
        curves = [line("rankme", "student", "RankMe"), line("lidar", "ink", "LiDAR")]
        main.append(Shown("figure-rank", plot(curves, {"collapse": 1.0}, "effective rank", markers=True), text))
    if "spread" in known:
        text = "How far the features of different images lie apart, over their length. At 0 every image looks the same to the network; "
        text += "then lower --base-lr or --gamma."
        main.append(Shown("figure-spread", plot([line("spread")], {"collapse": 0.0}, "spread", markers=True), text))
    if "uniformity" in known:
        text = "How evenly the features fill the sphere: lower is more even, 0 is collapse."
        more.append(Shown("figure-uniformity", plot([line("uniformity")], {"collapse": 0.0}, "uniformity", markers=True), text))
    if "alpha_req" in known:
        text = "How fast the directions fall in size. About 1 is said to be good; far above it few are left, far below it there is noise."
        more.append(Shown("figure-alpha", plot([line("alpha_req")], {"said to be good": 1.0}, "alpha-ReQ", markers=True), text))
    table = [
        (name, *(f"{v:.2f}".replace("-", "−") for v in (known[key][0], known[key][-1])), gone)
        for key, (name, gone) in MEASURES.items()
        if key in known
    ]
    return {"table": table, "figures": main, "more": more}


def _any(values: list[float | None]) -> bool:
    return any(v is not None for v in values)


def _number(value: float | None) -> str:
    return "never forgets" if value is None else f"{value:.3f}" if value < 1 else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "never" if value is None else f"{100 * value:.2f} %"

"""The command line: every failure is one line on stderr with its exit code, never a
traceback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rcmae.cli import _print_table, main
from rcmae.config import RuntimeConfig, flags, sections
from rcmae.methods import METHODS
from rcmae.methods.recipes import load_recipe, recipe_type
from tests import images as kinds
from tests.conftest import GOLDEN
from tests.mutations import catches

TINY = [
    "--size",
    "16",
    "--width",
    "24",
    "--depth",
    "1",
    "--heads",
    "2",
    "--decoder-width",
    "16",
    "--decoder-depth",
    "1",
]
TINY += ["--batch-size", "8", "--probes", "0", "--device", "cpu", "--steps", "2"]


def images(root: Path, count: int = 12) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return root


# argv, exit code, a part of the message; {tmp} is an empty folder
FAILURES = [
    (["pretrain", "--gama", "3"], 2, "Unknown option: --gama. Did you mean --gamma?"),
    (["pretrain", "--lr", "1"], 2, "Unknown option: --lr. Did you mean --base-lr or --min-lr?"),
    (["evaluate", "knn", "x", "--cache", "c"], 2, "Unknown option: --cache. Did you mean --feature-cache?"),
    (["export", "x"], 2, "parameter --to requires an argument"),
    (["plan", "x"], 2, "no command 'plan': `rcmae check DATA` plans a run"),
    (["embed", "x", "--data", "y"], 2, "--out"),
    (["embed", "x", "--data", "y", "--out", "{tmp}/z.csv"], 2, "give a name that ends in .parquet or .npz"),
    (
        ["embed", "{tmp}/x", "--data", "y", "--out", "{tmp}/z.npz", "--batch-size", "0"],
        2,
        "--batch-size must be",
    ),
    (["embed", "{tmp}/x", "--data", "y", "--out", "{tmp}/z.npz"], 4, "/x does not exist"),
    (["look", "x", "--out", "{tmp}/z"], 2, "no images given: rcmae look BACKBONE IMAGE..."),
    (["runs", "{tmp}/x"], 2, "there is no run ({tmp}/x: does not exist)"),
    (["train", "x"], 2, "no command 'train': use `rcmae pretrain`, `rcmae evaluate finetune` or"),
    (["finetune", "x"], 2, "no command 'finetune': use `rcmae evaluate finetune`"),
    (["knn", "x"], 2, "no command 'knn': use `rcmae evaluate knn`"),
    (["race"], 2, "no command 'race': use `rcmae compare race`"),
    (
        ["pretrain", "mae"],
        2,
        "no recipe 'mae', which is a method: give --method mae, or one of its recipes: mae-",
    ),
    (["pretrain", "folder"], 2, "no images to train on: give --data FOLDER"),
    (
        ["pretrain", "--momentum", "0.9"],
        2,
        "--momentum has no effect under schedule half-life: give --half-life",
    ),
    (
        ["pretrain", "rcmae-vits16-in1k", "--schedule=half-life", "--momentum=0.9"],
        2,
        "--momentum has no effect",
    ),
    (["pretrain", "--max-pixels", "0"], 2, "--max-pixels must be above 0, not 0"),
    (["pretrain", "--gamma", "x"], 2, '--gamma: unable to convert "x" into float'),
    (["pretrain", "foldr"], 2, "there is no recipe 'foldr'; did you mean folder?"),
    (["pretrain", "{tmp}/no.toml"], 2, "no.toml does not exist"),
    (["pretrain", "--seed", "1", "folder"], 2, "write the recipe first: rcmae pretrain folder"),
    (
        ["pretrain", "--seed", "-1", "--probe-train", "0"],
        2,
        "--seed must be 0 or more and below 2**63, not -1; --probe-train must be above 0, not 0",
    ),
    (
        ["pretrain", "--patch", "-4", "--registers", "-1"],
        2,
        "--registers must be 0 or more, not -1; --patch must be above 0, not -4",
    ),
    (
        ["pretrain", "dino-vits16-in1k", "--size", "64"],
        2,
        "error: --local-size 96 is larger than the image, 64",
    ),
    (
        ["pretrain", "dino-bundled", "--batch-size=1"],
        2,
        "dino compares images: give a --batch-size of 2 or more, not 1",
    ),
    (
        ["pretrain", "dino-bundled", "--half-life", "adaptive"],
        2,
        "error: --half-life adaptive needs a reconstruction",
    ),
    (
        ["pretrain", "--depth", "0", "--decoder-width", "0"],
        2,
        "error: --depth must be above 0, not 0; --decoder-width must be above 0",
    ),
    (
        ["pretrain", "{tmp}/wrong.toml"],
        2,
        "wrong.toml: unknown key optim.batch_sise; did you mean optim.batch_size?",
    ),
    (["compare", "cost", "--batch-size", "1"], 2, "--batch-size and --measured-batch must be 2 or more"),
    (
        ["compare", "race", "mae", "rcmae", "--probe-train", "0"],
        2,
        "error: --probe-train must be 1 or more, not 0",
    ),
    (
        ["compare", "race", "mae", "dino, local_crops=1, local_size=64"],
        2,
        "dino, local_crops=1, local_size=64: local_size 64 is larger",
    ),
    (
        ["evaluate", "finetune", "x", "--settings", "steps=2", "--accumulate", "0"],
        2,
        "error: --accumulate must be above 0",
    ),
    (
        ["evaluate", "finetune", "x", "--recipe", "folder", "--settings", "steps=2"],
        2,
        "error: warmup_epochs 5 is not below the length of the run, 2 steps",
    ),
    (["evaluate", "finetune", "x", "--recipe", "x.toml"], 2, "error: recipe file x.toml does not exist"),
    (["pretrain", "--half-life", "1.2.3%"], 2, "'1.2.3%' is not a half-life"),
    (
        ["pretrain", "--schedule", "cosine", "--half-life", "5%"],
        2,
        "--half-life has no effect under schedule cosine: leave it out, or set the schedule to half-life",
    ),
    (
        ["pretrain", "rcmae-vits16-in1k", "--half-life", "5%"],
        2,
        "--half-life has no effect under schedule constant",
    ),
    (["pretrain", "--schedule", "cosine", "--data", "{tmp}/nowhere"], 3, "{tmp}/nowhere does not exist"),
    (["pretrain", "{tmp}/latin.toml"], 2, "latin.toml is not UTF-8 text"),
    (
        ["pretrain", "--mask-ratio", "1.0", "--warmup", "2"],
        2,
        "not 2.0; --mask-ratio must lie between 0 and 1, not 1.0",
    ),
    (
        ["pretrain", "mae-vits16-in1k", "--gamma", "3"],
        2,
        "--gamma is a setting of rcmae; this run's method is mae",
    ),
    (
        ["pretrain", "folder", "--method", "mae", "--half-life=5%"],
        2,
        "--half-life is a setting of rcmae, dino",
    ),
    (
        ["pretrain", "dino-bundled", "--decoder-depth", "2"],
        2,
        "--decoder-depth is a setting of mae and rcmae; this run's method is dino",
    ),
    (
        ["pretrain", "--method", "data2vec", "--decoder-width=8"],
        2,
        "--decoder-width is a setting of mae and rcmae",
    ),
    (
        ["pretrain", "--no-sinkhorn"],
        2,
        "--no-sinkhorn is a setting of dino, ibot and msn; this run's method is rcmae",
    ),
    (
        ["pretrain", "mocov3-bundled", "--local-crops", "0"],
        2,
        "--local-crops is a setting of dino, ibot and msn; this run's method is mocov3",
    ),
    (["pretrain", "folder", "--method", "mae", "--data", "{tmp}/nowhere"], 3, "{tmp}/nowhere does not exist"),
    (
        ["pretrain", "--method=rcmea"],
        2,
        f"--method must be one of {', '.join(METHODS)}, not 'rcmea'; did you mean rcmae?",
    ),
    (["verify", "rcmea"], 2, "not 'rcmea'; did you mean rcmae?"),
    (
        ["compare", "cost", "--methods", "mae", "rcmea"],
        2,
        f"--methods must be one of {', '.join(METHODS)}, not 'rcmea'",
    ),
    (
        ["pretrain", "--size", "30", "--out", "{tmp}/run"],
        2,
        "error: --size 30 x 30 is not a multiple of the patch, 4",
    ),
    (["pretrain", "--model", "vit_bas"], 2, "unknown model 'vit_bas'"),
    (["pretrain", "--device", "tpu"], 2, "'tpu' is not a valid device"),
    (["pretrain", "--device", "cuda:7"], 2, "cuda:7 is"),
    (["pretrain", "--save-every", "often", "--out", "{tmp}/run"], 2, "'often' is not a duration"),
    (["pretrain", "--time", "5"], 2, "'5' has no unit; write 5s, 5m, 5h or 5d"),
    (["pretrain", "--save-every", "60"], 2, "'60' has no unit; write 60s, 60m, 60h or 60d"),
    (["compare", "race", "mae", "dino", "--budget", "5"], 2, "'5' is no budget"),
    (["pretrain", "--accumulate", "0", "--out", "{tmp}/run"], 2, "accumulate"),
    (["pretrain", "--accumulate", "3", "--out", "{tmp}/run"], 2, "128"),
    (["pretrain", "--data", "{tmp}/nowhere", "--out", "{tmp}/run"], 3, "nowhere"),
    (["pretrain", "--data", "{tmp}", "--out", "{tmp}/run"], 3, "{tmp}"),
    (["pretrain", "--data", "bundled:digit", "--out", "{tmp}/run"], 2, "bundled:digits"),
    (["pretrain", "--out", "/proc/run"], 6, "/proc/run"),
    (["pretrain", "--out", ""], 2, "--out is empty"),
    (["pretrain", "--out="], 2, "--out is empty"),
    (["pretrain", "--out", "{tmp}/begun"], 2, "begun/recipe.toml is not UTF-8 text"),
    (["pretrain", "--batch-size", "1.5"], 2, "--batch-size: '1.5' is not an integer"),
    (["pretrain", "--workers", "2x"], 2, "--workers: '2x' is not an integer"),
    (["lab", "linear", "--seeds", "1.5"], 2, "--seeds: '1.5' is not an integer"),
    (
        ["lab", "linear", "--seeds", "1", "--out", "{tmp}/latin.toml"],
        2,
        "latin.toml is a file; name a folder",
    ),
    (["pretrian"], 2, 'Did you mean "pretrain"?'),
    (["check"], 2, "requires an argument"),
    (["check", "{tmp}/nowhere"], 3, "nowhere"),
    (["check", "{tmp}", "--json", "{tmp}/no/x.json"], 2, "there is no folder {tmp}/no"),
    (["check", "{tmp}", "--json", "{tmp}"], 2, "--json {tmp} is a folder"),
    (["check", "{tmp}", "--batch-size", "0"], 2, "--batch-size must be above 0, not 0"),
    (["check", "{tmp}", "--channels", "0"], 2, "--channels must be above 0, not 0"),
    (["pretrain", "--min-lr", "nan"], 2, "--min-lr must be a finite number, not nan"),
    (["pretrain", "--epochs", "inf"], 2, "--epochs must be a finite number, not inf"),
    (
        ["pretrain", "--min-lr", "-1", "--seed", "99999999999999999999"],
        2,
        "below 2**63, not 99999999999999999999; --min-lr must be 0 or more",
    ),
    (
        ["lab", "gradients", "bundled", "--lr", "0", "--settle", "-1"],
        2,
        "--lr must be above 0, not 0.0; --settle must be 0 or more, not -1",
    ),
    (["lab", "gradients", "bundled", "--batch-size", "0"], 2, "a batch needs 2 images or more, not 0"),
    (["verify", "rcmae", "--steps", "2000"], 2, "from 2 to 1,000 steps, not 2000"),
    (
        ["check", "{tmp}", "--max-corrupt-fraction", "2"],
        2,
        "--max-corrupt-fraction must lie in 0 to 1, not 2.0",
    ),
    (["verify", "rcmae", "--json", "{tmp}"], 2, "--json {tmp} is a folder"),
    (["report", "{tmp}"], 2, "is no run directory: recipe.toml is missing"),
    (["import", "{tmp}/no.pth"], 4, "no.pth does not exist"),
    (
        ["import", "{golden}/mae_official_layout.pth", "--out", "{tmp}/x"],
        4,
        "give --heads and --decoder-heads",
    ),
    (
        ["import", "{golden}/mae_official_layout.pth", "--out", "{tmp}/x", "--heads", "3"],
        2,
        "--heads and --decoder-heads together",
    ),
    (
        [
            "import",
            "{golden}/mae_official_layout.pth",
            "--out",
            "{tmp}",
            "--heads",
            "3",
            "--decoder-heads",
            "2",
        ],
        2,
        "exists already",
    ),
    (["import", "{golden}/steps.json"], 4, "steps.json"),
]


@catches("what is elsewhere is not named", "rcmae.cli:_usage", lambda old: lambda e: " ".join(str(e).split()))
@catches(
    "errors name settings as in recipes, not as flags",
    "rcmae.cli:_as_typed",
    lambda old: lambda text, argv: text,
)
@pytest.mark.parametrize(
    ("argv", "code", "message"), FAILURES, ids=lambda x: " ".join(x) if isinstance(x, list) else None
)
def test_every_failure_is_reported_in_one_line_with_its_exit_code(
    tmp_path, capsys, monkeypatch, argv, code, message
):
    monkeypatch.chdir(tmp_path)
    folders = {"tmp": str(tmp_path), "golden": str(GOLDEN)}
    for name in ("latin.toml", "begun/recipe.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"# \xe9t\xe9\n")
    (tmp_path / "wrong.toml").write_text("[optim]\nbatch_sise = 1\n")
    (tmp_path / "begun" / "checkpoints" / "step_00000000").mkdir(parents=True)
    assert main([a.format(**folders) for a in argv]) == code
    err = capsys.readouterr().err
    assert err.startswith("rcmae: error: ")
    assert err.count("\n") == 1
    assert message.format(**folders) in err
    assert "Traceback" not in err
    assert not (tmp_path / "rcmae-error.log").exists()
    assert not [path for path in ("run", "runs") if (tmp_path / path).exists()], "nothing is left behind"


def test_pretrain_resume_and_report(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path / "data")
    command = ["pretrain", "--data", str(data), *TINY]
    assert main(command) == 0
    run = tmp_path / "runs" / "rcmae-data"
    assert "new run in" in capsys.readouterr().out
    assert main(command) == 0
    assert "is finished at step 2" in capsys.readouterr().out
    assert main(["pretrain", "--out", str(run)]) == 0, "without another recipe, the one of the run is used"
    assert main(["pretrain", "--out", str(run), "--base-lr", "1"]) == 2
    assert "was started with --base-lr 0.006 (now 1.0);" in capsys.readouterr().err, (
        "flags override the recipe of the run"
    )
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()


def test_options_change_only_what_they_name_in_a_run(tmp_path, capsys):
    data, run = images(tmp_path / "data"), tmp_path / "run"
    assert main(["pretrain", "--data", str(data), "--out", str(run), *TINY]) == 0
    moved = data.rename(tmp_path / "moved")
    assert main(["pretrain", "--out", str(run)]) == 3
    assert f"{data} does not exist" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(run), "--data", str(moved)]) == 0
    assert load_recipe(str(run / "recipe.toml")).data == str(moved)
    assert main(["pretrain", "--out", str(run), "--steps", "4", "--device", "cpu"]) == 0
    assert "extended from 2 to 4 steps" in capsys.readouterr().out
    assert load_recipe(str(run / "recipe.toml")).network.width == 24
    assert main(["pretrain", "--out", str(run), "--steps", "3"]) == 2
    assert "has made 4 steps already, more than --steps 3" in capsys.readouterr().err
    assert main(["pretrain", "--out", str(run)]) == 0
    assert "is finished at step 4" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["pretrian"]])
def test_output_that_nobody_reads_ends_a_command_quietly(argv):
    """As other programs do that receive SIGPIPE; an error is still reported."""
    code = f"import sys; from rcmae.cli import main; sys.exit(main({argv}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        err = process.stderr.read()
    if argv == ["pretrian"]:
        assert (process.returncode, err.count("\n")) == (2, 1)
    else:
        assert (process.returncode, err) == (141, "")


def test_other_pipes_and_exits_are_not_taken_for_a_closed_output(monkeypatch, capsys):
    """Such as the pipe of a loader process, and the exit of a library."""
    errors = iter([BrokenPipeError(32, "Broken pipe"), SystemExit(3)])

    def fails(*args):
        raise next(errors)

    monkeypatch.setattr("rcmae.cli._print_table", fails)
    assert main(["list"]) == 6
    assert "Broken pipe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["list"])


@catches("brackets are markup", "rcmae.cli:_console", lambda old: Console)
def test_names_with_brackets_are_printed_as_they_are(capsys):
    _print_table("photos [x]", ["name [y]"], [["cat [z]"]])
    printed = capsys.readouterr().out
    assert all(f"[{letter}]" in printed for letter in "xyz")


def test_a_folder_with_every_kind_of_image(tmp_path, capsys):
    """The command succeeds, and names each bad file once."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "tests.images", str(tmp_path / "data")],
        capture_output=True,
        check=False,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    assert (
        main(
            [
                "pretrain",
                "--data",
                str(tmp_path / "data"),
                "--out",
                str(tmp_path / "run"),
                *TINY[:-1],
                "20",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    names = [
        Path(json.loads(line)["where"]).name
        for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()
    ]
    assert sorted(names) == sorted(kinds.bad())
    assert f"{40 + len(kinds.odd()) + len(names)} images" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "data")]) == 3, "fewer images than the batch of the recipe folder"
    assert main(["check", str(tmp_path / "data"), "--batch-size", "16"]) == 0
    assert f"{len(names)} unreadable" in capsys.readouterr().out
    assert len(names) == 10
    (tmp_path / "data" / "eleventh.png").write_bytes(
        b"no"
    )  # one more than the default --max-corrupt-fraction allows
    assert main(["check", str(tmp_path / "data"), "--batch-size", "16"]) == 3
    assert main(["check", str(tmp_path / "data"), "--batch-size", "16", "--max-corrupt-fraction", "0.5"]) == 0


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_folder_of_only_unreadable_images_is_reported_in_one_line(tmp_path, capsys, workers):
    (tmp_path / "data").mkdir()
    for i in range(12):
        (tmp_path / "data" / f"{i}.png").write_bytes(b"no")
    argv = [
        "pretrain",
        "--data",
        str(tmp_path / "data"),
        "--out",
        str(tmp_path / "run"),
        *TINY,
        "--workers",
        workers,
    ]
    assert main(argv) == 3
    err = capsys.readouterr().err
    assert err.startswith("rcmae: error: ")
    assert "cannot be read (not an image), nor can 20 others" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_a_training_length_on_the_command_line_replaces_the_one_of_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = images(tmp_path / "data")
    assert main(["pretrain", "--data", str(data), *TINY[:-2], "--epochs", "2"]) == 0
    assert json.loads((tmp_path / "runs/rcmae-data/machine.json").read_text())["steps"] == 2


def test_messages_use_the_singular_for_one(tmp_path, capsys):
    data, options = images(tmp_path / "data", 1), [*TINY[:-1], "1", "--no-monitor"]
    options[options.index("--batch-size") + 1] = "1"
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), *TINY]) == 3
    assert "holds 1 image, fewer than the batch of 8" in capsys.readouterr().err
    assert main(["pretrain", "--data", str(data), "--out", str(tmp_path / "run"), *options]) == 0
    main(["check", str(data)])
    out = capsys.readouterr().out
    assert all(
        text in out for text in ("1 image of", "1 step (1.0 epochs)", "for 1 step. Open", "read 1 image")
    )
    assert not re.search(r"\b1 (?:images|steps|files|classes)\b", out)


def test_import_and_list_and_help(tmp_path, capsys):
    file = str(GOLDEN / "rcmae_official_layout.pth")
    assert main(["import", file, "--out", str(tmp_path / "x"), "--heads", "3", "--decoder-heads", "2"]) == 0
    assert "RC-MAE (student and teacher)" in capsys.readouterr().out
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("rcmae-vitb16-in1k", "folder", "bundled", "vit_huge_patch14", "mae"))
    for command in ([], ["pretrain"], ["check"], ["report"], ["import"], ["list"]):
        assert main([*command, "--help"]) == 0
    assert "--gamma" in capsys.readouterr().out
    assert main(["evaluate", "worth-it", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--percents", "--seeds", "--data"))
    assert not re.search(r"--(labels|seed)\b", out), "unsupported options are not listed"


@pytest.mark.parametrize("argv", [[], ["check"], ["verify"], ["evaluate", "finetune"]])
def test_help_is_quick_and_does_not_import_torch(argv):
    """Except that of `pretrain`, which depends on the method."""
    code = (
        f"import sys; from rcmae.cli import main; main({[*argv, '--help']}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        ([], "rcmae"),
        (["dino-vits16-in1k"], "dino"),
        (["folder", "--method", "mae"], "mae"),
        (["--out", "{tmp}"], "ibot"),
    ],
)
def test_help_of_pretrain_shows_only_the_settings_of_its_method(tmp_path, capsys, monkeypatch, argv, method):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "recipe.toml").write_text('method = "ibot"')
    (tmp_path / "checkpoints" / "step_00000000").mkdir(parents=True)
    assert main(["pretrain", *(a.format(tmp=tmp_path) for a in argv), "--help"]) == 0
    out = capsys.readouterr().out
    shown = set(re.findall(r"^│ --([a-z-]+)", out, re.MULTILINE))
    assert shown == {name.replace("_", "-") for name in flags(recipe_type(method)) | flags(RuntimeConfig)}
    titles = re.findall(r"─ (\w+) ─", out)
    assert titles == ["Arguments", "Recipe", *sections(recipe_type(method)), "Runtime"]


@pytest.mark.parametrize(
    ("argv", "values"),
    [
        ([], {"steps": "1400", "depth": "3", "decoder-depth": "1", "crop-scale": "1 1", "flip": "off"}),
        (
            ["dino-bundled"],
            {
                "steps": "700",
                "batch-size": "128",
                "clip": "3",
                "teacher-temperature": "0.03",
                "local-blur": "0",
            },
        ),
        (["{tmp}/mine.toml"], {"method": "mae", "size": "96", "crop-scale": "0.2 1", "flip": "on"}),
        (["--out", "{tmp}/run"], {"method": "ibot", "seed": "7"}),
    ],
)
def test_help_of_pretrain_shows_the_values_of_its_recipe(tmp_path, capsys, monkeypatch, argv, values):
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "mine.toml").write_text('method = "mae"\n[images]\nsize = 96')
    (tmp_path / "run" / "checkpoints" / "step_00000000").mkdir(parents=True)
    (tmp_path / "run" / "recipe.toml").write_text('method = "ibot"\nseed = 7')
    argv = [a.format(tmp=tmp_path) for a in argv]
    for order in ([*argv, "--help"], ["--help", *argv]):
        assert main(["pretrain", *order]) == 0
        out = capsys.readouterr().out
        shown = dict(re.findall(r"^│ --([a-z-]+) .*\[default: (.*?)\]", out, re.MULTILINE))
        assert {name: shown.get(name) for name in values} == values
        assert "height" not in shown, "settings without a value in the recipe have no default"


def test_python_dash_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rcmae", "report", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    *progress, error = done.stderr.splitlines()  # on a slow machine, a line on loading PyTorch
    assert error.startswith("rcmae: error: ") and all(line.startswith("loading") for line in progress)


def test_an_unexpected_error_writes_its_traceback_to_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rcmae.report.write_report", lambda run: 1 / 0)
    (tmp_path / "recipe.toml").write_text("")
    assert main(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err == "rcmae: error: unexpected ZeroDivisionError: division by zero; see rcmae-error.log\n"
    assert "Traceback" in Path("rcmae-error.log").read_text()


def test_errors_of_the_operating_system_are_reported_in_one_line(tmp_path, capsys, monkeypatch):
    """For any error of the operating system that no command handles itself."""

    def refuse(run):
        raise PermissionError(13, "Permission denied", str(run / "report.html"))

    monkeypatch.setattr("rcmae.report.write_report", refuse)
    (tmp_path / "recipe.toml").write_text("")
    assert main(["report", str(tmp_path)]) == 6
    assert (
        capsys.readouterr().err == f"rcmae: error: {tmp_path}/report.html cannot be used: Permission denied\n"
    )


def test_sigterm_saves_and_stops_a_run(tmp_path):
    """SIGTERM to a real process: it saves at the end of a step, prints one line, and exits with 75."""
    import signal

    data = images(tmp_path / "data")
    command = [
        sys.executable,
        "-m",
        "rcmae",
        "pretrain",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        *TINY[:-1],
        "100000",
    ]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        for text in process.stdout:
            if "steps (" in text:
                process.send_signal(signal.SIGTERM)
                break
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    received, stopped = err.splitlines()[
        -2:
    ]  # in a new environment, matplotlib says first that it makes its font cache
    assert received == "rcmae: SIGTERM received: stopping; a second one ends this at once"
    assert stopped.startswith("rcmae: stopped: by SIGTERM; saved at step ")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["pretrain", "small", "pictures"], "'pictures' belongs to no option; give --data pictures"),
        (["evaluate", "knn", "runs/mine", "my pictures"], "give --data 'my pictures'"),
        (["report", "runs/mine", "another"], "'another' belongs to no option"),
        (["pretrain", "PICTURES"], "is a folder, not a recipe (`rcmae list` shows all); give one"),
        (["pretrain", "RUN"], "alone continues this run"),
    ],
)
def test_images_and_runs_in_the_wrong_place_are_recognized(argv, text, tmp_path, capsys):
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "recipe.toml").write_text("")
    (tmp_path / "PICTURES").mkdir()
    assert main([str(tmp_path / word) if word.isupper() else word for word in argv]) == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_a_run_name_that_does_not_exist_is_a_new_run_which_says_so(tmp_path, monkeypatch, capsys):
    begun = []
    monkeypatch.setattr("rcmae.pretraining.pretrain", lambda recipe, runtime: begun.append(runtime.out))
    for argv in (["--out", str(tmp_path / "mistyped")], ["bundled", "--out", str(tmp_path / "meant")]):
        assert main(["pretrain", *argv]) == 0
    assert len(begun) == 2
    assert capsys.readouterr().out.count("and no recipe: this is a new run of the recipe bundled") == 1

"""`python -m benchmarks.paper`: its commands are those of this version, and its small forms can be run."""

import shlex

import pytest

from benchmarks.paper.experiments import EXPERIMENTS
from rcmae import cli
from rcmae.compare.race import arms
from rcmae.config import shipped_recipes

COMMANDS = sorted(
    {command for e in EXPERIMENTS.values() for row in e.rows for command in row.command.split(" && ")}
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_valid(command):
    argv = shlex.split(command)
    argv = argv[argv.index("rcmae") + 1 :]
    cli.app.config = cli._prepare_pretrain(argv) if argv[0] == "pretrain" else ()
    cli.app.parse_args(argv, exit_on_error=False, print_error=False)
    if "--recipe" in argv:
        kind = "finetune" if argv[1] == "finetune" else "detection"
        assert argv[argv.index("--recipe") + 1] in shipped_recipes(kind)


@pytest.mark.parametrize("name", [name for name, e in EXPERIMENTS.items() if e.races])
def test_the_arms_of_a_small_form_are_valid(name):
    for race in EXPERIMENTS[name].races:
        assert len(arms(race.arms)) == len(race.arms)

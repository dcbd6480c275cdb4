"""Recipes: strict, hashed, and unchanged by writing and reading."""

import ast
import dataclasses
import inspect
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmae.config import (
    Images,
    Optim,
    Recipe,
    RuntimeConfig,
    changed,
    check,
    flags,
    flat,
    how_many,
    parse_half_life,
    parse_time,
    recipe_hash,
    replaced,
    sections,
    shipped_recipes,
    to_toml,
)
from rcmae.data.augment import Crops, LocalCrops
from rcmae.errors import ConfigError
from rcmae.methods import METHODS
from rcmae.methods.dino import DINORecipe
from rcmae.methods.recipes import digits_recipe, load_recipe, parse_recipe, recipe_type, with_method
from tests.mutations import catches


@given(
    st.builds(
        lambda method, **settings: recipe_type(method)(**settings),
        st.sampled_from(list(METHODS)),
        data=st.text(max_size=20),
        seed=st.integers(0, 2**40),
        epochs=st.none() | st.floats(0.1, 1e6),
        images=st.builds(
            Images,
            size=st.integers(1, 999),
            flip=st.booleans(),
            crop_scale=st.sampled_from([(0.2, 1.0), (1.0, 1.0)]),
        ),
        optim=st.builds(Optim, base_lr=st.floats(1e-9, 1e3), clip=st.none() | st.floats(0.1, 9)),
    )
)
def test_toml_round_trip(recipe):
    assert parse_recipe(to_toml(recipe), "x.toml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_read_and_say_how_to_run_them(name):
    recipe = load_recipe(name)
    assert parse_recipe(to_toml(recipe), "x") == recipe
    head = [line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert "rcmae pretrain" in head[1]
    assert any(word in "".join(head) for word in ("Duration", "minutes"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama = 1", "my.toml: unknown key gama$"),
        ("[rcmae]\ngama = 1.0", "my.toml: unknown key rcmae.gama; did you mean rcmae.gamma?"),
        ("[rcmea]\ngamma = 1.0", "unknown key rcmea; did you mean rcmae?"),
        ("[mae]\nmask_ratio = 'x'", "my.toml: mae.mask_ratio must be of type float, not 'x'"),
        ("method = 'rcmea'", f"method must be one of {', '.join(METHODS)}, not 'rcmea'; did you mean rcmae?"),
        ("seed = 1.5", "seed must be of type int"),
        ("seed = true", "seed must be of type int"),
        ("[images]\ncrop_scale = [1.0]", "must be a list of 2 values"),
        ("images = 3", r"images is a section: write \[images\]"),
        ("seed = ", "my.toml is not valid TOML"),
        (
            "[mae]\nmask_ratio = 1.0\n[optim]\nwarmup = 1.0",
            "warmup is a fraction .*, not 1.0; mask_ratio must lie between 0 and 1, not 1.0",
        ),
        ("epochs = 3\nsteps = 4", "give one of epochs, steps and time, not epochs and steps"),
        ("time = '10 parsecs'", "'10 parsecs' is not a duration"),
        ("[teacher]\nhalf_life = 'long'", "'long' is not a half-life"),
        ("[optim]\nbase_lr = nan", "base_lr must be of type float, not nan"),
        ("[teacher]\nmomentum = 1.5", "momentum must lie in 0 to 1"),
        (
            "[teacher]\nschedule = 'cosine'\nhalf_life = '0.5%'",
            "^half_life has no effect under schedule cosine: leave it out, or set the schedule to half-life$",
        ),
        (
            "method = 'mae'\n[rcmae]\ngamma = 1.0",
            r"my.toml: \[rcmae\] is a section of rcmae; this recipe's method is mae",
        ),
        (
            "[crops]\ngray = 0.1",
            r"\[crops\] is a section of dino, ibot, msn and mocov3; this recipe's method is rcmae",
        ),
        (
            "method = 'dino'\n[dino]\nprototypes = 1\n[head]\nembedding = 1",
            "embedding must be 2 or more, not 1; prototypes must be 2",
        ),
        (
            "method = 'dino'\n[network]\ndecoder_depth = 1",
            "my.toml: network.decoder_depth is a setting of mae and rcmae; this recipe's method is dino",
        ),
        ("[distill]\nprototypes = 2", "my.toml: unknown key distill"),
        ("method = ['mae']", r"method must be one of .*, not \['mae'\]"),
    ],
)
def test_an_invalid_recipe_is_reported_in_one_line_with_its_name(text, message):
    with pytest.raises(ConfigError, match=message) as e:
        parse_recipe(text, "my.toml")
    assert "\n" not in str(e.value) or "TOML" in str(e.value)


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bundled").write_text("no recipe at all")
    assert load_recipe("folder").network.model == "vit_small_patch16", (
        "a folder of images of that name is no recipe"
    )
    assert load_recipe("bundled").data == "bundled:digits"
    with pytest.raises(ConfigError, match="no recipe 'bundeld'; did you mean bundled?"):
        load_recipe("bundeld")
    with pytest.raises(ConfigError, match="recipe file nowhere.toml does not exist"):
        load_recipe("nowhere.toml")


def test_the_hash_does_not_depend_on_where_the_data_is():
    one = recipe_type("rcmae")()
    assert recipe_hash(one) == recipe_hash(dataclasses.replace(one, data="elsewhere"))
    assert recipe_hash(one) != recipe_hash(dataclasses.replace(one, seed=1))
    assert recipe_hash(one) != recipe_hash(changed(one, init="weights.pth"))


def test_a_new_setting_leaves_the_hash_of_older_runs_alone():
    """A run is only resumed with the same hash: a setting that is added goes into `LATER`."""
    assert recipe_hash(recipe_type("rcmae")()) == "6bd4777b573f"


@pytest.mark.parametrize("method", METHODS)
def test_no_flag_has_two_meanings(method):
    cls = recipe_type(method)
    names = [f.name for part in (*sections(cls).values(), RuntimeConfig) for f in dataclasses.fields(part)]
    names += [f.name for f in dataclasses.fields(cls) if f.name not in sections(cls)]
    assert len(names) == len(set(names))
    assert set(flat(cls())) <= set(flags(cls)) <= set(names)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_has_its_help_and_every_section_its_title(method):
    """A field's help is the string below it: as many strings as fields."""
    for cls in (recipe_type(method), RuntimeConfig, *sections(recipe_type(method)).values()):
        assert not cls.__doc__.startswith(cls.__name__), "the docstring that dataclasses generate"
        for part in filter(dataclasses.is_dataclass, cls.__mro__):
            fields = (
                {"method", *sections(part)} if part is not Recipe else sections(part)
            )  # explained by their sections or methods
            for node, below in itertools.pairwise(ast.parse(inspect.getsource(part)).body[0].body):
                if isinstance(node, ast.AnnAssign) and node.target.id not in fields:
                    assert isinstance(below, ast.Expr), f"{part.__name__}.{node.target.id}"


@pytest.mark.parametrize("name", METHODS)
def test_changing_the_method_keeps_shared_settings(name):
    """The recipe of another method keeps the common settings, takes over the shared ones, and can be written
    and read."""
    recipe = changed(load_recipe("folder"), half_life="7%", size=96)
    other = check(with_method(recipe, name))
    assert (other.method, type(other)) == (name, recipe_type(name))
    assert (other.images, other.optim) == (recipe.images, recipe.optim)
    assert {k: v for k, v in flat(recipe.network).items() if k in flags(type(other))} == flat(other.network)
    assert not hasattr(other, "teacher") or other.teacher == recipe.teacher
    assert parse_recipe(to_toml(other), "x") == other
    assert with_method(other, "rcmae").network == recipe.network
    assert METHODS[name].validate(digits_recipe(name)) == []
    assert digits_recipe(name).data == "bundled:digits"


@pytest.mark.parametrize("name", [name for name in METHODS if "half_life" in flags(recipe_type(name))])
def test_a_half_life_does_not_carry_over_to_another_schedule(name):
    """The half-life of a recipe is dropped with its schedule; one given together with another schedule is
    rejected."""
    recipe = changed(load_recipe("dino-bundled" if name == "dino" else "bundled"), half_life="7%")
    recipe = with_method(recipe, name)
    for other in (changed(recipe, schedule="cosine"), check(replaced(recipe, ["schedule=cosine"], "x"))):
        assert check(other).teacher == dataclasses.replace(recipe.teacher, schedule="cosine", half_life=None)
    same = check(replaced(recipe, ["schedule=half-life"], "x"))
    assert changed(recipe, schedule="half-life") == same == recipe
    with pytest.raises(ConfigError, match="half_life has no effect under schedule linear"):
        check(replaced(recipe, ["schedule=linear", "half_life=5%"], "x"))
    assert recipe_type(name)().teacher.memory == (0.5, "%")


def test_a_new_training_length_replaces_the_previous_one():
    recipe = dataclasses.replace(load_recipe("bundled"), epochs=4.0, steps=None)
    for other in (changed(recipe, time="5m"), check(replaced(recipe, ["time=5m"], "x"))):
        assert (check(other).time, other.epochs) == ("5m", None)


def test_a_section_keeps_the_values_that_its_method_gives_it():
    """Other values of the same section in a file do not change that."""
    recipe = parse_recipe("method = 'data2vec'\n[teacher]\nmomentum = 0.5", "x")
    assert (recipe.teacher.schedule, recipe.teacher.momentum) == ("linear", 0.5)


@catches("mocov3 has local crops", "rcmae.methods.mocov3:MoCoV3.recipe_type", lambda old: DINORecipe)
def test_settings_of_local_crops_are_those_of_methods_that_have_them():
    with pytest.raises(ConfigError, match=r"crops.local_size is a setting of dino, ibot and msn; this"):
        parse_recipe("method = 'mocov3'\n[crops]\nlocal_size = 16", "x")
    recipe = changed(load_recipe("dino-bundled"), local_crops=2, gray=0.1)
    without = with_method(recipe, "mocov3").crops
    assert without == Crops(jitter=recipe.crops.jitter, gray=0.1, blur=(0.0, 0.0), solarize=0.0)
    assert with_method(with_method(recipe, "mocov3"), "dino").crops == LocalCrops(**vars(without))


def test_units():
    assert [parse_time(t) for t in ("90s", "10m", "1.5h", "2d")] == [90, 600, 5400, 172800]
    assert parse_half_life("1.5%") == (1.5, "%")
    assert parse_half_life("1 step") == (1, "steps")
    assert parse_half_life("2e6 images") == (2e6, "images")


@pytest.mark.parametrize("text", ["5", " 5 ", "0.5", "2e3"])
def test_a_time_without_a_unit_is_refused(text):
    number = text.strip()
    with pytest.raises(
        ConfigError, match=f"'{text}' has no unit; write {number}s, {number}m, {number}h or {number}d"
    ):
        parse_time(text)
    for zero in ("0", "0s", "-5s"):
        with pytest.raises(ConfigError, match="is not a duration; write 90s"):
            parse_time(zero)


def test_impossible_values_are_reported_together():
    with pytest.raises(ConfigError, match=r"size must be above 0.*batch_size must be above 0"):
        check(recipe_type("mae")(images=Images(size=0), optim=Optim(batch_size=0)))
    with pytest.raises(ConfigError, match="method must be mae in a MAERecipe, not rcmae"):
        check(changed(recipe_type("mae")(), method="rcmae"))


def test_counts_are_spelled_in_singular_and_plural():
    assert [how_many(n, "image") for n in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [how_many(2, what) for what in ("class", "batch", "test image")] == [
        "2 classes",
        "2 batches",
        "2 test images",
    ]

"""Recipes: strict, hashed, and the same in both directions."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcmae.config import (
    Images,
    Machine,
    Optim,
    Recipe,
    check,
    flat,
    load_recipe,
    parse_half_life,
    parse_recipe,
    parse_time,
    recipe_hash,
    sections,
    shipped_recipes,
    to_toml,
)  # fmt: skip
from rcmae.errors import ConfigError


@given(
    st.builds(
        Recipe, data=st.text(max_size=20), seed=st.integers(0, 2**40), epochs=st.none() | st.floats(0.1, 1e6),
        images=st.builds(Images, size=st.integers(1, 999), flip=st.booleans(), crop_scale=st.sampled_from([(0.2, 1.0), (1.0, 1.0)])),
        optim=st.builds(Optim, base_lr=st.floats(1e-9, 1e3), clip=st.none() | st.floats(0.1, 9)),
    )
)  # fmt: skip
def test_toml_both_ways(recipe):
    assert parse_recipe(to_toml(recipe), "x.toml") == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_read_and_say_how_to_run_them(name):
    recipe = load_recipe(name)
    assert parse_recipe(to_toml(recipe), "x") == recipe
    head = [line for line in shipped_recipes()[name].read_text().splitlines() if line.startswith("#")]
    assert "rcmae pretrain" in head[1]
    assert any(word in "".join(head) for word in ("Hours", "minutes"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gama = 1", "my.toml: unknown key gama$"),
        ("[rcmae]\ngama = 1.0", "my.toml: unknown key rcmae.gama; did you mean rcmae.gamma?"),
        ("[rcmea]\ngamma = 1.0", "unknown key rcmea; did you mean rcmae?"),
        ("[mae]\nmask_ratio = 'x'", "my.toml: mae.mask_ratio must be of type float, not 'x'"),
        ("method = 'rcmea'", "method must be one of mae, rcmae, dino, ibot, msn, mocov3, not 'rcmea'; did you mean rcmae?"),
        ("seed = 1.5", "seed must be of type int"),
        ("seed = true", "seed must be of type int"),
        ("[images]\ncrop_scale = [1.0]", "must be a list of 2 values"),
        ("images = 3", r"images is a section: write \[images\]"),
        ("seed = ", "my.toml is not TOML"),
        ("[mae]\nmask_ratio = 1.0\n[optim]\nwarmup = 1.0", "mask_ratio must lie between 0 and 1, not 1.0; warmup is a share"),
        ("epochs = 3\nsteps = 4", "give one of epochs, steps and time, not epochs and steps"),
        ("time = '10 parsecs'", "'10 parsecs' is no length of time"),
        ("[teacher]\nhalf_life = 'long'", "'long' is no half-life"),
        ("[optim]\nbase_lr = nan", "base_lr must be of type float, not nan"),
        ("[teacher]\nmomentum = 1.5", "momentum must lie in 0 to 1"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_it(text, message):
    with pytest.raises(ConfigError, match=message) as e:
        parse_recipe(text, "my.toml")
    assert "\n" not in str(e.value) or "TOML" in str(e.value)


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "embedded").write_text("no recipe at all")
    assert load_recipe("folder").data, "a folder of images of that name is no recipe"
    assert load_recipe("embedded").data == "embedded:digits"
    with pytest.raises(ConfigError, match="no recipe 'embeded'; did you mean embedded?"):
        load_recipe("embeded")
    with pytest.raises(ConfigError, match="recipe file nowhere.toml does not exist"):
        load_recipe("nowhere.toml")


def test_the_hash_names_the_recipe_not_the_place():
    one = Recipe()
    assert recipe_hash(one) == recipe_hash(dataclasses.replace(one, data="elsewhere"))
    assert recipe_hash(one) != recipe_hash(dataclasses.replace(one, seed=1))


def test_no_flag_has_two_meanings():
    names = [f.name for cls in (*sections().values(), Machine) for f in dataclasses.fields(cls)]
    names += [f.name for f in dataclasses.fields(Recipe) if f.name not in sections()]
    assert len(names) == len(set(names))
    assert set(flat(Recipe())) <= set(names)


def test_every_field_has_its_help():
    """A field's help is the string below it: as many strings as fields."""
    import ast
    import inspect

    for cls in (Recipe, Machine, *sections().values()):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        fields = [i for i, node in enumerate(body) if isinstance(node, ast.AnnAssign) and node.target.id not in sections()]
        for i in fields:
            assert isinstance(body[i + 1], ast.Expr), f"{cls.__name__}.{body[i].target.id}"


def test_units():
    assert [parse_time(t) for t in ("90", "90s", "10m", "1.5h", "2d")] == [90, 90, 600, 5400, 172800]
    assert parse_half_life("1.5%") == (1.5, "%")
    assert parse_half_life("1 step") == (1, "steps")
    assert parse_half_life("2e6 images") == (2e6, "images")


def test_impossible_values_are_told_together():
    with pytest.raises(ConfigError, match=r"size must be above 0.*batch_size must be above 0"):
        check(Recipe(images=Images(size=0), optim=Optim(batch_size=0)))

"""Recipes, and what compress does to a model: which layers, why, and what stays as it was."""

import json

import pytest
from trine import Recipe


def test_one_choice_holds_for_every_layer():
    assert Recipe().choice("encoder.0.query") == "int8"
    assert Recipe(linear="ternary").choice("") == "ternary"


def test_the_first_matching_pattern_decides_and_no_match_is_float():
    recipe = Recipe(linear={"*.query": "float", "encoder.*": "sparse24", "Head": "ternary"})
    assert recipe.choice("encoder.0.query") == "float"
    assert recipe.choice("encoder.0.key") == "sparse24"
    assert recipe.choice("Head") == "ternary"
    assert recipe.choice("head") == "float"
    assert recipe.choice("my.encoder.0") == "float"


def test_a_recipe_keeps_its_own_copy_of_the_patterns():
    patterns = {"a": "int8"}
    recipe = Recipe(linear=patterns)
    patterns["a"] = "ternary"
    recipe.to_dict()["linear"]["a"] = "ternary"
    assert recipe.choice("a") == "int8"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe("sparse24-int8", "size"),
        Recipe({"z*": "float", "*": "int8", "a": "ternary"}),
    ],
)
def test_a_recipe_survives_json_with_the_order_of_its_patterns(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert json.dumps(again.to_dict()) == json.dumps(recipe.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"linear": "int4"}, "linear is 'int4'; it must be one of"),
        ({"linear": {"a": "int8", "b": None}}, r"linear\['b'\] is None; it must be one of"),
        ({"linear": {"": "int8"}}, "'' is no pattern"),
        ({"linear": {3: "int8"}}, "3 is no pattern"),
        ({"linear": ["int8"]}, "or a mapping from patterns"),
        ({"prefer": "accuracy"}, "prefer is 'accuracy'; it must be one of"),
    ],
)
def test_a_wrong_recipe_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_a_description_with_other_keys_is_refused():
    with pytest.raises(ValueError, match="expected a mapping with keys linear and prefer"):
        Recipe.from_dict({"linear": "int8", "bits": 4})

"""Recipes and plans: every wrong key or combination is refused by name, every right one survives the round trip."""

import dataclasses

import pytest
import yaml

from quamba.config import QuambaConfig
from quamba.errors import QuambaError, RecipeError
from quamba.plan import BlockPlan, Plan, Rotation, SiteSpec, WeightSpec
from quamba.recipe import PRESETS, Recipe, configs_dir

CONFIGS = sorted(configs_dir().glob("*.yaml"))


def architecture(inner=64, layers=2, mixer="mamba1"):
    args = {"intermediate_size": inner, "time_step_rank": 2}
    if mixer == "mamba2":
        args = {"num_heads": 8, "head_dim": inner // 8, "state_size": 4, "n_groups": 1, "norm_groups": 1}
    return QuambaConfig(vocab_size=64, hidden_size=32, blocks=[{"mixer": mixer, "args": args, "mlp": None}] * layers)


def shipped() -> dict:
    return yaml.safe_load((configs_dir() / "mamba1-w8a8.yaml").read_text())


def changed(*path_and_value):
    """The shipped recipe with one entry set; `...` removes it."""
    *path, value = path_and_value
    data = shipped()
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return data


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_resolves(path):
    recipe = Recipe.load(path)
    assert path.stem in (recipe.name, f"{recipe.family}-{recipe.name}")
    plan = recipe.resolve(architecture(mixer=recipe.family))
    assert len(plan.blocks) == 2
    assert not plan.is_float
    assert Recipe.find(path.stem, "any") == recipe


def test_the_w8a8_preset_means_int8_everywhere_but_the_vocabulary():
    recipe = Recipe.find("w8a8", "mamba1")
    plan = recipe.resolve(architecture(inner=96))
    for block in plan.blocks:
        assert block.weights == dict.fromkeys(("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"), WeightSpec(8))
        assert block.sites == {
            **dict.fromkeys(("mixer_in", "out_proj_in"), SiteSpec(8, "token")),
            **dict.fromkeys(("conv_in", "x", "z"), SiteSpec(8, "static", "channel")),
        }
        assert block.rotations == {"out_proj": Rotation(96, 12, "paley12")}
    assert (plan.embedding, plan.final_norm, plan.lm_head) == (WeightSpec(16), SiteSpec(16, "none"), WeightSpec(16))
    assert plan.recipe == "w8a8"
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (128, 512)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_family_has_every_preset(family, preset):
    recipe = Recipe.find(preset, family)
    weights, activations = preset.removeprefix("w").split("a")
    for name, spec in recipe.weights.items():
        assert spec.bits == (8 if name in ("conv1d", "dt_proj", "A_log") else int(weights))
    assert bool(recipe.sites) == (activations == "8")
    vocabulary = 16 if (family, preset) == ("mamba1", "w8a8") else 8
    assert recipe.embedding == recipe.lm_head == WeightSpec(vocabulary)
    assert recipe.final_norm == (SiteSpec(8, "token") if (vocabulary, activations) == (8, "8") else SiteSpec())


def test_a_family_without_a_preset_says_which_there_are():
    with pytest.raises(RecipeError, match="no w8a8 recipe for rwkv7; it has: none"):
        Recipe.find("w8a8", "rwkv7")


WRONG = {
    "a typo on top": (changed("observr", "minmax"), "unknown key recipe.observr: did you mean 'observer'"),
    "a typo below": (changed("calibration", {"sample": 3}), "recipe.calibration.sample: did you mean 'samples'"),
    "a typo in a spec": (changed("sites", "x", {"bit": 8}), "unknown key recipe.sites.x.bit: did you mean 'bits'"),
    "a key like none": (changed("zzzzzz", 1), "unknown key recipe.zzzzzz: the keys here are name, family"),
    "no name": (changed("name", ...), "recipe lacks name"),
    "no family": (changed("family", ...), "recipe lacks family"),
    "a list": ([1, 2], "recipe must be a mapping, not list"),
    "nothing": (None, "recipe must be a mapping, not NoneType"),
    "weights as a list": (changed("weights", ["in_proj"]), "recipe.weights must be a mapping, not list"),
    "a weight as a number": (changed("weights", "in_proj", 8), "recipe.weights.in_proj must be a mapping, not int"),
    "bits in words": (changed("weights", "in_proj", {"bits": "8"}), "in_proj.bits must be int, not '8'"),
    "bits as yes": (changed("weights", "in_proj", {"bits": True}), "in_proj.bits must be int, not True"),
    "rotate as a word": (changed("rotate", "out_proj"), "recipe.rotate must be a list, not str"),
    "fold_norm as a number": (changed("fold_norm", 1), "recipe.fold_norm must be bool, not 1"),
    "7 bits": (changed("weights", "in_proj", {"bits": 7}), "bits can't be 7: choose one of 4, 8, 16"),
    "an unknown observer": (changed("observer", "minmaks"), "observer can't be 'minmaks': did you mean 'minmax'"),
    "an unknown propagation": (changed("propagate", "both"), "propagate can't be 'both'"),
    "an unknown scale": (changed("sites", "x", {"bits": 8, "scale": "statik"}), "scale can't be 'statik'.*'static'"),
    "an unknown axis": (changed("sites", "x", {"bits": 8, "scale": "static", "axis": "row"}), "axis can't be 'row'"),
    "integer without scale": (changed("sites", "x", {"bits": 8}), "bits: 8 contradicts scale: none"),
    "float with scale": (changed("sites", "x", {"bits": 16, "scale": "static"}), "bits: 16 contradicts scale: static"),
    "no samples": (changed("calibration", {"samples": 0}), "at least 1 sample of 2 tokens"),
    "one token": (changed("calibration", {"seq_len": 1}), "at least 1 sample of 2 tokens"),
    "float head behind integers": (changed("final_norm", {"bits": 8, "scale": "token"}), "so lm_head must be, too"),
    "channels into the head": (
        changed("final_norm", {"bits": 8, "scale": "static", "axis": "channel"}),
        "final_norm: the input of an integer linear needs axis: tensor",
    ),
    "a channel scale per token": (
        changed("sites", "x", {"bits": 8, "scale": "token", "axis": "channel"}),
        "belongs to",
    ),
    "a group of 33": (
        changed("weights", "in_proj", {"bits": 4, "group": 33}),
        "group can't be 33: choose one of 32, 64",
    ),
    "groups of int8": (changed("weights", "in_proj", {"bits": 8, "group": 32}), "group: 32 doesn't go with bits: 8"),
    "an axis of int4": (changed("weights", "in_proj", {"bits": 4, "axis": "tensor"}), "axis: tensor doesn't go with"),
    "a head in parts": (changed("lm_head", {"bits": 8, "axis": "split"}), "lm_head: its rows are one thing"),
    "an observer for nobody": (changed("observers", {"conv": "mse"}), "observers can't be 'conv'.*'conv_in'"),
    "a percentile of 2": (changed("percentile", 2.0), "percentile is 2.0; it must lie between 0 and 1"),
    "no damping": (changed("gptq", {"damping": 0.0}), "gptq.damping is 0.0"),
    "a typo in gptq": (changed("gptq", {"weigths": []}), "gptq.weigths: did you mean 'weights'"),
    "a turned stream before norms": (
        changed("fold_norm", False) | {"rotate_residual": True},
        "rotate_residual needs fold_norm",
    ),
}
STATIC = {"bits": 8, "scale": "static", "axis": "channel"}
IMPOSSIBLE = {
    "another family": (changed("family", "mamba9"), "recipe w8a8 is for mamba9, but block 0 is mamba1"),
    "an unknown weight": (
        changed("weights", "inproj", {"bits": 8}),
        "weights can't be 'inproj': did you mean 'in_proj'",
    ),
    "an unknown site": (changed("sites", "conv", STATIC), "sites can't be 'conv'.*'conv_in'"),
    "a site of another family": (changed("sites", "B", STATIC), "sites can't be 'B'"),
    "channels of the state": (changed("sites", "state", STATIC), "sites.state: choose axis: tensor or group"),
    "groups nobody has": (
        changed("sites", "x", STATIC | {"axis": "group"}),
        "sites.x has no groups of channels in mamba1",
    ),
    "parts nobody has": (
        changed("weights", "in_proj", {"bits": 8, "axis": "split"}),
        "in_proj: its rows are one thing",
    ),
    "4 bits a tap": (changed("weights", "conv1d", {"bits": 4}), "weights.conv1d: its taps are too few"),
    "a vector by channel": (
        changed("weights", "A_log", {"bits": 8}),
        "weights.A_log: choose bits: 16, or bits: 8 with axis",
    ),
    "a layer too many": (changed("layers", [{"layers": [0, 2]}]), "layers names layer 2; the model has 2"),
    "an impossible layer": (
        changed("layers", [{"layers": [1], "weights": {"in_proj": {"bits": 16}}}]),
        "sites.mixer_in is integer, so weights.in_proj must be, too",
    ),
    "two formats of one matrix": (changed("embedding", {"bits": 8}), "one matrix in one format"),
    "a rotation nobody has": (changed("rotate", ["in_proj"]), "rotate can't be 'in_proj'"),
    "channel scales into a linear": (changed("sites", "mixer_in", STATIC), "sites.mixer_in: .* needs axis: tensor"),
    "token scales into the scan": (
        changed("sites", "z", {"bits": 8, "scale": "token"}),
        "sites.z: convolution, scan, gate and state take static scales only",
    ),
    "float weights behind an integer site": (
        changed("weights", "in_proj", {"bits": 16}),
        "sites.mixer_in is integer, so weights.in_proj must be, too",
    ),
    "integer convolution of a float site": (
        changed("sites", "conv_in", ...),
        "weights.conv1d is integer, so sites.conv_in must be, too",
    ),
}


@pytest.mark.parametrize(("data", "why"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_refused_by_name(tmp_path, data, why):
    with pytest.raises(RecipeError, match=why):
        Recipe.from_dict(data)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(RecipeError, match=why.replace("recipe.", "mine.yaml.").replace("recipe ", "mine.yaml ")):
        Recipe.load(tmp_path / "mine.yaml")


@pytest.mark.parametrize(("data", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_combination_without_arithmetic_is_refused(data, why):
    recipe = Recipe.from_dict(data)
    with pytest.raises(RecipeError, match=why):
        recipe.resolve(architecture())


@pytest.mark.parametrize("text", ["a: [1", "\tx: 1", "a: *b", "{", "name: !!python/object/apply:os.getcwd []"])
def test_what_is_not_yaml_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"bad\.yaml is not YAML: ") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(RecipeError, match="can't read recipe"):
            Recipe.load(path)


def test_names_are_found_or_answered_with_the_nearest():
    assert Recipe.find("mamba1-w8a8", "mamba1") == Recipe.find("w8a8", "mamba1")
    assert Recipe.find(str(configs_dir() / "mamba1-w8a8.yaml"), "mamba1").name == "w8a8"
    with pytest.raises(RecipeError, match="unknown recipe 'mamba1-w8a9': did you mean 'mamba1-w8a8'"):
        Recipe.find("mamba1-w8a9", "mamba1")
    with pytest.raises(RecipeError, match=r"can't read recipe absent\.yaml"):
        Recipe.find("absent.yaml", "mamba1")


PLANS = {
    "float": Plan.floating(3),
    "shipped": Recipe.find("w8a8", "mamba1").resolve(architecture()),
    "uneven": Plan(
        blocks=(
            BlockPlan(),
            BlockPlan(
                {"mixer_in": SiteSpec(8, "token")},
                {"in_proj": WeightSpec(8)},
                {"out_proj": Rotation(60, 60, "identity")},
            ),
        ),
        embedding=WeightSpec(8),
        final_norm=SiteSpec(8, "static", "tensor"),
        lm_head=WeightSpec(8),
        recipe="mine",
        provenance={"calibration": {"samples": 3}, "base_model": "x"},
    ),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_a_plan_survives_json_exactly(plan):
    data = yaml.safe_load(yaml.safe_dump(plan.to_dict()))
    assert Plan.from_dict(data) == plan
    assert Plan.from_dict(data).to_dict() == plan.to_dict() == data
    assert {"quant_method", "format_version", "blocks", "embedding", "final_norm", "lm_head"} <= set(data)
    assert architecture(layers=len(plan.blocks)).with_plan(plan).plan == plan


def test_a_plan_is_float_only_if_nothing_in_it_is_not():
    assert PLANS["float"].is_float
    for change in ({"embedding": WeightSpec(8)}, {"final_norm": SiteSpec(8, "token")}, {"lm_head": WeightSpec(8)}):
        assert not dataclasses.replace(PLANS["float"], **change).is_float
    rotated = BlockPlan(rotations={"out_proj": Rotation(64)})
    assert not dataclasses.replace(PLANS["float"], blocks=(BlockPlan(), rotated)).is_float


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq'; expected 'quamba'"),
        ({"quant_method": ...}, "quant_method None"),
        ({"format_version": 2}, "format version 2, this quamba reads 1: upgrade"),
        ({"format_version": ...}, "format version None"),
        ({"lmhead": {}}, "quantization_config.lmhead: did you mean 'lm_head'"),
        ({"blocks": {}}, "quantization_config.blocks must be a list"),
        ({"blocks": [{"sites": {"y": {"bits": 16}}}]}, "site can't be 'y'"),
        ({"blocks": [{"weights": {"in_proj": {"bits": 3}}}]}, "bits can't be 3"),
        ({"blocks": ...}, "quantization_config lacks blocks"),
    ],
)
def test_a_plan_from_elsewhere_is_refused(change, why):
    data = Plan.floating(1).to_dict() | change
    with pytest.raises(QuambaError, match=why):
        Plan.from_dict({key: value for key, value in data.items() if value is not ...})

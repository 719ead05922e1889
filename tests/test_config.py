"""Settings: each bad one is refused in one line that names the field, its value and the values allowed."""

import dataclasses
import math

import pytest

from resnet_bk.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    DepthConfig,
    EvalConfig,
    ExpertsConfig,
    GenerateConfig,
    LengthConfig,
    MemoryConfig,
    ModelConfig,
    MultiScaleConfig,
    SparsityConfig,
    TrainConfig,
    TuneConfig,
    check_fields,
    read_limited,
    read_yaml,
    shown,
    unknown_field,
)

MODEL, DATA, TRAIN = (ModelConfig, {}), (DataConfig, {}), (TrainConfig, {"max_steps": 1})
SCALES, LENGTHS, ATTENTION = (MultiScaleConfig, {}), (LengthConfig, {}), (AttentionConfig, {})
MEMORY = (MemoryConfig, {})
EVAL, GENERATE = (EvalConfig, {"checkpoint": "x", "stride": 1}), (GenerateConfig, {"checkpoint": "x", "prompt": "y"})
TUNE = (TuneConfig, {"base": "x"})
HUGE = 10**5000  # longer than Python prints

# (class and its required fields), field, name in the message, lowest and highest allowed value
RANGES = [
    (MODEL, "vocab_size", "model", 1, 10_000_000),
    (MODEL, "d_model", "model", 1, 65_536),
    (MODEL, "n_layers", "model", 1, 1_024),
    (MODEL, "n_seq", "model", 1, 16_777_216),
    (MODEL, "num_experts", "model", 1, 1_024),
    ((ModelConfig, {"num_experts": 4}), "top_k", "model", 1, 4),
    (MODEL, "conv_width", "model", 1, 64),
    (MODEL, "n_heads", "model", 1, 64),
    (MODEL, "d_ff", "model", 1, 1_048_576),
    (ATTENTION, "every", "model.attention", 0, 1_024),
    (ATTENTION, "window", "model.attention", 1, 65_536),
    (MEMORY, "rows", "model.memory", 1, 2**24),
    (MEMORY, "successors", "model.memory", 1, 64),
    (LENGTHS, "bins", "model.length", 0, 1_024),
    (LENGTHS, "max_length", "model.length", 2, 1_048_576),
    (LENGTHS, "trunk", "model.length", 1, 1_023),
    (LENGTHS, "levels", "model.length", 1, 2),
    (TRAIN, "batch_size", "train", 1, 1_048_576),
    (TRAIN, "accumulate", "train", 1, 1_048_576),
    (TRAIN, "save_every", "train", 1, 10**9),
    (TRAIN, "log_every", "train", 1, 10**9),
    (TRAIN, "max_steps", "train", 1, 10**9),
    (TRAIN, "seed", "train", 0, 2**31 - 1),
    (EVAL, "window", "eval", 1, 2**24),
    (EVAL, "stride", "eval", 1, 1024),
    (EVAL, "batch_size", "eval", 1, 2**24),
    (EVAL, "max_bytes", "eval", 1, 2**62),
    (GENERATE, "max_new_tokens", "generate", 1, 2**24),
    (GENERATE, "seed", "generate", 0, 2**31 - 1),
    (TUNE, "trials", "tune", 1, 10**6),
    (TUNE, "seed", "tune", 0, 2**31 - 1),
]
REALS = [
    (MODEL, "balance_weight", "model", 0, 1_000),
    (SCALES, "ratio_weight", "model.multiscale", 0, 1_000),
    (LENGTHS, "temperature", "model.length", 1e-3, 1e3),
    (LENGTHS, "penalty", "model.length", 0, 1_000),
    (LENGTHS, "entropy_weight", "model.length", 0, 1_000),
    (DATA, "val_fraction", "data", 1e-6, 0.5),
    (TRAIN, "learning_rate", "train", 1e-8, 10),
    (TRAIN, "warmup", "train", 0, 1),
    (TRAIN, "final_learning_rate", "train", 0, 1),
    (TRAIN, "beta2", "train", 0, 0.999999),
    (TRAIN, "weight_decay", "train", 0, 10),
    (TRAIN, "max_grad_norm", "train", 1e-6, 1e6),
    (TRAIN, "max_seconds", "train", 1, 10**8),
    ((ModelConfig, {"longest_memory": 10**6}), "shortest_memory", "model", 0.1, 10**6),
    ((ModelConfig, {"shortest_memory": 0.1}), "longest_memory", "model", 0.1, 10**6),
    (GENERATE, "temperature", "generate", 0, 100),
    (GENERATE, "top_p", "generate", 1e-6, 1),
    (TUNE, "max_loss", "tune", 0, 1_000),
]
CHOICES = [
    (MODEL, "readout", "model"),
    (MODEL, "energy", "model"),
    (LENGTHS, "mode", "model.length"),
    (LENGTHS, "placement", "model.length"),
    (LENGTHS, "pooling", "model.length"),
    (LENGTHS, "spacing", "model.length"),
    (LENGTHS, "execution", "model.length"),
    (DATA, "rows", "data"),
    (TRAIN, "dtype", "train"),
    (TRAIN, "optimizer", "train"),
    (EVAL, "context", "eval"),
    (TUNE, "objective", "tune"),
]
BOOLEANS = [(MODEL, "tie_word_embeddings", "model"), (MODEL, "causal", "model"), (TRAIN, "resume", "train")]
BOOLEANS += [(TUNE, "prune", "tune")]
TEXTS = [
    (DATA, "source", "data"),
    (DATA, "val_source", "data"),
    (DATA, "tokenizer", "data"),
    (DATA, "cache", "data"),
    (TRAIN, "output_dir", "train"),
    (TRAIN, "report_to", "train"),
    (TRAIN, "sample", "train"),
    (EVAL, "checkpoint", "eval"),
    (EVAL, "source", "eval"),
    (GENERATE, "checkpoint", "generate"),
    (GENERATE, "prompt", "generate"),
    (TUNE, "base", "tune"),
    (TUNE, "output_dir", "tune"),
]


def refusal(kind, **values):
    """Return the one-line message of the error that `kind` raises for `values`."""
    config, required = kind
    with pytest.raises(ConfigError) as caught:
        config(**(required | values))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


def name(case):
    return f"{case[2]}.{case[1]}" if isinstance(case, tuple) else None


@pytest.mark.parametrize("case", RANGES + REALS, ids=name)
def test_bounds_are_allowed_and_values_beyond_them_are_refused(case):
    (config, required), field, where, low, high = case
    for allowed in (low, high):
        config(**(required | {field: allowed}))
    below, above = (low - 1, high + 1) if case in RANGES else (math.nextafter(low, -1), math.nextafter(high, math.inf))
    for value in (below, above):
        message = refusal((config, required), **{field: value})
        assert message.startswith(f"{where}.{field}: got {value!r}, allowed ")


@pytest.mark.parametrize("value", [True, False, 2.0, "2", [2], 10**30, -1, HUGE, -HUGE], ids=lambda v: shown(v)[:12])
@pytest.mark.parametrize("case", RANGES, ids=name)
def test_only_integers_in_range_are_integers(case, value):
    message = refusal(case[0], **{case[1]: value})
    assert message.startswith(f"{case[2]}.{case[1]}: got ")
    assert "allowed an integer from" in message


@pytest.mark.parametrize("value", [True, "0.1", float("nan"), float("inf"), HUGE], ids=lambda v: shown(v)[:12])
@pytest.mark.parametrize("case", REALS, ids=name)
def test_only_finite_numbers_in_range_are_numbers(case, value):
    assert refusal(case[0], **{case[1]: value}).startswith(f"{case[2]}.{case[1]}: got ")


@pytest.mark.parametrize("value", ["", "nothing", None, 1, ["real"]], ids=repr)
@pytest.mark.parametrize("case", CHOICES, ids=name)
def test_choices_name_what_is_allowed(case, value):
    kind, field, where = case
    if field == "energy" and value is None:
        assert kind[0](**kind[1], energy=None).energy is None  # the default
        return
    message = refusal(kind, **{field: value})
    assert message.startswith(f"{where}.{field}: got {value!r}, allowed '")


@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
@pytest.mark.parametrize("case", BOOLEANS, ids=name)
def test_booleans_are_true_or_false(case, value):
    kind, field, where = case
    assert refusal(kind, **{field: value}) == f"{where}.{field}: got {value!r}, allowed true or false"


@pytest.mark.parametrize("value", ["", "a\0b", "\udcff", 5, b"x"], ids=repr)
@pytest.mark.parametrize("case", TEXTS, ids=name)
def test_text_is_text(case, value):
    kind, field, where = case
    assert refusal(kind, **{field: value}).startswith(f"{where}.{field}: " + ("got " if value else "is empty"))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "data.sources: got {}, allowed sources with weights, such as {stdlib: 0.7, docs: 0.3}"),
        (["a"], "data.sources: got ['a'], allowed sources with weights, such as"),
        ({"a": 0}, "data.sources['a']: got 0, allowed 1e-06 to 1000000.0"),
        ({"a": -1.0}, "data.sources['a']: got -1.0, allowed"),
        ({"a": math.nan}, "data.sources['a']: got nan, allowed"),
        ({"a": "much"}, "data.sources['a']: got 'much', allowed"),
        ({"a": True}, "data.sources['a']: got True, allowed"),
        ({"": 1.0}, "data.sources['']: is empty; give at least one character"),
        ({5: 1.0}, "data.sources[5]: got 5, allowed text"),
    ],
)
def test_bad_sources_are_refused(sources, message):
    assert refusal(DATA, sources=sources).startswith(message)


def test_weights_become_shares():
    assert DataConfig(source="docs").shares == {"docs": 1.0}
    assert DataConfig(sources={"a": 3, "b": 1}).shares == {"a": 0.75, "b": 0.25}
    message = refusal(DATA, source="docs", sources={"a": 1})
    assert message == (
        "data.sources: got {'a': 1} with data.source = 'docs', allowed one of the two; leave source out, or set "
        "sources to null"
    )


def test_training_must_have_an_end():
    message = refusal((TrainConfig, {}))
    assert "max_steps" in message
    assert "max_seconds" in message


def test_a_bidirectional_model_cannot_be_trained_to_predict_the_next_token():
    message = refusal(TRAIN, model=ModelConfig(causal=False))
    assert (
        message == "model.causal: got False, allowed True: a bidirectional model cannot learn to predict the next token"
    )


def test_top_k_is_at_most_the_number_of_experts():
    assert refusal(MODEL, num_experts=2, top_k=3) == "model.top_k: got 3, allowed an integer from 1 to 2"


@pytest.mark.parametrize(
    ("readout", "d_model", "heads"),
    [
        ("propagator", 1, 1),
        ("propagator", 7, 1),
        ("propagator", 64, 2),
        ("propagator", 96, 3),
        ("propagator", 100, 2),
        ("propagator", 127, 1),
        ("diagonal", 1, 1),
        ("diagonal", 7, 3),
        ("diagonal", 64, 32),
    ],
)
def test_default_number_of_heads(readout, d_model, heads):
    assert ModelConfig(readout=readout, d_model=d_model).heads == heads


def test_chains_are_given_by_bonds_where_that_is_possible():
    assert ModelConfig().energy_kind == "bonds"
    assert ModelConfig(energy="real").energy_kind == "real"
    for fields in ({"causal": False}, {"readout": "diagonal"}, {"d_model": 8, "n_heads": 8}):
        assert ModelConfig(**fields).energy_kind == "real"
        assert "allowed in causal models with the propagator" in refusal(MODEL, energy="bonds", **fields)
        assert "model.longest_memory: got 30" in refusal(MODEL, longest_memory=30.0, **fields)
    assert "model.energy: got 'imaginary', allowed 'bonds', 'real', 'complex'" in refusal(MODEL, energy="imaginary")
    assert refusal(MODEL, shortest_memory=8.0).startswith("model.longest_memory: got 7.0, allowed 8.0 to ")


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 16, "n_heads": 16, "multiscale": MultiScaleConfig(factors=[2], widths=[32])},
        {"d_model": 64, "multiscale": MultiScaleConfig(factors=[2, 2], widths=[32, 16])},
    ],
)
def test_all_levels_have_the_same_kind_of_energies(fields):
    config = ModelConfig(n_layers=5, **fields)
    assert config.inside.energy_kind == config.energy_kind
    assert ModelConfig.from_dict(config.to_dict() | {"energy": config.energy_kind}).inside == config.inside


def test_bonds_need_heads_of_two_channels_at_every_level():
    fields = {"d_model": 8, "n_heads": 4, "multiscale": MultiScaleConfig(factors=[2], widths=[4])}
    assert ModelConfig(**fields).energy_kind == "real"
    assert "whose heads have 2 channels or more at every level" in refusal(MODEL, energy="bonds", **fields)


def test_attention_that_has_no_block_is_refused():
    assert "allowed 0 to 4" in refusal(MODEL, attention=AttentionConfig(every=5))
    assert "model.attention.window: got 9 with model.attention.every = 0" in refusal(
        MODEL, attention=AttentionConfig(window=9)
    )
    scales = MultiScaleConfig(factors=[2], layers=[1, 3, 1])
    assert ModelConfig(attention=AttentionConfig(every=3), multiscale=scales).stacks == [2, 3]
    assert (
        ModelConfig(attention=AttentionConfig(every=2), multiscale=MultiScaleConfig([2], [1, 1, 1])).inside.attention
        == AttentionConfig()
    )
    assert "stacks of at most 3 blocks" in refusal(MODEL, attention=AttentionConfig(every=4), multiscale=scales)


@pytest.mark.parametrize("energy", ["real", "complex"])
def test_default_heads_fit_every_even_width(energy):
    for d_model in range(2, 400, 2):
        heads = ModelConfig(d_model=d_model, energy=energy).heads
        assert d_model % heads == 0
        assert energy == "real" or d_model // heads % 2 == 0


def test_heads_must_divide_the_width():
    assert refusal(MODEL, d_model=64, n_heads=3).startswith("model.n_heads: got 3, allowed a divisor of d_model = 64")
    assert ModelConfig(d_model=64, n_heads=3, readout="diagonal").heads == 3


def test_n_gram_memory_limits_the_vocabulary():
    fields = {"memory": {"orders": [2]}}
    assert ModelConfig.from_dict({"vocab_size": 2**23, **fields}).memory.orders == (2,)
    with pytest.raises(ConfigError, match=r"model.vocab_size: got 8388609, allowed an integer from 1 to 8388608"):
        ModelConfig.from_dict({"vocab_size": 2**23 + 1, **fields})


def test_files_of_before_name_a_width_of_n_gram_memory():
    memory = {"orders": [], "rows": 16384, "width": None}
    assert not ModelConfig.from_dict({"memory": memory}).memory.orders
    for changed in ({"width": 64}, {"orders": [2]}):
        with pytest.raises(ConfigError, match=r"model\.memory: unknown field 'width'"):
            ModelConfig.from_dict({"memory": {**memory, **changed}})


def test_complex_energies_need_an_even_number_of_channels_a_head():
    message = refusal(MODEL, d_model=6, n_heads=2, energy="complex")
    assert message.startswith("model.n_heads: got 2, which makes 6 / 2 = 3 channels each, allowed an even number")
    assert ModelConfig(d_model=6, n_heads=3, energy="complex").heads == 3


@pytest.mark.parametrize("d_model", [1, 2, 3, 63, 64, 65, 768, 65_536])
def test_default_hidden_width_is_eight_thirds_rounded_up_to_a_multiple_of_8(d_model):
    hidden = ModelConfig(d_model=d_model).d_hidden
    assert hidden % 8 == 0
    assert 0 <= 3 * hidden - 8 * d_model < 24


def test_a_given_hidden_width_is_kept():
    assert ModelConfig(d_ff=5).d_hidden == 5


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("d_modle", "d_model"), ("nlayers", "n_layers"), ("vocabsize", "vocab_size"), ("topk", "top_k")],
)
def test_an_unknown_field_names_the_nearest(wrong, right):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict({wrong: 1})
    assert str(caught.value) == f"model: unknown field {wrong!r}; did you mean {right!r}?"


def test_an_unknown_field_without_a_similar_name_lists_all():
    assert str(unknown_field("zzz", ["b", "a"], "here")) == "here: unknown field 'zzz'; known fields: a, b"


@pytest.mark.parametrize("values", [None, 3, [1], "text", {"model": None}, {"model": [1]}, {"data": 5}], ids=repr)
def test_a_section_that_is_not_a_mapping_is_refused(values):
    with pytest.raises(ConfigError, match="allowed a mapping"):
        check_fields("file", TrainConfig, values)


def test_fields_of_sections_are_checked():
    check_fields("file", TrainConfig, {"model": {"d_model": 3}, "data": {"source": "x"}, "seed": 1})
    with pytest.raises(ConfigError, match=r"^file\.data: unknown field 'sauce'; did you mean 'source'\?$"):
        check_fields("file", TrainConfig, {"data": {"sauce": "x"}})


def test_a_model_configuration_survives_its_dictionary():
    config = ModelConfig(d_model=96, n_heads=3, energy="complex", num_experts=1)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_attention_is_a_section_but_not_a_technique():
    config = ModelConfig(attention=AttentionConfig(every=2, window=5))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert ModelConfig.from_dict({"attention": {"every": 2, "window": 5}}) == config
    assert "attention" not in config.techniques
    assert config.without(*config.techniques).attention == config.attention
    assert not ModelConfig.from_dict({}).attention.every
    assert [i for i in range(7) if AttentionConfig(every=3).at(i)] == [2, 5]
    assert not any(AttentionConfig().at(i) for i in range(7))
    with pytest.raises(ConfigError, match=r"^model\.attention: unknown field 'windw'; did you mean 'window'\?$"):
        ModelConfig.from_dict({"attention": {"windw": 5}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"causal": False}, "model.attention.every: got 2 with model.causal = False, allowed 0: attention reads"),
        (
            {"d_model": 9, "n_heads": 3},
            "model.attention.every: got 2 with heads of 9 / 3 = 3 channels, allowed with an even number of them: "
            "rotations pair channels; change d_model or n_heads",
        ),
        (
            {"multiscale": MultiScaleConfig((2,), widths=(33,))},
            "model.multiscale.widths: an inner level cannot be built: model.attention.every: got 2 with heads of 33 / "
            "1 = 33 channels",
        ),
    ],
)
def test_models_that_attention_does_not_fit_are_refused(fields, message):
    assert refusal(MODEL, attention=AttentionConfig(every=2), **fields).startswith(message)


def test_learned_sparsity_needs_a_block_with_a_chain():
    sparse = {"sparsity": SparsityConfig(target=0.5)}
    message = refusal(MODEL, attention=AttentionConfig(every=1), **sparse)
    assert message.startswith("model.attention.every: got 1 with model.sparsity, allowed 2 or more")
    ModelConfig(attention=AttentionConfig(every=2), **sparse)


def test_heads_of_attention_are_wide_with_every_readout():
    attention = AttentionConfig(every=2)
    assert ModelConfig(attention=attention).attention_heads == 2
    assert ModelConfig(attention=attention, n_heads=4).attention_heads == 4
    diagonal = ModelConfig(attention=attention, readout="diagonal", n_heads=7)
    assert (diagonal.heads, diagonal.attention_heads) == (7, 2)
    # 2 heads would have 33 channels
    assert (ModelConfig(d_model=66).heads, ModelConfig(d_model=66, attention=attention).heads) == (2, 1)


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().d_model = -1  # type: ignore[misc]


def test_long_values_are_cut_in_messages():
    assert shown("x" * 10_000) == "'" + "x" * 76 + "..."
    assert shown(HUGE) == "an integer too long to print"
    assert shown([1, {"a": HUGE}]) == "an integer too long to print"
    for value in ({"b": [1, "x'"], 5: {}}, [[]] * 20, (1,), b"x", None, 1.5, "é\n" * 20, "x" * 78):
        assert len(repr(value)) <= 80
        assert shown(value) == repr(value)
    for value in (list(range(50)), dict.fromkeys(range(20), "x"), b"x" * 90, "\n" * 79, "x" * 79):
        assert shown(value) == repr(value)[:77] + "..."


def test_a_giant_value_is_formatted_only_as_far_as_it_is_shown():
    bomb = "lol"
    for _ in range(100):
        bomb = [bomb] * 10
    assert shown(bomb) == "[" * 77 + "..."
    assert shown({"a": bomb})[:5] == "{'a':"
    formatted = []

    class Item:
        def __repr__(self):
            formatted.append(self)
            return "item"

    assert shown([Item()] * 10_000).endswith(", item...")
    assert len(formatted) < 20


def test_a_file_above_the_limit_is_refused(tmp_path):
    (tmp_path / "a").write_text("12é")
    assert read_limited("x", tmp_path / "a", 4) == "12é"
    with pytest.raises(ConfigError, match=r"^x: .*a has 4 bytes, allowed at most 3$"):
        read_limited("x", tmp_path / "a", 3)
    (tmp_path / "a").write_bytes(b"1\xff")
    with pytest.raises(ConfigError, match=r"^x: .*a is not UTF-8 at byte 1; save it as UTF-8$"):
        read_limited("x", tmp_path / "a", 4)


@pytest.mark.parametrize(
    "tagged", ['!!int ""', '!!float ""', "!!bool x", "!!timestamp x", '!!float "1:x"', "2001-99-99"]
)
def test_values_that_crash_the_yaml_library_are_one_error(tmp_path, tagged):
    (tmp_path / "a").write_text(f"x: {tagged}")
    with pytest.raises(ConfigError, match=r"^x: .*a' cannot be read as YAML \("):
        read_yaml("x", tmp_path / "a")


# ---------------------------------------------------------------------------------------- multi-scale


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"factors": 4}, "factors: got 4, allowed a list of integers"),
        ({"factors": (1,)}, r"factors\[0\]: got 1, allowed an integer from 2 to 65536"),
        ({"factors": (2.0,)}, r"factors\[0\]: got 2.0, allowed an integer"),
        ({"factors": (2,) * 9}, "factors: got 9 levels, allowed at most 8"),
        ({"factors": (2,), "layers": (1, 1)}, "layers: got 2 numbers for 1 factors, allowed 3"),
        ({"factors": (2,), "layers": (1, 0, 1)}, "layers: got 0 blocks in the innermost level"),
        ({"factors": (2,), "widths": (8, 8)}, "widths: got 2 numbers for 1 factors, allowed one for each"),
        ({"factors": (2,), "hidden": (8, 8)}, "hidden: got 2 numbers for 1 factors, allowed one for each"),
        (
            {"factors": (2,), "boundaries": "words"},
            "boundaries: got 'words', allowed 'fixed', 'whitespace', 'learned', 'learned-words'",
        ),
        ({"factors": (2, 2), "boundaries": "whitespace"}, "boundaries: got 'whitespace' for 2 factors"),
        ({"factors": (2, 2), "boundaries": "learned-words"}, "boundaries: got 'learned-words' for 2 factors"),
    ],
)
def test_bad_scales_are_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"^model\.multiscale\.{message}"):
        MultiScaleConfig(**fields)


@pytest.mark.parametrize(
    ("model", "scales", "message"),
    [
        ({"n_layers": 4}, {"factors": (2,), "layers": (1, 1, 1)}, "layers: got 3 blocks together, allowed .* = 4"),
        ({"n_layers": 2}, {"factors": (2,)}, "factors: 1 levels need at least 3 blocks, got model.n_layers = 2"),
        (
            {"vocab_size": 258},
            {"factors": (2,), "boundaries": "whitespace"},
            "boundaries: .* model.vocab_size = 258, .* 259",
        ),
        ({"causal": False}, {"factors": (2,)}, r"factors: got \[2\] with model.causal = False"),
    ],
)
def test_scales_that_do_not_fit_the_model_are_refused(model, scales, message):
    with pytest.raises(ConfigError, match=rf"^model\.multiscale\.{message}"):
        ModelConfig(**model, multiscale=MultiScaleConfig(**scales))


def test_an_inner_width_without_a_head_width_is_refused():
    with pytest.raises(ConfigError, match=r"^model\.multiscale\.widths: .*model\.n_heads: got 3, .* d_model = 16"):
        ModelConfig(d_model=12, n_heads=3, multiscale=MultiScaleConfig(factors=(2,), widths=(16,)))


def test_each_level_contains_the_next():
    scales = MultiScaleConfig(factors=(2, 3), layers=(1, 2, 4, 0, 3), widths=(96, 128), hidden=(100, 200))
    config = ModelConfig(d_model=64, d_ff=50, multiscale=scales)
    assert (config.blocks, config.around) == (10, (1, 3))
    middle = config.inside
    assert (middle.d_model, middle.d_hidden, middle.blocks, middle.around) == (96, 100, 6, (2, 0))
    inner = middle.inside
    assert (inner.d_model, inner.d_hidden, inner.blocks, inner.around) == (128, 200, 4, (4, 0))
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_without_layers_each_level_gets_one_block_before_and_one_after():
    config = ModelConfig(n_layers=8, d_ff=96, multiscale=MultiScaleConfig(factors=(2, 2), widths=(128, 128)))
    assert (config.around, config.inside.around, config.inside.inside.blocks) == ((1, 1), (1, 1), 4)
    assert config.inside.d_hidden == 192


def test_word_boundaries_are_refused_where_tokens_are_not_bytes():
    model = ModelConfig(n_layers=3, multiscale=MultiScaleConfig(factors=(4,), boundaries="whitespace"))
    TrainConfig(model=model, max_steps=1)
    with pytest.raises(
        ConfigError, match=r"^model\.multiscale\.boundaries: got 'whitespace' with data\.tokenizer = 'gpt2'"
    ):
        TrainConfig(model=model, data=DataConfig(tokenizer="gpt2"), max_steps=1)


# ------------------------------------------------------------------------------------- learned length


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "pool", "training": "expected"}, "training: got 'expected' with mode = 'pool', allowed 'sampled'"),
        ({"mode": "pool", "training": "gumbel"}, "training: got 'gumbel' with mode = 'pool', allowed 'sampled'"),
        ({"placement": "learned", "training": "sampled"}, "placement: got 'learned' where lengths are sampled"),
        ({"placement": "continuous", "mode": "pool"}, "placement: got 'continuous' where lengths are sampled"),
        ({"placement": "continuous", "levels": 2}, "levels: got 2 with placement = 'continuous', allowed 1"),
        ({"bins": 7, "levels": 2}, "bins: got 7 with levels = 2, allowed a product of two numbers"),
    ],
)
def test_lengths_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"^model\.length\.{message}"):
        LengthConfig(**fields)


@pytest.mark.parametrize(
    ("model", "length", "message"),
    [
        ({"n_seq": 4}, {"bins": 8}, "bins: got 8 with max_length = 4, allowed at most one per position"),
        ({"n_layers": 4}, {"bins": 8, "trunk": 4}, "trunk: got 4 of 4 blocks, allowed fewer"),
        ({"n_layers": 1}, {"bins": 8}, "trunk: got 1 of 1 blocks, allowed fewer"),
        (
            {"multiscale": MultiScaleConfig(factors=(2,), layers=(1, 2, 0))},
            {"bins": 8, "trunk": 2},
            r"trunk: got 2 of 2 layers \(all chunks are one layer\), allowed fewer",
        ),
        ({}, {"bins": 8, "pooling": "global"}, "pooling: got 'global' with model.causal = True"),
        ({"causal": False}, {"bins": 8}, "pooling: got 'prefix' with model.causal = False, allowed 'global'"),
        ({"vocab_size": 100}, {"bins": 8, "mode": "pool", "spacing": "words"}, "spacing: got 'words' with model.vocab"),
    ],
)
def test_lengths_that_do_not_fit_the_model_are_refused(model, length, message):
    with pytest.raises(ConfigError, match=rf"^model\.length\.{message}"):
        ModelConfig(**model, length=LengthConfig(**length))


def test_trunk_and_window_have_defaults():
    for blocks, trunk in ((2, 1), (4, 1), (8, 2), (12, 3)):
        assert ModelConfig(n_layers=blocks, length=LengthConfig(bins=8)).trunk == trunk
    assert ModelConfig(n_seq=256, length=LengthConfig(bins=8)).window == 256
    assert ModelConfig(n_seq=256, length=LengthConfig(bins=8, max_length=64)).window == 64


def test_two_levels_group_lengths_evenly():
    for bins, groups in ((4, 2), (6, 3), (8, 4), (16, 4), (15, 5)):
        assert LengthConfig(bins=bins, levels=2).groups == groups


def test_a_learned_length_survives_its_dictionary():
    config = ModelConfig(length=LengthConfig(bins=4, mode="pool", levels=2, penalty=0.5))
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_words_are_refused_where_tokens_are_not_bytes():
    model = ModelConfig(length=LengthConfig(bins=4, mode="pool", spacing="words"))
    TrainConfig(model=model, max_steps=1)
    with pytest.raises(ConfigError, match=r"^model\.length\.spacing: got 'words' with data\.tokenizer = 'gpt2'"):
        TrainConfig(model=model, data=DataConfig(tokenizer="gpt2"), max_steps=1)


# ------------------------------------------------------------------------------------- adaptive depth


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "halt"}, "policy: got 'halt', allowed 'none', 'act', 'skip', 'exit'"),
        ({"first": -1}, "first: got -1, allowed an integer from 0"),
        ({"every": 0}, "every: got 0, allowed an integer from 1"),
        ({"last": -1}, "last: got -1, allowed an integer from 0"),
        ({"threshold": 1.5}, "threshold: got 1.5, allowed 0 to 1"),
        ({"target": -0.1}, "target: got -0.1, allowed 0 to 1"),
        ({"penalty": -1.0}, "penalty: got -1.0, allowed 0 to 1000"),
        ({"exit_weight": -1.0}, "exit_weight: got -1.0, allowed 0 to 1000"),
        ({"full_depth": 2.0}, "full_depth: got 2.0, allowed 0 to 1"),
        ({"confidence": "margin"}, "confidence: got 'margin', allowed 'gain', 'probability', 'entropy'"),
    ],
)
def test_bad_depths_are_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"^model\.depth\.{message}"):
        DepthConfig(**fields)


CHUNKS = {"multiscale": MultiScaleConfig(factors=(2,), layers=(1, 2, 1))}


@pytest.mark.parametrize(
    ("model", "depth", "message"),
    [
        ({"n_layers": 2}, {"policy": "act", "first": 2}, "first: got 3 blocks for every position, allowed at most 2,"),
        ({"n_layers": 2}, {"policy": "exit", "first": 3}, "first: got 3 blocks for every position, allowed at most 2,"),
        (
            {"n_layers": 4, "length": LengthConfig(bins=4, trunk=2)},
            {"policy": "act", "first": 2},
            "first: got 3 blocks for every position, allowed at most 2,",
        ),
        (
            {"causal": False},
            {"policy": "exit"},
            "policy: got 'exit' with model.causal = False, allowed 'act' or 'skip'",
        ),
        (CHUNKS, {"policy": "exit"}, "policy: got 'exit' with model.multiscale, allowed 'act' or 'skip'"),
        ({"length": LengthConfig(bins=4)}, {"policy": "exit"}, "policy: got 'exit' with model.length, allowed 'act'"),
    ],
)
def test_depths_that_do_not_fit_the_model_are_refused(model, depth, message):
    with pytest.raises(ConfigError, match=rf"^model\.depth\.{message}"):
        ModelConfig(**model, depth=DepthConfig(**depth))


def test_depth_has_defaults_by_policy_and_survives_its_dictionary():
    assert [DepthConfig(policy=p).stops_at for p in ("act", "skip", "exit")] == [0.5, 0.5, 0.95]
    assert DepthConfig(policy="exit", confidence="entropy").stops_at == 0.9
    assert DepthConfig(policy="act", threshold=0.99).stops_at == 0.99
    assert [DepthConfig(policy=p).after for p in ("act", "skip", "exit")] == [1, 1, 0]
    config = ModelConfig(n_layers=6, depth=DepthConfig(policy="skip", every=2, target=0.25))
    assert ModelConfig.from_dict(config.to_dict()) == config


# -------------------------------------------------------------------------- sparsity and experts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": 1.0}, "target: got 1.0, allowed 0 to 0.99"),
        ({"sampling": "topk"}, "sampling: got 'topk', allowed 'threshold', 'gumbel'"),
        ({"penalty": -1.0}, "penalty: got -1.0, allowed 0 to 1000"),
        ({"warmup": 2.0}, "warmup: got 2.0, allowed 0 to 1"),
    ],
)
def test_bad_sparsity_is_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"^model\.sparsity\.{message}"):
        SparsityConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "top_q"}, "policy: got 'top_q', allowed 'top_k', 'top_p'"),
        ({"top_p": 1.5}, "top_p: got 1.5, allowed 0 to 1"),
        ({"least": 3, "most": 2}, "least: got 3, allowed an integer from 1 to 2"),
        ({"most": 0}, "most: got 0, allowed an integer from 1"),
        ({"most": 2, "target": 3.0}, "target: got 3.0, allowed 0 to 2"),
        ({"zero": -1}, "zero: got -1, allowed an integer from 0"),
        ({"balance": "luck"}, "balance: got 'luck', allowed 'auxiliary', 'bias'"),
        ({"cost_weight": -1.0}, "cost_weight: got -1.0, allowed 0 to 1000"),
    ],
)
def test_bad_experts_are_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"^model\.experts\.{message}"):
        ExpertsConfig(**fields)


def test_settings_of_experts_need_experts():
    with pytest.raises(ConfigError, match=r"^model\.experts: no experts to apply this to; raise model\.num_experts"):
        ModelConfig(num_experts=1, experts=ExpertsConfig(policy="top_p"))
    config = ModelConfig(num_experts=4, experts=ExpertsConfig(zero=2), sparsity=SparsityConfig(target=0.25))
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_drafts_are_refused_with_sampling():
    with pytest.raises(ConfigError, match=r"^generate\.speculate: got 4 with temperature = 0.7, allowed with"):
        GenerateConfig("run", "x", speculate=4)
    GenerateConfig("run", "x", speculate=4, temperature=0)

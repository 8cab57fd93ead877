import json

import pytest

from baton.demo_model import build_demo_model
from baton.step_time import ModelShape, UnsupportedShape, load_shape, shape_by_name
from baton.step_time.shapes import shape_from_hf
from baton.step_time.shipped_shapes import SHIPPED

QWEN3_8B = {
    "model_type": "qwen3",
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "sliding_window": None,
    "use_sliding_window": False,
    "max_position_embeddings": 40960,
}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("OPT-13B", 12.85),
        ("OPT-66B", 65.7),
        ("OPT-175B", 174.6),
        ("Llama-3-8B", 8.03),
        ("Llama-3-70B", 70.6),
        ("Mistral-7B", 7.25),
        ("Qwen3-0.6B", 0.596),
        ("Qwen3-8B", 8.19),
        ("Qwen3-32B", 32.8),
    ],
)
def test_a_shipped_shape_has_the_published_number_of_parameters(name: str, billions: float):
    assert shape_by_name(name).num_parameters / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_shipped_shape_is_valid():
    assert [load_shape(name).name for name in SHIPPED] == list(SHIPPED)


def test_names_ignore_case_and_owner():
    assert shape_by_name("Qwen/qwen3-8b") == shape_by_name("Qwen3-8B")


def test_kv_of_512_tokens_of_opt_66b_is_the_distserve_papers_figure():
    # 2 * 64 layers * 9216 * 2 bytes * 512 tokens; the paper says 1.13 GB and counts in GiB
    assert shape_by_name("OPT-66B").kv_bytes_per_token * 512 / 2**30 == pytest.approx(1.13, abs=0.01)


def test_grouped_heads_shrink_kv_until_a_rank_holds_one():
    shape = shape_by_name("Llama-3-70B")  # 8 KV heads
    assert shape.kv_bytes_per_token == 2 * 80 * 8 * 128 * 2
    per_rank = {tp: shape.kv_bytes_per_token_and_rank(tp) for tp in (1, 8, 16)}
    assert per_rank == {1: shape.kv_bytes_per_token, 8: shape.kv_bytes_per_token // 8, 16: per_rank[8]}
    assert shape.kv_bytes_per_token_and_rank(8, 4) == per_rank[8] // 4


def test_an_hf_config_gives_the_shipped_shape(tmp_path):
    folder = tmp_path / "Qwen3-8B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    assert load_shape(str(folder)) == load_shape(str(folder / "config.json")) == shape_by_name("Qwen3-8B")


def test_the_demo_models_own_config_is_readable(tmp_path):
    build_demo_model(tmp_path / "demo")
    shape = load_shape(str(tmp_path / "demo"))
    assert (shape.num_layers, shape.num_kv_heads, shape.dtype_bytes) == (4, 4, 4)


def test_a_yaml_file_of_sizes_is_a_shape(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        "num_layers: 2\nhidden_size: 64\nnum_heads: 4\nnum_kv_heads: 2\nhead_dim: 16\n"
        "ffn_size: 128\nnum_ffn_matrices: 3\nvocab_size: 1000\n"
    )
    shape = load_shape(str(path))
    assert shape.name == "small"
    assert shape.layer_parameters == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": 128}, "mixture of experts .num_experts is 128"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"kv_lora_rank": 512}, "latent KV"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
        ({"model_type": "rwkv"}, "model_type 'rwkv' is not known"),
        ({"model_type": "mistral", "sliding_window": 4096, "use_sliding_window": True}, "window of 4096"),
        ({"hidden_size": None}, "hidden_size is null"),
        ({"num_key_value_heads": 5}, "32 heads cannot share 5"),
        ({"torch_dtype": "int4"}, "weights of int4"),
    ],
)
def test_what_is_not_described_is_refused_by_name(changes: dict, sentence: str):
    with pytest.raises(UnsupportedShape, match=sentence):
        shape_from_hf(QWEN3_8B | changes, name="m")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("num_layers: 2", "hidden_size.* missing"),
        ("num_layrs: 2", "no field 'num_layrs'"),
        ("- 1", "holds no mapping"),
        ("a: [", "neither JSON nor YAML"),
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path, text: str, sentence: str):
    path = tmp_path / "shape.yaml"
    path.write_text(text)
    with pytest.raises(UnsupportedShape, match=sentence):
        load_shape(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UnsupportedShape, match=r"no shape 'GPT-9' is shipped; shipped are OPT-13B"):
        load_shape("GPT-9")
    with pytest.raises(UnsupportedShape, match=r"no shape 'Llama-3\.1-9B' is shipped"):
        load_shape("Llama-3.1-9B")  # a dot does not make it a file
    with pytest.raises(UnsupportedShape, match="does not exist"):
        load_shape("missing/config.json")


@pytest.mark.parametrize(
    ("tp", "pp", "sentence"),
    [(3, 1, "64 heads"), (0, 1, "start at 1"), (1, 81, "80 layers do not fill PP 81")],
)
def test_splits_that_do_not_divide_are_refused(tp: int, pp: int, sentence: str):
    with pytest.raises(UnsupportedShape, match=sentence):
        shape_by_name("Llama-3-70B").check_parallel(tp, pp)


def test_tp_3_of_opt_66b_is_legal_by_its_72_heads():
    shape_by_name("OPT-66B").check_parallel(3, 1)


def test_a_size_below_one_is_refused():
    with pytest.raises(UnsupportedShape, match="num_layers is 0"):
        ModelShape(
            name="x",
            num_layers=0,
            hidden_size=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=1,
            ffn_size=1,
            num_ffn_matrices=2,
            vocab_size=1,
        )

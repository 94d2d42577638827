"""config.json of every kind in, one kind out; the chat template as transformers renders it."""

import json
from pathlib import Path

import pytest
import transformers

from helpers import shared
from model_helpers import MISTRAL_7B
from zephyr import files
from zephyr.architecture import MistralConfig
from zephyr.tokenizer import Tokenizer
from zephyr.weights import config_json

ABSENT = ...  # printed alike in every process, and so are the names of the tests


def parsed(changes: dict) -> MistralConfig:
    raw = {key: value for key, value in (MISTRAL_7B | changes).items() if value is not ABSENT}
    return config_json.parse(raw, Path("config.json"))


def test_mistral_7b():
    assert parsed({}) == MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=32768,
        rope_theta=10000.0,
        sliding_window=4096,
    )


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 96}, "head_dim", 96),
        ({"sliding_window": None}, "sliding_window", None),
        ({"sliding_window": ABSENT}, "sliding_window", transformers.MistralConfig().sliding_window),
        ({"model_type": "llama"}, "sliding_window", None),
        (
            {"model_type": "llama", "rope_theta": ABSENT},
            "rope_theta",
            transformers.LlamaConfig().rope_parameters["rope_theta"],
        ),
        (
            {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
            "rope_theta",
            5e5,
        ),
        ({"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, "rope_theta", 1e4),
        ({"rope_scaling": None}, "rope_theta", 1e4),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "model_type", "mistral"),
    ],
    ids=str,
)
def test_accepted(changes, key, value):
    assert getattr(parsed(changes), key) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; known are mistral and llama"),
        ({"model_type": ABSENT}, "model_type is None"),
        ({"rms_norm_eps": ABSENT}, "has no rms_norm_eps, and programs differ in what they assume"),
        ({"max_position_embeddings": ABSENT}, "has no max_position_embeddings, and programs"),
        ({"num_key_value_heads": ABSENT}, "has no num_key_value_heads"),
        ({"rope_theta": ABSENT}, "has no rope_theta"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta is both 10000.0 and 1000000.0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "only the default RoPE"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only the default RoPE"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "{'factor': 2.0, 'type': 'linear'}"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "only the default RoPE is implemented"),
        ({"rope_scaling": "linear"}, "only the default RoPE"),
        ({"attention_bias": True}, "attention_bias is True; only False is implemented"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is implemented"),
        ({"vocab_size": 1_000_001}, "vocab_size is 1000001; it must be from 1 to 1000000"),
        ({"hidden_size": 4096.0}, r"hidden_size is 4096\.0; it must be from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": "14336"}, "intermediate_size is '14336'"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"head_dim": -128}, "head_dim is -128"),
        ({"head_dim": 127}, "head_dim is 127; RoPE needs it even"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value"),
        ({"hidden_size": 4095}, "hidden_size 4095 is not a multiple of num_attention_heads 32"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a positive number"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"rms_norm_eps": 10**400}, r"rms_norm_eps is 1000+\.\.\.0+; it must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a positive number"),
        ({"rope_theta": 1, "rope_parameters": {"rope_theta": True}}, "rope_theta is True"),
        ({"model_type": "\x1b[2J"}, r"model_type is '\\x1b\[2J'; known"),
        ({"torch_dtype": "int8"}, "torch_dtype is 'int8'; use float32, bfloat16 or float16"),
        ({"initializer_range": float("nan")}, "initializer_range is nan; it must be a number"),
        ({"initializer_range": "0.02"}, "initializer_range is '0.02'; it must be a number"),
    ],
    ids=str,
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=r"^config\.json.*" + message) as raised:
        parsed(changes)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_values_of_any_depth_and_length_are_refused_in_one_line():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    unread = {"architectures", "use_cache", "bos_token_id", "eos_token_id"}
    for value in (deep, {"rope_theta": deep}, "x" * 10**6, 10**4000, [10**4000] * 10):
        for key in MISTRAL_7B.keys() - unread | {"rope_scaling"}:
            with pytest.raises(ValueError, match=f"^config.json: ({key}|rope_theta) is ") as raised:
                parsed({key: value})
            assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_dtype_of_the_base():
    path = Path("config.json")
    assert config_json.dtype({"torch_dtype": "bfloat16"}, path) == "bfloat16"
    assert config_json.dtype({"dtype": "float16"}, path) == "float16"
    assert config_json.dtype({}, path) == "float32"
    with pytest.raises(ValueError, match="config.json: torch_dtype is 'int8'; use float32"):
        config_json.dtype({"torch_dtype": "int8"}, path)


def test_config_is_written_in_the_form_of_transformers_4(tmp_path):
    config_json.write_config(tmp_path, parsed({}), "bfloat16", MISTRAL_7B)
    written = files.read_json(tmp_path / "config.json")
    assert written == MISTRAL_7B | {"head_dim": 128, "attention_dropout": 0.0}
    assert files.read_json(tmp_path / "generation_config.json") == {
        "_from_model_config": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    assert theirs.sliding_window == 4096 and theirs.rms_norm_eps == 1e-5


def test_config_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder$"):
        config_json.read(tmp_path / "none")
    fetch = "HuggingFaceH4/sft: no such folder; from the Hub: hf download HuggingFaceH4/sft --local"
    with pytest.raises(ValueError, match=fetch):
        config_json.read("HuggingFaceH4/sft")
    with pytest.raises(ValueError, match="has no config.json, and no params.json"):
        config_json.read(tmp_path)
    (tmp_path / "params.json").touch()
    with pytest.raises(ValueError, match=r"but params.json: convert it with python -m zephyr.w"):
        config_json.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    assert config_json.read(str(tmp_path)) == parsed({})


CHAT = [
    {"role": "user", "content": " Hi\n\nthere "},
    {"role": "assistant", "content": "Yo {{ 'x' }} <b>"},
    {"role": "user", "content": "\n"},
    {"role": "assistant", "content": "naïve 🙂"},
]


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    path = tmp_path / "base" / "tokenizer.model"
    path.write_bytes(shared("mistral/tokenizer.model").read_bytes())
    return path


def written(base: Path, chat: bool, system: bool = True) -> Path:
    folder = base.parent.parent / "out"
    folder.mkdir(exist_ok=True)
    template = config_json.chat_template(system) if chat else None
    config_json.write_tokenizer(folder, Tokenizer(base), template)
    return folder


def test_chat_template_without_the_empty_system_message(base):
    folder = written(base, chat=True, system=False)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    hi = [{"role": "user", "content": "Hi"}]
    text = theirs.apply_chat_template(hi, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|user|>\nHi</s>\n<|assistant|>\n"
    first, last = text.removeprefix("<s>").split("</s>")
    assert ours.prompt(hi, system=False) == [1, *ours.encode(first), 2, *ours.encode(last)]


def test_chat_template_renders_what_training_sees(base):
    folder = written(base, chat=True)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    assert theirs.pad_token == "</s>" and theirs.bos_token == "<s>" and theirs.eos_token == "</s>"

    def rendered(messages, prompt=False):
        return theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    hi, yo = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    text = "<s><|system|>\n</s>\n<|user|>\nHi</s>\n"
    assert rendered([hi, yo]) == text + "<|assistant|>\nYo</s>\n"
    assert rendered([hi], prompt=True) == text + "<|assistant|>\n"

    def spelt(text):
        """What a tokenizer that knows </s> makes of the text."""
        first, *turns = [ours.encode(turn) for turn in text.removeprefix("<s>").split("</s>")]
        return [1, *first, *(i for turn in turns for i in (2, *turn))]

    system = {"role": "system", "content": "Be\nkind."}
    for messages in ([hi], [hi, yo], CHAT, CHAT[:3], [system, *CHAT], [system, *CHAT[:3]]):
        assert spelt(rendered(messages)) == [*ours.render(messages).ids, *ours.encode("\n")]
        if messages[-1]["role"] == "user":
            assert spelt(rendered(messages, prompt=True)) == ours.prompt(messages)


def test_an_earlier_spelling_of_the_template_is_known(base):
    """With `</s>` as text and without BOS."""
    for system in (True, False):
        folder = written(base, chat=True, system=system)
        assert config_json.empty_system(folder) is system
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        hi = [{"role": "user", "content": "Hi"}]
        text = theirs.apply_chat_template(hi, tokenize=False)
        earlier = config_json._plain(config_json.chat_template(system))
        assert "bos_token" not in earlier and "eos_token" not in earlier
        theirs.chat_template = earlier
        assert "<s>" + theirs.apply_chat_template(hi, tokenize=False) == text
        (folder / "chat_template.jinja").write_text(earlier)
        assert config_json.empty_system(folder) is system
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert config_json.empty_system(folder) is None
    (folder / "chat_template.jinja").unlink()
    assert config_json.empty_system(folder) is False  # as tokenizer_config.json has it
    (folder / "tokenizer_config.json").unlink()
    assert config_json.empty_system(folder) is None


def test_a_base_model_gets_no_chat_template(base):
    folder = written(base, chat=False)
    assert sorted(p.name for p in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert "chat_template" not in files.read_json(folder / "tokenizer_config.json")

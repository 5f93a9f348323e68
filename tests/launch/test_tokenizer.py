import json
import random

import pytest
from transformers import AutoTokenizer

from distrib.errors import UserError
from launch.recipe import Recipe
from launch.tokenizer import BYTE_VOCABULARY, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(Recipe(model_name_or_path="tiny"))


def random_text(seed: int) -> str:
    draw = random.Random(seed)
    ranges = [(0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(300))


@pytest.mark.parametrize("text", ["", " ", "  a  b .\t\r\n\n", "n't I 'm , ok ?", *map(random_text, range(20))])
def test_bytes_are_tokens_and_come_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_follow_the_bytes(tokenizer):
    names = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    assert sorted(tokenizer.convert_tokens_to_ids(names)) == list(range(256, 261))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert len(tokenizer) == 261 <= BYTE_VOCABULARY
    assert BYTE_VOCABULARY % 8 == 0


def test_the_template_marks_what_the_assistant_says(tokenizer):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "\nhi "},
        {"role": "assistant", "content": " yo\n"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|system|>s<|end|><|user|>\nhi <|end|><|assistant|> yo\n<|end|>"
    prompt = tokenizer.apply_chat_template(turns[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>s<|end|><|user|>\nhi <|end|><|assistant|>"
    marked = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mark in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if mark]
    assert said == [*b" yo\n", tokenizer.eos_token_id]


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = random_text(7) + "<|end|> <|user|>x"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    through_recipe = load_tokenizer(Recipe(model_name_or_path=str(tmp_path)))
    assert through_recipe(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_end_token_pads_where_there_is_no_other(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(Recipe(model_name_or_path=str(tmp_path))).pad_token == "<|end|>"


@pytest.mark.parametrize("model_type", [None, "llama", "gpt2"])
def test_a_folder_without_a_tokenizer_is_said(tmp_path, model_type):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=r"^model_name_or_path=.* has no tokenizer") as error:
        load_tokenizer(Recipe(model_name_or_path=str(tmp_path)))
    assert "\n" not in str(error.value)

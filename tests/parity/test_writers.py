"""Prompts by real classes of transformers with random weights, built here: `make parity`."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from sora_jax.prompts.writers import make_writer

WORDS = [
    "[PAD]",
    "[UNK]",
    "[EOS]",
    "a",
    "red",
    "ball",
    "rolls",
    "left",
    "in",
    "the",
    "snow",
    "light",
]
CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
USER_ALONE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
)


@pytest.fixture(scope="module", params=[CHAT, USER_ALONE, None], ids=["chat", "user", "plain"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=2,
        max_position_embeddings=1024,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data = 0.6 * torch.randn_like(parameter)
    # Words alone, and sampling that an answer must not use.
    model.generation_config.suppress_tokens = [0, 1]
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )
    tokenizer.chat_template = request.param
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_model_s_words_are_the_prompt_and_the_same_each_time(folder):
    writer = make_writer(folder)
    text = writer("a red ball rolls left")
    assert text and set(text.split()) <= set(WORDS[3:])
    assert writer("a red ball rolls left") == text == make_writer(folder)("a red ball rolls left")


def test_what_is_no_model_is_told_in_one_line(folder, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no causal language model that transformers can") as error:
        make_writer(str(tmp_path))
    assert "\n" not in str(error.value)

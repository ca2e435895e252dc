"""A language model in a folder: what it is asked, and what is said where there is none.

Stand-ins for torch and transformers; the real ones are in tests/parity.
"""

import contextlib
import importlib.util
import sys
import types

import pytest

from sora_jax.prompts import causal
from sora_jax.prompts.writers import make_writer


class Ids(list):
    """What is used of a tensor of one row."""

    @property
    def shape(self):
        return (1, len(self))

    def to(self, _):
        return self

    def __getitem__(self, key):
        if isinstance(key, tuple):
            return list.__getitem__(self, key[1])
        return list.__getitem__(self, key)


class Tokenizer:
    eos_token_id = 0

    def __init__(self, chats, system):
        self.chat_template = "template" if chats else None
        self.system = system

    def apply_chat_template(self, messages, **options):
        if not self.system and messages[0]["role"] == "system":
            raise RuntimeError("System role not supported")
        assert options["add_generation_prompt"] and not options["tokenize"]
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, text, **options):
        self.asked, self.options = text, options
        return {"input_ids": Ids(text.split())}

    def decode(self, ids, **_):
        return " ".join(ids).replace("|", "\n")


@pytest.fixture
def packages(monkeypatch):
    """Puts stand-ins where torch and transformers are looked for; returns what sets them up."""

    def install(*, chats=True, system=True, answer="A red | ball.", broken=""):
        tokenizer = Tokenizer(chats, system)

        class Model:
            @classmethod
            def from_pretrained(cls, folder, **options):
                assert options["local_files_only"]
                if broken == "load":
                    raise OSError("no file named model.safetensors\nin there")
                return cls()

            def to(self, _):
                return self

            def eval(self):
                return self

            def generate(self, ids, **options):
                if broken == "generate":
                    raise IndexError("index out of range")
                assert not options["do_sample"] and options["max_new_tokens"] == causal.MAX_TOKENS
                return Ids([*ids, *answer.split()])

        torch = types.ModuleType("torch")
        torch.float32 = "float32"
        torch.cuda = types.SimpleNamespace(is_available=lambda: False)
        torch.inference_mode = contextlib.nullcontext
        torch.ones_like = lambda ids: ids
        transformers = types.ModuleType("transformers")
        transformers.AutoModelForCausalLM = Model
        transformers.AutoTokenizer = types.SimpleNamespace(
            from_pretrained=lambda *a, **k: tokenizer
        )
        utils = types.ModuleType("transformers.utils")
        utils.logging = types.SimpleNamespace(
            set_verbosity_error=lambda: None, disable_progress_bar=lambda: None
        )
        modules = {"torch": torch, "transformers": transformers, "transformers.utils": utils}
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(causal.importlib.util, "find_spec", lambda _: True)
        return tokenizer

    return install


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path)


def test_a_model_that_chats_gets_a_conversation(packages, folder):
    tokenizer = packages()
    assert make_writer(folder)("ball") == "A red ball."
    assert tokenizer.asked.startswith("<system>You write prompts")
    assert tokenizer.asked.endswith("<user>ball<assistant>")
    assert tokenizer.options["add_special_tokens"] is False


def test_a_template_without_a_system_s_turn_gets_all_from_the_user(packages, folder):
    tokenizer = packages(system=False)
    make_writer(folder)("ball")
    assert tokenizer.asked.startswith("<user>You write prompts")
    assert tokenizer.asked.endswith("\n\nball<assistant>")


def test_a_model_that_does_not_chat_continues_a_text_by_a_paragraph(packages, folder):
    tokenizer = packages(chats=False, answer="| A red ball. || Short description: x")
    # The stand-in puts spaces around line breaks.
    tokenizer.decode = lambda ids, **_: " A red ball.\n\nShort description: x"
    assert make_writer(folder)("ball") == "A red ball."
    assert "Short description: ball" in tokenizer.asked and tokenizer.asked.endswith("Paragraph:")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("load", "no causal language model that transformers can load (no file named model"),
        ("generate", "the model cannot answer (index out of range)"),
    ],
)
def test_what_transformers_refuses_is_told_in_one_line(packages, folder, broken, words):
    packages(broken=broken)
    with pytest.raises(ValueError) as error:
        make_writer(folder)("ball")
    assert words in str(error.value) and folder in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [None, "{", "[]", "{}"])
def test_a_folder_of_something_else_is_refused(packages, tmp_path, config):
    packages()
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"no folder with a config\.json that names a model_type"):
        make_writer(str(tmp_path))


def test_without_the_packages_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'sora_jax\[prompts\]'"):
        make_writer(folder)

"""Prompts by any causal language model of `transformers` that lies in a local folder.

A model with a chat template gets the instruction and the prompt as a conversation; one without
gets them as the beginning of a text, and its first paragraph counts. Answers are greedy: the same
prompt gives the same answer. torch and transformers (extra `prompts`) are imported when one is
loaded.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

INSTALL = "a language model needs transformers and torch: pip install 'sora_jax[prompts]'"
MAX_TOKENS = 400  # of an answer
_COMPLETION = "{instruction}\n\nShort description: {prompt}\n\nParagraph:"


def load(folder: str) -> Callable[[str, str], str]:
    """The model in `folder`, as answers to (instruction, prompt).

    Raises:
      ValueError: a package, a file or a model of the right kind is missing; one line.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise ValueError(f"{INSTALL}.")
    try:
        json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--expand-prompt {folder}: no folder with a config.json that names a model_type; give "
            "the folder of a transformers language model."
        ) from error
    return _Model(folder)


class _Model:
    """A loaded model and its tokenizer."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._folder = folder
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if self._device == "cpu" else "auto"
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=dtype
            )
        except Exception as error:  # anyone's files: each class of transformers has its own
            raise ValueError(
                f"--expand-prompt {folder}: no causal language model that transformers can load "
                f"({_first_line(error)})."
            ) from error
        self._model.to(self._device).eval()

    def __call__(self, instruction: str, prompt: str) -> str:
        import torch

        try:
            ids = self._ids(instruction, prompt).to(self._device)
            with torch.inference_mode():
                output = self._model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                    num_beams=1,
                    pad_token_id=self._tokenizer.eos_token_id,
                )
        except Exception as error:  # of the template or the model
            raise ValueError(
                f"--expand-prompt {self._folder}: the model cannot answer ({_first_line(error)})."
            ) from error
        answer = self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return answer if self._chats else answer.strip().split("\n\n")[0]

    @property
    def _chats(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def _ids(self, instruction: str, prompt: str) -> Any:
        if not self._chats:
            text = _COMPLETION.format(instruction=instruction, prompt=prompt)
            return self._tokenizer(text, return_tensors="pt")["input_ids"]
        system = {"role": "system", "content": instruction}
        user = {"role": "user", "content": prompt}
        try:
            text = self._template([system, user])
        except Exception:  # a template's own: some know no system's turn
            text = self._template([{"role": "user", "content": f"{instruction}\n\n{prompt}"}])
        # A template writes the special tokens itself.
        return self._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    def _template(self, messages: list[dict[str, str]]) -> str:
        # Templates that do not know `enable_thinking` do without it.
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

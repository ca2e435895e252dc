"""Captions of clips by any `transformers` image-text-to-text model that lies in a local folder.

A model with a chat template is shown several frames and asked each prompt. One without (BLIP,
GIT, ...) is shown the middle frame, and the prompt is the beginning of the caption that it writes.
torch and transformers (extra `caption`) are imported when a model is loaded, once in each worker.
"""

import functools
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sora_jax.data.build.settings import CaptionSettings

INSTALL = "captions by a model need transformers and torch: pip install 'sora_jax[caption]'"

# Frames of each clip, uint8 (k H W 3), to captions by kind; kinds with nothing to say are absent.
Captioner = Callable[[list[np.ndarray]], list[dict[str, str]]]


class CaptionerError(ImportError):
    """The model cannot be used at all: wrong settings or a missing package, not a wrong file."""


def check_captioner(settings: CaptionSettings) -> None:
    """Finds out without loading anything large whether `make_captioner` can work.

    Raises:
      CaptionerError: a package, the folder or a file of it is missing; one line.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise CaptionerError(f"{INSTALL}.")
    folder = Path(settings.model)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CaptionerError(
            f"caption.model {settings.model!r}: no folder with a config.json that names a "
            "model_type; give the folder of a transformers model."
        ) from error
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CaptionerError(
            f"caption.model {settings.model!r}: a {kind} without weights; give a folder that has "
            "them as .safetensors."
        )


def make_captioner(settings: CaptionSettings) -> Captioner:
    """The captioner that `settings` ask for; the same one for the same settings.

    Clips are captioned `settings.batch_size` at a time, greedily: the same list of clips gives
    the same captions.

    Raises:
      CaptionerError: the model cannot be loaded, or takes no picture; one line.
    """
    check_captioner(settings)
    return _load(
        settings.model,
        tuple(sorted(settings.prompts.items())),
        settings.max_tokens,
        settings.batch_size,
        settings.device or None,
    )


class CaptionQueue:
    """Captions the rows of one file's clips, a batch at a time.

    Without settings, or without a model in them, it wants nothing and does nothing.
    """

    def __init__(self, settings: CaptionSettings | None) -> None:
        self._settings = settings if settings and settings.model else None
        self._rows: list[dict[str, Any]] = []
        self._frames: list[np.ndarray] = []

    def wants(self, row: dict[str, Any]) -> int:
        """How many frames of a clip that stays `add` is to be given; 0 leaves it alone."""
        if not self._settings or (self._settings.only_missing and row["captions"]):
            return 0
        return self._settings.frames

    def add(self, row: dict[str, Any], frames: np.ndarray) -> None:
        """Puts captions into `row`, now or by the time of `flush`.

        Raises:
          CaptionerError: the model cannot be used; one line.
        """
        self._rows.append(row)
        self._frames.append(frames)
        if len(self._rows) == self._settings.batch_size:
            self.flush()

    def flush(self) -> None:
        """Captions what still waits."""
        rows, frames, self._rows, self._frames = self._rows, self._frames, [], []
        if not rows:
            return
        for row, captions in zip(rows, make_captioner(self._settings)(frames), strict=True):
            row["caption_kinds"] = [*row["caption_kinds"], *captions]
            row["captions"] = [*row["captions"], *captions.values()]


@functools.lru_cache(maxsize=1)
def _load(
    model: str,
    prompts: tuple[tuple[str, str], ...],
    max_tokens: int,
    batch_size: int,
    device: str | None,
) -> "_Model":
    return _Model(model, prompts, max_tokens=max_tokens, batch_size=batch_size, device=device)


class _Model:
    """A loaded model; called, it is a `Captioner`."""

    def __init__(
        self,
        folder: str,
        prompts: tuple[tuple[str, str], ...],
        *,
        max_tokens: int,
        batch_size: int,
        device: str | None,
    ) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._max_tokens, self._batch_size = max_tokens, batch_size
        self._device = device or _device(torch)
        dtype = torch.float32 if self._device == "cpu" else "auto"
        try:
            self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            self._model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, dtype=dtype
            )
        except Exception as error:  # anyone's files: each class of transformers has its own
            raise CaptionerError(
                f"caption.model {folder!r} is no image-text-to-text model that transformers can "
                f"load ({_first_line(error)})."
            ) from error
        self._model.to(self._device).eval()
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"  # so that every prompt ends where answers begin
        if getattr(self._tokenizer, "pad_token", "") is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._chats = bool(getattr(self._processor, "chat_template", None))
        self._prompts = dict(prompts)
        if not self._chats:  # an instruction is no beginning of a caption
            ours = CaptionSettings().prompts
            begun = {kind: text for kind, text in prompts if ours.get(kind) != text}
            self._prompts = begun or {"short": ""}
        self._images = self._images_taken(folder)

    @property
    def takes_several(self) -> bool:
        """Whether all frames of a clip are shown, or its middle one alone."""
        return self._images > 1

    def __call__(self, clips: list[np.ndarray]) -> list[dict[str, str]]:
        captions: list[dict[str, str]] = [{} for _ in clips]
        for start in range(0, len(clips), self._batch_size):
            batch = clips[start : start + self._batch_size]
            shown = [self._shown(frames) for frames in batch]
            for kind, prompt in self._prompts.items():
                for i, text in enumerate(self._answers(shown, prompt, self._max_tokens)):
                    if text:
                        captions[start + i][kind] = text
        return captions

    def _shown(self, frames: np.ndarray) -> list[np.ndarray]:
        return list(frames) if self.takes_several else [frames[len(frames) // 2]]

    def _images_taken(self, folder: str) -> int:
        """2 if the model takes several images at once, else 1: found out by showing it some."""
        grey = np.full((64, 64, 3), 128, np.uint8)
        prompt = next(iter(self._prompts.values()))
        for images in (2, 1) if self._chats else (1,):
            try:
                self._answers([[grey] * images], prompt, 1)
                return images
            except Exception as error:  # of the template, the processor or the model
                refusal = error
        raise CaptionerError(
            f"caption.model {folder!r} cannot caption a picture ({_first_line(refusal)})."
        ) from refusal

    def _answers(
        self, clips: Sequence[Sequence[np.ndarray]], prompt: str, max_tokens: int
    ) -> list[str]:
        """What the model says of each clip."""
        import torch
        from PIL import Image

        pictures = [[Image.fromarray(frame) for frame in frames] for frames in clips]
        inputs = self._inputs(pictures, prompt).to(self._device, self._model.dtype)
        with torch.inference_mode():
            output = self._model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, num_beams=1
            )
        given = inputs.get("input_ids")
        if given is not None and output.shape[1] >= given.shape[1]:
            head = output[:, : given.shape[1]]
            if bool((head == given).all()):
                output = output[:, given.shape[1] :]
        texts = self._tokenizer.batch_decode(output, skip_special_tokens=True)
        return [_without_prompt(" ".join(text.split()), prompt) for text in texts]

    def _inputs(self, pictures: list[list[Any]], prompt: str) -> Any:
        if self._chats:
            texts = [self._chat(len(images), prompt) for images in pictures]
            return self._processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        images = [images[0] for images in pictures]
        if not prompt:
            return self._processor(images=images, return_tensors="pt")
        texts = [prompt] * len(images)
        return self._processor(images=images, text=texts, padding=True, return_tensors="pt")

    def _chat(self, images: int, prompt: str) -> str:
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return self._processor.apply_chat_template(messages, add_generation_prompt=True)


def _device(torch: Any) -> str:
    """An accelerator if there is one; workers spread over several by their process ids."""
    if torch.cuda.is_available():
        return f"cuda:{os.getpid() % torch.cuda.device_count()}"
    return "cpu"


def _without_prompt(text: str, prompt: str) -> str:
    """The caption alone, where a model repeats an instruction in front of it.

    Beginnings that are part of the sentence ("a photo of") stay: only whole sentences go.
    """
    prompt = " ".join(prompt.split())
    if prompt.endswith((".", "?", ":", "!")) and text.lower().startswith(prompt.lower()):
        return text[len(prompt) :].strip()
    return text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__

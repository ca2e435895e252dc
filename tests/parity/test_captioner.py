"""Captions by real classes of transformers with random weights, built here: `make parity`."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from sora_jax import video_io
from sora_jax.data.build import captioner
from sora_jax.data.build.captioner import CaptionerError, check_captioner, make_captioner
from sora_jax.data.build.inputs import InputFile
from sora_jax.data.build.run import build
from sora_jax.data.build.settings import BuildSettings, CaptionSettings
from sora_jax.data.build.stages import process_file

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<image>", "USER:", "ANSWER:"]
WORDS = ["describe", "what", "is", "seen", "a", "photo", "of", "red", "ball", "rolls", "left"]
# As published templates of models that take one image do.
ONE_IMAGE = (
    "{% if message['content'] | selectattr('type', 'equalto', 'image') | list | length > 1 %}"
    "{{ raise_exception('one image only') }}{% endif %}"
)
CHAT = (
    "{% for message in messages %}ONEUSER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ANSWER:"
)


def tokenizer(template):
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def lively(model):
    """Weights so large that what is seen changes what is said, which is words alone."""
    for parameter in model.parameters():
        parameter.data = 0.6 * torch.randn_like(parameter)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))
    return model


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    """A folder of a BLIP: no chat template, one image, one embedding of words and pictures."""
    folder = tmp_path_factory.mktemp("blip")
    torch.manual_seed(0)
    words = len(SPECIAL) + len(WORDS)
    config = BlipConfig(
        text_config={
            "vocab_size": words, "hidden_size": 16, "encoder_hidden_size": 16,
            "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2,
            "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
        },
        projection_dim=16,
    )  # fmt: skip
    lively(BlipForConditionalGeneration(config)).save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer("[CLS] $A [SEP]")).save_pretrained(folder)
    return folder


def llava(folder, template):
    torch.manual_seed(0)
    words = len(SPECIAL) + len(WORDS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            image_size=32, patch_size=16,
        ),
        text_config=LlamaConfig(
            vocab_size=words, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, bos_token_id=2, eos_token_id=3,
            pad_token_id=0,
        ),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=4,
    )  # fmt: skip
    lively(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = transformers.CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    transformers.LlavaProcessor(
        images, tokenizer("[CLS] $A"), patch_size=16, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A folder of a LLaVA, which is asked and takes several images."""
    return llava(tmp_path_factory.mktemp("llava"), CHAT.replace("ONE", ""))


@pytest.fixture(scope="module")
def chat_of_one(tmp_path_factory):
    """The same, whose template refuses more than one image."""
    return llava(tmp_path_factory.mktemp("llava_one"), CHAT.replace("ONE", ONE_IMAGE))


def clips(number, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (number, 4, 5, 8, 3), np.uint8)
    return list(coarse.repeat(8, axis=2).repeat(8, axis=3))


def settings(folder, **changes):
    return CaptionSettings(model=str(folder), max_tokens=6, **changes)


def test_a_model_without_chat_template_gets_the_middle_frame_and_no_instruction(blip):
    caption = make_captioner(settings(blip))
    assert not caption.takes_several
    found = caption(clips(3))
    assert [list(captions) for captions in found] == [["short"]] * 3
    middle_alone = caption([np.stack([frames[2]] * 4) for frames in clips(3)])
    assert middle_alone == found


def test_a_prompt_of_ones_own_begins_the_caption(blip):
    caption = make_captioner(settings(blip, prompts={"begun": "a photo of", "free": ""}))
    for captions in caption(clips(2)):
        assert set(captions) == {"begun", "free"} and captions["begun"].startswith("a photo of")
    ours = CaptionSettings().prompts  # as the config has them, when one of them is overridden
    caption = make_captioner(settings(blip, prompts=ours | {"short": "a photo of"}))
    assert [set(captions) for captions in caption(clips(2))] == [{"short"}] * 2


def test_a_model_with_chat_template_sees_every_frame_and_answers_each_prompt(chat, monkeypatch):
    caption = make_captioner(settings(chat))
    assert caption.takes_several
    asked = []
    processor = caption._processor
    monkeypatch.setattr(
        caption, "_processor",
        type("Spy", (), {
            "__call__": lambda self, **given: asked.append(given) or processor(**given),
            "apply_chat_template": processor.apply_chat_template,
        })(),
    )  # fmt: skip
    found = caption(clips(3))
    assert [set(captions) for captions in found] == [{"short", "detailed"}] * 3
    assert [len(images) for given in asked for images in given["images"]] == [4] * 6
    for given in asked:
        assert all(text.count("<image>") == 4 for text in given["text"])
    prompts = CaptionSettings().prompts
    assert prompts["detailed"] in asked[0]["text"][0] and prompts["short"] in asked[1]["text"][0]
    for captions in found:  # the answer alone
        assert not any("USER" in text or "<image>" in text for text in captions.values())


def test_a_template_that_refuses_several_images_gets_one(chat_of_one):
    caption = make_captioner(settings(chat_of_one))
    assert not caption.takes_several
    assert set(caption(clips(1))[0]) == {"short", "detailed"}


@pytest.mark.parametrize("model", ["blip", "chat"])
def test_captions_do_not_depend_on_the_batch(model, request):
    folder = request.getfixturevalue(model)
    one = make_captioner(settings(folder, batch_size=1))(clips(5))
    two = make_captioner(settings(folder, batch_size=2))(clips(5))
    assert one == two
    assert len({json.dumps(captions) for captions in one}) > 1, "pictures must make a difference"


def test_the_model_is_loaded_once(blip, monkeypatch):
    captioner._load.cache_clear()
    loads = []
    init = captioner._Model.__init__
    monkeypatch.setattr(
        captioner._Model, "__init__", lambda *a, **k: loads.append(1) or init(*a, **k)
    )
    for _ in range(3):
        make_captioner(settings(blip))
    assert len(loads) == 1


def test_a_file_s_clips_are_captioned_beside_what_they_have(blip, tmp_path):
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (12, 32, 48, 3), np.uint8), 2, axis=0)
    path = video_io.write_video(tmp_path / "a.mp4", frames, fps=8)
    with_captions = dataclasses.replace(
        BuildSettings.from_config({
            "shots": {"enabled": False}, "freeze": {"enabled": False}, "motion": {"enabled": False},
            "length": {"min_seconds": 0.5}, "cut": {"max_seconds": 0.75},
        }),
        caption=settings(blip, batch_size=3),
    )  # fmt: skip
    staging = tmp_path / "staging"
    staging.mkdir()
    row = process_file(
        InputFile(str(path), "a.mp4", (("sidecar", "noise"),)), with_captions, staging
    )
    assert row["error"] is None and len(row["clips"]) == 4
    for clip in row["clips"]:
        assert clip["dropped"] is None
        assert clip["caption_kinds"] == ["sidecar", "short"]
        assert clip["captions"][0] == "noise" and clip["captions"][1]
    only_missing = dataclasses.replace(
        with_captions, caption=dataclasses.replace(with_captions.caption, only_missing=True)
    )
    row = process_file(
        InputFile(str(path), "a.mp4", (("sidecar", "noise"),)), only_missing, staging
    )
    assert all(clip["captions"] == ["noise"] for clip in row["clips"])


def test_a_build_captions_in_its_workers(blip, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "raw").mkdir()
    for name in ("a", "b"):
        picture = rng.integers(0, 255, (3, 4, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
        video_io.save_image(tmp_path / "raw" / f"{name}.png", picture)
    build_settings = dataclasses.replace(
        BuildSettings.from_config({
            "shots": {"enabled": False}, "blur": {"enabled": False}, "duplicate": {"enabled": False}
        }),
        caption=settings(blip),
    )  # fmt: skip
    report = build(tmp_path / "raw", tmp_path / "set", build_settings, workers=1, captions="error")
    assert report["totals"]["clips_kept"] == 2
    assert report["tallies"]["caption_kind"] == {"short": 2}
    assert all(clip["captions"] for clip in report["clips_shown"])


def test_what_cannot_caption_is_named_in_one_line(blip, tmp_path):
    with pytest.raises(CaptionerError, match=r"no folder with a config.json") as error:
        check_captioner(settings(tmp_path / "absent"))
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(CaptionerError, match="a t5 without weights"):
        check_captioner(settings(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"")
    check_captioner(settings(tmp_path))
    with pytest.raises(CaptionerError, match="no image-text-to-text model") as error:
        make_captioner(settings(tmp_path))
    assert "\n" not in str(error.value)

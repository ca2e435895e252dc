"""Makes tests/goldens/text*.npz from transformers' T5, UMT5 and ByT5 (tiny, random, float32).

Usage, in an environment with the `parity` extra: python tools/make_goldens_text.py [FOLDER]
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

TEXTS = [
    "a red ball rolls left",
    "",
    "Ein großer Vogel fliegt über das Meer, nachts.",
    "日本の海と赤い船",
    "naïve café — “quoted” … 100 % £5",
    "🦊 and 👩‍🚀 spin; tab-free {json: [1, 2]} <b>x</b> \\n",
    "Приглушённый свет; العربية; हिन्दी",
]
SIZES = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
MODELS = {
    "umt5": (UMT5EncoderModel, UMT5Config, "gated-gelu"),
    "t5_gated": (T5EncoderModel, T5Config, "gated-gelu"),
    "t5_relu": (T5EncoderModel, T5Config, "relu"),
}
VALID = (37, 20, 1)  # real tokens of each row; the longest is three times max_distance


def tokenizer_golden() -> dict[str, np.ndarray]:
    tokenizer = ByT5Tokenizer()
    batch = tokenizer(TEXTS, padding="max_length", max_length=96, truncation=True)
    mask = np.array(batch["attention_mask"], np.bool_)
    ids = np.array(batch["input_ids"], np.int32)
    return {"texts": np.array(TEXTS), "ids": ids, "mask": mask, "lengths": mask.sum(1)}


def model_golden(name: str) -> dict[str, np.ndarray]:
    model_class, config_class, mlp = MODELS[name]
    torch.manual_seed(sum(map(ord, name)))
    # eval: dropout would move the outputs by .04.
    model = model_class(config_class(**SIZES, feed_forward_proj=mlp)).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            # Norms away from 1 and large biases, so that leaving one out shows.
            if "layer_norm" in key:
                value.uniform_(0.5, 1.5)
            elif "relative_attention_bias" in key:
                value.normal_(0, 1)
    length = max(VALID)
    mask = torch.arange(length)[None] < torch.tensor(VALID)[:, None]
    ids = torch.randint(3, SIZES["vocab_size"], mask.shape) * mask
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    tensors = {key: value.numpy() for key, value in model.state_dict().items()}
    golden = {"ids": ids.numpy().astype(np.int32), "mask": mask.numpy(), "output": output.numpy()}
    return golden | {f"param:{key}": value for key, value in tensors.items()}


def buckets_golden() -> dict[str, np.ndarray]:
    relative = torch.arange(-300, 301)
    golden = {"relative": relative.numpy().astype(np.int32)}
    for num_buckets, max_distance in ((32, 128), (8, 12), (64, 256)):
        config = UMT5Config(
            **SIZES
            | {
                "relative_attention_num_buckets": num_buckets,
                "relative_attention_max_distance": max_distance,
            }
        )
        attention = UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
        buckets = attention._relative_position_bucket(relative)
        golden[f"{num_buckets}_{max_distance}"] = buckets.numpy().astype(np.int32)
    return golden


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "text_tokenizer.npz", **tokenizer_golden())
    np.savez_compressed(folder / "text_buckets.npz", **buckets_golden())
    for name in MODELS:
        np.savez_compressed(folder / f"text_{name}.npz", **model_golden(name))


if __name__ == "__main__":
    here = pathlib.Path(__file__).parents[1]
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "tests" / "goldens")

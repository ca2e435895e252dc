"""Pipelines from inference folders: which parts there are, where they go, what made them."""

from collections.abc import Sequence
from pathlib import Path

from sora_jax.convert import folder
from sora_jax.convert.lora import LoRA
from sora_jax.convert.sampling import by_token, read_sampling
from sora_jax.convert.tensors import hash_files
from sora_jax.generate import conditions
from sora_jax.generate.experts import Experts, Part
from sora_jax.generate.mesh import sampling_mesh
from sora_jax.generate.pipeline import Pipeline


def load_pipeline(
    path: str | Path,
    *,
    loras: Sequence[LoRA] = (),
    loras_2: Sequence[LoRA] = (),
    dtype: str = "float32",
    mesh: str = "none",
    weights: bool = True,
) -> Pipeline:
    """Loads an inference checkpoint, in diffusers' folders or as loose official files.

    Args:
      loras: merged into the transformer.
      loras_2: merged into the second of two transformers.
      dtype: of weights and matrix products, "float32" or "bfloat16"; the VAE's stay float32.
      mesh: the devices that one batch of videos runs on: `mesh.sampling_mesh`.
      weights: False leaves them unread until `load_weights`, or until a video is made:
        settings and sizes can be checked and counted before.

    Raises:
      ValueError: naming the missing or damaged file and tensor, or what a LoRA does not fit.
    """
    path = Path(path)
    held = folder.held(path)
    index = folder.read_index(path)
    boundary = index.boundary_ratio
    if ("dit_2" in held) != (boundary is not None):
        raise ValueError(
            f"{path}: model_index.json has boundary_ratio {boundary}, and transformer_2 is "
            f"{'there' if 'dit_2' in held else 'not there'}; two experts need both."
        )

    on_mesh = sampling_mesh(mesh, heads=folder.find_component(path, "dit")[0].num_heads)
    merged = {"dit": loras, "dit_2": loras_2}
    if loras_2 and "dit_2" not in held:
        raise ValueError(f"{path}: has one transformer; give its LoRA files as --lora.")

    def load(name: str) -> Part:
        swapped = boundary is not None and name in merged
        opened = folder.open_component(
            path,
            name,
            loras=merged.get(name, ()),
            dtype="float32" if name == "vae" else dtype,
            mesh=None if swapped else on_mesh,
        )
        read = Experts.in_host_memory(opened.load) if swapped else opened.load
        return Part(opened.config, opened.graphdef, opened.abstract, read)

    transformers = [load(name) for name in merged if name in held]
    experts = Experts(transformers, boundary, mesh=on_mesh)
    vae, dit = load("vae"), experts.parts[0]
    expand = index.expand_timesteps
    sampling = read_sampling(path)
    tokens_have_times = by_token(index, sampling)
    way = conditions.takes(dit.config, vae.config, expand_timesteps=tokens_have_times)
    if dit.config.image_dim is not None and "image" not in held:
        raise ValueError(
            f"{path}: the transformer attends to pictures; add its CLIP image encoder."
        )
    text, tokenizer = load("text"), folder.open_tokenizer(path)
    image = load("image") if "image" in held else None
    conditions.check_parts(
        dit.config,
        text.config,
        None if image is None else image.config,
        vocab_size=tokenizer.vocab_size,
    )
    info = {"checkpoint": path.name, "checkpoint_sha256": folder.checkpoint_hash(path)}
    for name, files in (("loras", loras), ("loras_2", loras_2)):
        if files:
            info[name] = [[hash_files(lora.files)[:16], lora.scale] for lora in files]
    if boundary is not None:
        info["boundary_ratio"] = boundary
    if expand:
        info["expand_timesteps"] = True
    if dtype != "float32":
        info["dtype"] = dtype
    if on_mesh is not None:  # other sums round otherwise
        info["mesh"] = ",".join(f"{n}={size}" for n, size in on_mesh.shape.items() if size > 1)
    pipeline = Pipeline(
        experts=experts,
        vae=vae,
        text=text,
        image=image,
        tokenizer=tokenizer,
        sampling=sampling,
        way=way,
        info=info,
        mesh=on_mesh,
    )
    if weights:
        pipeline.load_weights()
    return pipeline

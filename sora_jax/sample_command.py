"""What `sora-jax sample` does: requests from its arguments, a report of stages, files."""

import time
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

import sora_jax
from sora_jax import agreement, task_command, video_io
from sora_jax.convert import folder
from sora_jax.generate import Pipeline, Request, Video, array_hash, conditions, given_kv
from sora_jax.generate.preview import check_preview, watched
from sora_jax.generate.video import Film, check_beside, sheet_path
from sora_jax.progress import LearnedProgress, Progress
from sora_jax.prompts import timed, writers

AT_ONCE = 8  # videos denoised together at most
_NAMES = (
    *("negative_prompt", "frames", "fps", "steps", "guidance", "guidance_2"),
    *("guidance_interval", "past_guidance_interval", "guidance_rescale"),
    *("guidance_blocks", "guidance_blocks_interval"),
    *("shift", "solver", "schedule", "cache_threshold", "kv_cache"),
)
_PICTURES = ("image", "last_image")
_TASK_STAGE = "make"  # a task's windows are denoised, decoded and written in turn


def run(args: Namespace) -> list[Path]:
    """Writes the videos that `args` ask for, and prints how long each stage took.

    Of several processes (`--distributed`) all compute and read what is given; the first writes
    and prints.

    Raises:
      ValueError: one line: what was given, what is allowed, what to change.
    """
    begun = time.perf_counter()
    task = task_command.asked(args)
    out = Path(args.out)
    arrays = {"latents": args.save_latents, "text_emb": args.save_text_embeddings}
    arrays = {name: Path(path) for name, path in arrays.items() if path is not None}
    if writes():
        video_io.check_output_path(out)
        if task is not None:
            check_beside(out, sheet=args.sheet)
        if args.preview is not None:
            check_preview(args.preview, out=out)
        for path in arrays.values():
            video_io.check_output_path(path, allowed=(".npy",))
    noise = None if args.noise is None else _read_noise(Path(args.noise))
    pictures = [_read_picture(getattr(args, name)) for name in _PICTURES]
    padded = args.fit == "pad" and task is None
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: use 1 or more.")
    again = _read_metadata(Path(args.again)) if args.again else {}
    if again:
        if padded:
            pictures = _padded(pictures, (again["width"], again["height"]))
        _check_again(args, again, noise, pictures)
    prompts = [again["prompt"]] if again else _prompts(args)
    console = Console(stderr=True, highlight=False, quiet=not writes())
    dtype = args.dtype or again.get("dtype", "float32")
    # Bit for bit, a video is made again on the mesh that made it.
    mesh = args.mesh or (again.get("mesh", "none") if again else "auto")
    pipe = sora_jax.load(
        args.checkpoint,
        loras=args.lora,
        loras_2=args.lora_2,
        dtype=dtype,
        mesh=mesh,
        weights=False,  # first all that was given is checked
    )
    if task is None:
        conditions.check(pipe.way, pipe.dit.config, pictures)
    else:
        task_command.check(pipe, task, args)
    if again and again["checkpoint_sha256"] != pipe.info["checkpoint_sha256"]:
        raise ValueError(
            f"{args.again} was made by checkpoint {again['checkpoint_sha256']}, "
            f"{args.checkpoint} is {pipe.info['checkpoint_sha256']}; give its --checkpoint."
        )
    for name, flag in (("loras", "--lora"), ("loras_2", "--lora-2")):
        made, given = (info.get(name) for info in (again, pipe.info))
        if again and made != given:
            raise ValueError(
                f"{args.again} was made with LoRA files (hash, scale) {made or 'none'}, given are "
                f"{given or 'none'}; give the same with {flag}."
            )
    for name in ("boundary_ratio", "expand_timesteps"):
        if again and again.get(name) != pipe.info.get(name):
            raise ValueError(
                f"{args.again} was made with {name} {again.get(name)}, model_index.json now says "
                f"{pipe.info.get(name)}; set it back."
            )
    if again and again.get("cache_sha256") not in (None, pipe.cache_hash):
        raise ValueError(
            f"{args.again} was made with another feature_cache in sampling.json; set it back."
        )
    settings = {name: getattr(args, name) for name in _NAMES} | {"size": parse_size(args.size)}
    if padded and not again:
        request = pipe.request(prompts[0], **settings)
        pictures = _padded(pictures, (request.width, request.height))
    if again:
        settings = {name: again.get(name) for name in _NAMES}
        settings["size"] = (again["width"], again["height"])
    given = [again.get("prompt_given")] if again else [None] * len(prompts)
    if args.expand_prompt is not None:
        first = pipe.request(prompts[0], **settings)  # before a writer is asked, which may be slow
        given, prompts = prompts, _expand(args, prompts, console, picture=first.frames == 1)
    if task is not None:
        prompt = _cut(pipe, prompts[0], console)
        pipe.request(prompt, **settings)  # refuses what no video can have before weights are read
        return [_run_task(pipe, task, args, prompt, settings, console, begun, given[0])]
    first_seed = again.get("seed", args.seed or 0)
    requests = [
        pipe.request(_cut(pipe, prompt, console), seed=first_seed + i, **settings)
        for prompt in prompts
        for i in range(args.batch)
    ]
    given_kv.check(requests[0], given=pictures[0] is not None)
    video_io.check_rate(out, requests[0].fps)
    if writes():
        for i in range(len(requests)):
            path = video_io.check_output_path(_numbered(out, i, len(requests)))
            check_beside(path, sheet=args.sheet)
    together = again.get("batch_size", min(len(requests), AT_ONCE))
    if (arrays or noise is not None) and len(requests) > together:
        raise ValueError(
            f"--noise, --save-latents and --save-text-embeddings are for up to {together} videos "
            f"that are denoised together; these are {len(requests)}."
        )
    pipe.load_weights()
    _line(console, "load", time.perf_counter() - begun)
    written = []
    for start in range(0, len(requests), together):
        chunk = requests[start : start + together]
        tensors: dict[str, np.ndarray] = {}
        videos = _denoise(
            pipe,
            chunk,
            together,
            console,
            preview=args.preview,
            noise=noise,
            pictures=pictures,
            on_tensor=tensors.__setitem__,
        )
        clock = time.perf_counter()
        if noise is not None:
            for video in videos:
                video.metadata["noise_sha256"] = array_hash(noise)
        if not writes():
            continue
        for offset, video in enumerate(videos):
            _note(video, given[(start + offset) // args.batch])
            path = _numbered(out, start + offset, len(requests))
            written.append(video.save(path))
            if args.sheet:
                write_sheet(video, path)
        for name, path in arrays.items():
            with video_io.atomic_path(path) as temporary, temporary.open("wb") as file:
                np.save(file, tensors[name])
        _line(console, "write", time.perf_counter() - clock)
    for path in written:
        print(path)
    _line(console, "in all", time.perf_counter() - begun)
    return written


def _run_task(pipe, task, args, prompt, settings, console, begun, given) -> Path:
    """Makes and writes the video of a task; `given` is what its prompt was made of, if anything."""
    make = task_command.prepare(pipe, task, args, prompt, settings)
    clock = time.perf_counter()

    def loaded() -> None:
        nonlocal clock
        clock = time.perf_counter()
        _line(console, "load", clock - begun)

    pipe.load_when_needed(loaded)
    with LearnedProgress("denoising") as progress:
        on_step = watched(pipe, args.preview, progress.on_step, fps=args.fps)
        made = make(on_step=on_step)
        _note(made, given)
        path = save(made, Path(args.out), sheet=args.sheet)
    _line(console, _TASK_STAGE, time.perf_counter() - clock)
    if writes():
        print(path)
    _line(console, "in all", time.perf_counter() - begun)
    return path


def save(made: Video | Film, path: Path, *, sheet: bool) -> Path:
    """Writes a video, or a film as it is made; of several processes only the first does."""
    if writes():
        return task_command.save(made, path, sheet=sheet)
    if isinstance(made, Film):
        for _ in made.parts:  # made while they are asked for
            pass
    return path


def writes() -> bool:
    """Whether this is the process that writes files, of several the first."""
    return jax.process_index() == 0


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(width, height) of "WxH"; None of None.

    Raises:
      ValueError: for anything else.
    """
    return None if text is None else task_command.parse_size(text)


def _check_again(
    args: Namespace,
    again: dict,
    noise: np.ndarray | None,
    pictures: list[np.ndarray | None],
) -> None:
    """Raises ValueError for anything that would make another video than the recorded one."""
    if made := again.get("task"):
        raise ValueError(
            f"{args.again} was made by {made['name']} from other files; give that command again."
        )
    given = [name for name in (*_NAMES, "size") if getattr(args, name) is not None]
    given += ["seed"] * (args.seed is not None) + ["batch"] * (args.batch != 1)
    others = ("dtype", "mesh", "expand_prompt")
    given += [name for name in others if getattr(args, name) is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--again takes all settings from {args.again}; leave out {flags}.")
    wanted = again.get("noise_sha256")
    if wanted != (None if noise is None else array_hash(noise)):
        how = (
            f"from a noise file ({wanted}); give it with" if wanted else "from its seed; leave out"
        )
        raise ValueError(f"{args.again} was made {how} --noise.")
    for name, picture in zip(_PICTURES, pictures, strict=True):
        made_from = again.get(f"{name}_sha256")
        if made_from != (None if picture is None else array_hash(picture)):
            flag = f"--{name.replace('_', '-')}"
            how = f"from picture {made_from}; give it with" if made_from else "without; leave out"
            fit = ", and --fit as it was then" if made_from and picture is not None else ""
            raise ValueError(f"{args.again} was made {how} {flag}{fit}.")
    if noise is not None and len(noise) > 1:
        raise ValueError(
            f"{args.again} is one of {len(noise)} videos made together from one noise file; give "
            "the command that made them once more, without --again."
        )


def _read_noise(path: Path) -> np.ndarray:
    """Raises ValueError, in one line, unless `path` is a .npy file of finite numbers."""
    try:
        noise = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"--noise {path}: not a readable .npy file ({error}).") from error
    if not isinstance(noise, np.ndarray):
        raise ValueError(f"--noise {path}: an archive of arrays; give a single array as .npy.")
    if noise.dtype.kind not in "fiu" or not np.isfinite(noise).all():
        raise ValueError(f"--noise {path}: must hold finite numbers, its type is {noise.dtype}.")
    return noise[None] if noise.ndim == 4 else noise


def _read_picture(path: str | None) -> np.ndarray | None:
    """The picture in a file, or the first frame of a video, as RGB."""
    if path is None:
        return None
    return video_io.read_video(path, num_frames=1).frames[0]


def _padded(pictures: list[np.ndarray | None], size: tuple[int, int]) -> list[np.ndarray | None]:
    """The pictures whole within `size` (width, height)."""
    return [None if p is None else video_io.pad(p, size[::-1]) for p in pictures]


def _denoise(
    pipe: Pipeline,
    chunk: list[Request],
    together: int,
    console: Console,
    *,
    preview: str | None,
    **options,
) -> list[Video]:
    """The chunk's videos; a short chunk is filled up, so that one program serves all."""
    full = chunk + chunk[-1:] * (together - len(chunk))
    computed = int(pipe.denoise.computed(chunk[0]).sum())
    with Progress("denoising", total=computed) as progress:
        videos = pipe.run(
            full,
            on_stage=lambda name, seconds: _line(console, name, seconds),
            on_step=watched(
                pipe, preview, lambda step, *_: progress.update(step), fps=chunk[0].fps
            ),
            **options,
        )
    return videos[: len(chunk)]


def write_sheet(video: Video, path: Path) -> Path:
    """A contact sheet of the video's frames as PNG beside it."""
    sheet = video_io.contact_sheet(
        video.frames, columns=min(9, len(video.frames)), labels=[video.metadata["prompt"]]
    )
    return video_io.save_image(sheet_path(path), sheet)


def _line(console: Console, name: str, seconds: float) -> None:
    console.print(f"{name:>10} {seconds:7.2f} s")


def _prompts(args: Namespace) -> list[str]:
    if args.prompts_file is None:
        return [args.prompt]
    path = Path(args.prompts_file)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise ValueError(f"--prompts-file {path}: {what}; give a file with one prompt a line.")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts-file {path}: not UTF-8 ({error}); save it as that.") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file {path}: holds no prompt; write one a line.")
    return prompts


def _expand(args: Namespace, prompts: list[str], console: Console, *, picture: bool) -> list[str]:
    """The prompts in the words of the writer that --expand-prompt names, shown."""
    expanded = None
    if writes():
        name = args.expand_prompt
        writer = writers.make_writer(name, checkpoint=args.checkpoint, picture=picture)
        expanded = [writers.expand(prompt, writer) for prompt in prompts]
    expanded = agreement.of_first(expanded)  # a writer may answer differently every time
    for prompt in expanded:
        console.print(f"{'prompt':>10} {prompt}", markup=False, soft_wrap=True)
    return expanded


def _note(video: Video | Film, given: str | None) -> None:
    """Records what a prompt was before it was expanded."""
    if given is not None:
        video.metadata["prompt_given"] = given


def _cut(pipe: Pipeline, prompt: str, console: Console) -> str:
    """The prompt as the text encoder can take it; says how a long one was cut."""
    limit = pipe.sampling.text_tokens
    kept, was_cut = timed.truncate(prompt, pipe.tokenizer, limit)
    if was_cut:
        text = f"prompt is longer than {limit} tokens and was cut to: {kept!r}"
        console.print(text, markup=False, soft_wrap=True)
    return kept


def _read_metadata(path: Path) -> dict:
    metadata = folder.read_json(path) if path.suffix == ".json" else video_io.read_metadata(path)
    needed = {"prompt", "seed", "width", "height", "checkpoint_sha256", *_NAMES}
    newer = {"guidance_blocks": (), "guidance_blocks_interval": (0.0, 1.0)}
    newer |= {"cache_threshold": 0.0, "kv_cache": 1, "past_guidance_interval": (0.0, 1.0)}
    needed -= {"guidance_2", *newer}  # what older files may lack
    if missing := needed - set(metadata):
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}; give a video made here.")
    return newer | metadata  # and not what the checkpoint has by now


def _numbered(out: Path, index: int, count: int) -> Path:
    if count == 1:
        return out
    return out.with_name(f"{out.stem}-{index:0{len(str(count - 1))}d}{out.suffix}")

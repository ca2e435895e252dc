"""Your own clips: a folder of MP4, MOV, WebM, GIF, PNG or JPEG with sidecar .txt captions.

sora-jax train --config configs/folder.py:vae --workdir runs/my_vae --config.data.path=DIR
sora-jax convert export --checkpoint runs/my_vae --out runs/my_vae/export
sora-jax train --config configs/folder.py --workdir runs/mine --config.data.path=DIR \
    --config.vae_checkpoint=runs/my_vae/export

The sizes are those of the Paperworld recipe, so that two cores can try it; for more, raise
data.width, data.height, vae.base_dim, dit.depth and dit.width.
"""

from configs import paperworld, paperworld_vae


def get_config(arg: str = "full"):
    smoke = "smoke" if arg.endswith("smoke") else "full"
    if arg in ("vae", "vae_smoke"):
        c = paperworld_vae.get_config(smoke).unlock()
    elif arg in ("full", "smoke"):
        c = paperworld.get_config(smoke).unlock()
        c.data.cache = ""
    else:
        raise ValueError(
            f"folder: unknown variant {arg!r}; use 'full', 'vae', 'smoke' or 'vae_smoke'."
        )
    c.data.kind = "folder"
    c.data.path = ""  # give it with --config.data.path=DIR
    return c.lock()

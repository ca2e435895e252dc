"""Every configuration key, with its unit. Run files call `get_config` and change what differs."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """An unlocked ConfigDict; a run file assigns its differences and locks it."""
    c = ConfigDict()
    c.stage = "dit"  # "vae": reconstruction; "dit": diffusion transformer and text encoder
    c.seed = 0
    c.num_steps = 1000  # optimizer steps in all
    c.batch_size = 8  # clips a step, over all devices and processes
    c.init_from = ""  # inference folder whose weights start this run; "" starts from scratch

    # Devices along each mesh axis; -1 takes the rest.
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "context": 1})

    c.data = ConfigDict()
    c.data.kind = "paperworld"  # "paperworld", "folder", "tfds", "clips" or "latents"
    # Directory of a "folder", data_dir of a "tfds" set, output of `sora-jax data build` ("clips")
    # or of `sora-jax data cache` ("latents").
    c.data.path = ""
    # Of "clips", width and height 0 keep every clip's own size, and frames are at most so many.
    c.data.width = 64  # pixels
    c.data.height = 64  # pixels
    c.data.frames = 17  # 1 + a multiple of the VAE's temporal factor
    c.data.fps = 8.0  # frames a second that clips are resampled to; of "clips", 0 keeps their own
    # Of "paperworld": shares of kinds of scenes, as data/paperworld/settings.py has them.
    c.data.world = ConfigDict()
    c.data.random_start = False  # of "clips": windows anywhere in a longer clip, not its first
    c.data.seed = 0  # of the data set itself; c.seed orders it
    c.data.threads = 2  # reader threads of each process
    c.data.workers = 0  # reader processes of each process; 0 reads in threads
    c.data.cache = ""  # directory of encoded latents; "" encodes on the fly
    c.data.cache_clips = 0  # clips to encode into the cache; 0 is all
    c.data.text_embeddings = False  # read them from the cache (`data cache --text`)
    c.data.sample_posterior = False  # draw cached latents from their posterior, not its mean
    c.data.first_frames = 0  # latent frames kept of longer cached clips; 0 is all
    c.data.caption_fps = False  # add the frames a second to captions
    c.data.flip = False  # mirror clips whose caption names no direction
    # Several sources in one: name -> {"weight": share of the records, keys of data that differ}.
    c.data.parts = ConfigDict()

    # "fixed": batch_size clips of one size. "pack": batch_size rows, each a budget of tokens filled
    # with clips and images of any sizes. "bucket": as many clips of one size as bucket_tokens hold.
    c.data.batching = "fixed"
    c.data.bucket_tokens = 16384  # video tokens a batch, over all devices and processes
    c.data.pack = ConfigDict()
    c.data.pack.tokens = 4096  # video tokens a row
    c.data.pack.text_tokens = 1024  # text tokens a row
    c.data.pack.max_segments = 16  # clips and images a row
    c.data.pack.look_ahead = 64  # rows open at a time while packing
    c.data.pack_weight = "clip"  # what counts alike in the loss: every "clip", or every "token"

    c.vae = ConfigDict()  # read when stage is "vae"; the fields of vae.model.VAEConfig
    c.vae.base_dim = 96  # channels of the encoder's first level
    c.vae.decoder_base_dim = 0  # of the decoder's last; 0 is base_dim
    c.vae.z_dim = 16  # latent channels
    c.vae.dim_mult = (1, 2, 4, 4)  # channels of each level, times base_dim
    c.vae.num_res_blocks = 2  # residual blocks a level
    c.vae.temporal_downsample = (False, True, True)  # which levels halve the frame rate
    c.vae.patch_size = 1  # pixels folded into channels in front of the first level
    c.vae.is_residual = False  # Wan 2.2's residual up and down sampling
    c.vae.dtype = "float32"  # operands of convolutions; "bfloat16" on accelerators
    # Checkpoints: folders, names of shipped weights ("paperworld") or hub ids.
    c.vae_checkpoint = ""  # stage "dit": that whose VAE is used
    # Inference folder whose text encoder is used as it is (in text.dtype); "" trains one of
    # config.text with the DiT.
    c.text_checkpoint = ""
    c.image_checkpoint = ""  # folder whose image encoder is used, where dit.image_dim is set

    c.vae_loss = ConfigDict()
    c.vae_loss.l1 = 1.0
    c.vae_loss.l2 = 1.0
    c.vae_loss.multiscale = 1.0  # finite differences at several scales
    c.vae_loss.kl = 1e-6  # nats per latent value
    c.vae_loss.adversarial = 0.0  # hinge loss of a patch discriminator; 0 trains none
    c.vae_loss.crop = (17, 64, 64)  # frames, height, width of the random crops trained on
    c.vae_loss.crops = 1  # crops taken from each clip

    c.text = ConfigDict()  # fields of text.t5.T5Config
    c.text.vocab_size = 384  # bytes, and ByT5's special tokens
    c.text.width = 256
    c.text.head_dim = 64
    c.text.mlp_dim = 640
    c.text.depth = 4
    c.text.num_heads = 4
    c.text.dtype = "float32"
    c.text.remat = False  # recompute each layer in the backward pass
    c.text_tokens = 224  # tokens a caption is cut or padded to
    # Folder of a tokenizer (tools/train_tokenizer.py), or a checkpoint with one; "" reads bytes.
    c.tokenizer = ""

    c.dit = ConfigDict()  # fields of dit.model.DiTConfig; out_channels follow the VAE
    c.dit.patch_size = (1, 2, 2)  # latents folded into one token: frames, height, width
    c.dit.in_channels = 0  # 0: those of the VAE; more where masks and images come in beside noise
    c.dit.image_dim = 0  # width of image features in cross-attention; 0 is without
    c.dit.image_positions = 0  # rows of image features with a learned position each
    c.dit.depth = 12
    c.dit.width = 384
    c.dit.num_heads = 6
    c.dit.ffn_dim = 1536
    c.dit.dtype = "float32"  # operands of matrix products; "bfloat16" on accelerators
    c.dit.quantization = "none"  # "int8" or "float8" products in the blocks' linear layers
    # What blocks keep for the backward pass: "none" recomputes nothing, "full" all; or "dots",
    # "dots_no_batch", "attention_out", "dots_no_batch_attention_out"; "offload",
    # "attention_out_offload_input" and "attention_out_offload" send the input, or both, to the
    # hosts' memory.
    c.dit.remat = "none"
    # Blocks one after the other in place of a loop: faster steps of small models, a longer compile.
    c.dit.unroll = False
    c.dit.context = "auto"  # tokens over mesh.context: "ulysses", "ring", or both as heads divide

    c.diffusion = ConfigDict()
    c.diffusion.kind = "logit_normal"  # distribution of t: "logit_normal" or "uniform"
    c.diffusion.mean = 0.0
    c.diffusion.std = 1.0
    # Moves t towards noise, the more tokens a video has: a line in the root of their number, in
    # training and sampling alike; equal shifts are a constant, and 1 is none.
    c.diffusion.shift = ConfigDict(
        {"tokens_lo": 256, "shift_lo": 1.0, "tokens_hi": 4096, "shift_hi": 1.0}
    )
    c.diffusion.text_dropout = 0.1  # share of captions dropped, for guidance

    # Shares of the masks in training: sora_jax/diffusion/tasks.py has their names. "none" is text
    # to video; of the others a part of the video is given. A model makes the tasks it has seen.
    c.tasks = ConfigDict()
    c.tasks.weights = ConfigDict({"none": 1.0})
    c.tasks.given_noise = 0.0  # given tokens are noised up to this time in half of the examples
    c.tasks.frame_noise = 0.0  # share of examples in which each frame has a time of its own

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # or "muon": fewer steps for the same loss; one rate serves both
    c.optim.peak_lr = 1e-3
    c.optim.warmup_steps = 100
    c.optim.final_lr = 0.0  # share of peak_lr at the last step
    # "wsd" holds peak_lr until the last decay_share of the steps, so that a run may be made longer
    # (--config.num_steps, until its rate falls) or ended early with nothing lost.
    c.optim.schedule = "cosine"
    c.optim.decay_share = 0.2
    c.optim.b1 = 0.9
    c.optim.b2 = 0.99
    c.optim.weight_decay = 0.01  # on matrices and kernels alone
    c.optim.grad_clip = 1.0  # global norm
    c.optim.accumulate = 1  # micro-batches a step
    c.optim.ema_decay = 0.999  # 0 keeps no average
    # Matrices between steps: "bfloat16" takes half the memory, and rounds each update at random.
    c.optim.param_dtype = "float32"
    c.optim.moment_dtype = "float32"  # of the optimizer's moments: or "bfloat16"
    c.optim.offload = False  # moments wait in the hosts' memory
    c.optim.freeze = ()  # parameter paths held as they are, such as ("vae/encoder",)

    c.sample = ConfigDict()  # previews, and the defaults written into exports
    c.sample.width = c.sample.height = 0  # pixels; 0 is as config.data has them
    c.sample.fps = 0.0  # frames a second; 0 is as config.data has them
    c.sample.steps = 30
    c.sample.guidance = 3.0
    c.sample.guidance_interval = (0.0, 1.0)  # flow times between which guidance acts
    # The same in windows of a film that go on from the one before; () is as guidance_interval.
    c.sample.past_guidance_interval = ()
    c.sample.guidance_rescale = 0.0  # in [0, 1]; against over-saturation at large scales
    # Blocks in which frames of guidance's half without the prompt do not see each other.
    c.sample.guidance_blocks = ()
    c.sample.guidance_blocks_interval = (0.0, 1.0)  # flow times between which that is so
    c.sample.solver = "unipc"  # or "dpmpp_2m", "ab2", "heun", "euler"
    c.sample.schedule = "wan"  # as diffusers' UniPC; or "flow_match_euler", or "linear" in t
    c.sample.refine_prefix = ""  # words before captions of parts of larger pictures
    # How far what the blocks add may move before they run again; 0 runs them at every step. Acts
    # in exports that `tools/calibrate_cache.py` has measured.
    c.sample.cache_threshold = 0.0
    c.sample.prompts = ("a red ball rolls left in the meadow",)

    c.log_every = 20  # steps
    c.sample_every = 1000  # steps; 0 never
    c.checkpoint_every = 500  # steps
    c.checkpoints_kept = 2  # the newest
    c.checkpoint_every_kept = 0  # steps whose multiples are kept for ever; 0 none
    c.checkpoint_best = 0  # so many of the lowest mean train/loss are kept as well
    # A folder on each host's own disk for copies that are more frequent; "" makes none.
    c.local_checkpoint_dir = ""
    c.local_checkpoint_every = 50  # steps

    # Steps whose loss or gradient is not finite change nothing but the step count.
    c.skip = ConfigDict()
    c.skip.in_row = 0  # so many in a row may be; one more stops the run
    c.skip.in_all = 100  # and so many in all
    c.skip.grad_norm = 0.0  # skip above so many times the median of the last 100 norms; 0 never
    c.watchdog_minutes = 30.0  # without a step: stacks are dumped, after twice that it exits; 0 off
    c.profile = ConfigDict()
    c.profile.steps = ()  # first and last step of a trace for xprof; `touch WORKDIR/trace` too
    c.wandb_project = ""  # Weights & Biases; "" sends nothing
    return c

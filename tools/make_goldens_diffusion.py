"""Writes tests/goldens/diffusion.npz: what diffusers' flow schedulers do on fixed velocities.

    python tools/make_goldens_diffusion.py tests/goldens/diffusion.npz

Needs the `parity` extra (torch, diffusers 0.42.1). Two things are recorded:

- trajectories of UniPC (order 2, bh2, flow prediction, shift 3, integer timesteps) and of
  FlowMatchEuler (shift 3) on a two-component Gaussian mixture, x after every step;
- the error of UniPC-2 and DPM-Solver++(2M) at 8 to 128 steps on the exact Gaussian
  (mean 1.5, standard deviation .5): RMS of x0 - (1.5 + .5 x1) over 101 x1 in [-2.5, 2.5].
"""

import sys

import diffusers
import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

STEPS = (8, 16, 32, 64, 128)


def gaussian_velocity(x, t, mean, std):
    """Exact velocity of x0 ~ N(mean, std^2)."""
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


def mixture_velocity(x, t):
    """Exact velocity of x0 ~ .5 N(-1.2, .4^2) + .5 N(.8, .4^2), element by element."""
    means, std = (-1.2, 0.8), 0.4
    variance = (1 - t) ** 2 * std**2 + t**2
    logits = torch.stack([-((x - (1 - t) * m) ** 2) / (2 * variance) for m in means])
    parts = torch.stack([gaussian_velocity(x, t, m, std) for m in means])
    return torch.sum(torch.softmax(logits, dim=0) * parts, dim=0)


def unipc(shift):
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        solver_type="bh2",
    )


def dpmpp_2m(shift):
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=2,
        algorithm_type="dpmsolver++",
    )


def trajectory(scheduler, num_steps, x):
    """Sigmas, the timesteps the model is shown, and x after every step."""
    scheduler.set_timesteps(num_steps)
    xs = [x]
    for timestep in scheduler.timesteps:
        velocity = mixture_velocity(x, timestep.to(torch.float32) / 1000)
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        xs.append(x)
    return scheduler.sigmas.numpy(), scheduler.timesteps.numpy(), torch.stack(xs).numpy()


def gaussian_error(scheduler, num_steps):
    """RMS error where the model sees the solver's own sigma, not its integer timestep."""
    x1 = torch.linspace(-2.5, 2.5, 101)[None]
    scheduler.set_timesteps(num_steps)
    x = x1
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x = scheduler.step(gaussian_velocity(x, sigma, 1.5, 0.5), timestep, x, return_dict=False)[0]
    return torch.sqrt(torch.mean((x - (1.5 + 0.5 * x1)) ** 2)).item()


def main(path):
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 16), np.float32))
    out = {"diffusers_version": diffusers.__version__, "noise": noise.numpy()}
    schedulers = {
        "unipc_4": (unipc(3.0), 4),
        "unipc_10": (unipc(3.0), 10),
        "euler_10": (FlowMatchEulerDiscreteScheduler(shift=3.0), 10),
    }
    for name, (scheduler, num_steps) in schedulers.items():
        sigmas, timesteps, xs = trajectory(scheduler, num_steps, noise)
        out |= {f"{name}/sigmas": sigmas, f"{name}/timesteps": timesteps, f"{name}/xs": xs}
    for name, make in {"unipc": unipc, "dpmpp_2m": dpmpp_2m}.items():
        out[f"gaussian_error/{name}"] = np.array([gaussian_error(make(1.0), n) for n in STEPS])
        print(name, out[f"gaussian_error/{name}"])
    np.savez_compressed(path, **out)


if __name__ == "__main__":
    main(sys.argv[1])

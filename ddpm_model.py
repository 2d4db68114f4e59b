"""DDPMModel: lucidrains' Unet and GaussianDiffusion behind one small interface.

model = DDPMModel.from_file("checkpoints/ddpm_final.pt")
images = model.sample(batch_size=16, seed=0)  # (16, 3, 32, 32), floats in [0, 1]
"""

import copy
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor, nn

from config import FORMER_DEFAULTS, DDPMConfig
from engine import checkpoints
from engine.compression import compress, decompress
from engine.consistency import without_teacher
from engine.cuda_graphs import GraphCache, GraphCaptureError
from engine.denoiser import (
    GUIDANCE_MODES,
    GUIDANCE_OPTIONS,
    ModelDenoiser,
    call_network,
    predicted_start,
    weaker_network,
)
from engine.errors import RenamedWarning, UserError, warn_fallback
from engine.generation import GenerationMixin, eval_mode, expand_seeds, unnormalize  # noqa: F401
from engine.hub import HubMixin
from engine.labels import as_class_counts
from engine.noise_schedule import edm_weighting, shift_log_snr, shift_sigma
from engine.unet import FastUnet, full_attention_levels, per_level

RENAMED = {
    "keep_guide": "snapshot_guide", "timesteps_at": "timesteps_from_uniform",
    "plan": "sampling_plan", "evaluations": "count_nfe", "given": "prepare_image",
    "provenance": "training_info", "samplers": "supported_samplers",
}  # fmt: skip


class DDPMModel(GenerationMixin, HubMixin, nn.Module):
    """A network and the diffusion process it is trained for.

    Images are float tensors (B, C, H, W) in [0, 1]. The arguments are DDPMConfig's settings in
    lower case; full_attn (one per level), attn_heads, attn_dim_head and others, such as
    `self_condition`, go to upstream's Unet. class_counts: numbers of training images by class name;
    a model with any is class-conditional. consistency: tuned by train_consistency.py, to be sampled
    in a few steps. guidance, in every method: the weight of guidance, 1 disables it, None means the
    model's own; guidance_mode: one of GUIDANCE_MODES, see `denoiser`. training_info: `config`,
    `progress` and, if known, `data` of the run that was loaded. UserError for incompatible sizes.
    """

    cuda_graph = True  # run the network as a CUDA graph when sampling on a GPU

    def __init__(
        self, image_size: int | None = None, dim: int = DDPMConfig.DIM,
        dim_mults: Sequence[int] = DDPMConfig.DIM_MULTS, channels: int = 3,
        timesteps: int = DDPMConfig.TIMESTEPS,
        sampling_timesteps: int = DDPMConfig.SAMPLING_TIMESTEPS,
        objective: str = DDPMConfig.OBJECTIVE, beta_schedule: str = DDPMConfig.BETA_SCHEDULE,
        loss_weighting: str = DDPMConfig.LOSS_WEIGHTING,
        min_snr_gamma: float = DDPMConfig.MIN_SNR_GAMMA, p_mean: float = DDPMConfig.P_MEAN,
        schedule_base_size: int = DDPMConfig.SCHEDULE_BASE_SIZE,
        guidance: float = DDPMConfig.GUIDANCE, dropout: float = DDPMConfig.DROPOUT,
        full_attn: Sequence[bool] | None = None,
        attn_heads: int | Sequence[int] = DDPMConfig.ATTENTION_HEADS,
        attn_dim_head: int | Sequence[int] = DDPMConfig.ATTENTION_DIM,
        class_counts: Mapping[str, int] | None = None,
        guidance_mode: str = DDPMConfig.GUIDANCE_MODE,
        guidance_min_sigma: float = DDPMConfig.GUIDANCE_MIN_SIGMA,
        guidance_max_sigma: float = DDPMConfig.GUIDANCE_MAX_SIGMA, consistency: bool = False,
        **unet_kwargs: Any,
    ):  # fmt: skip
        super().__init__()
        self.given_size = image_size
        image_size = DDPMConfig.IMAGE_SIZE if image_size is None else image_size
        if "classes" in unet_kwargs:
            warnings.warn("classes is now class_counts", RenamedWarning, stacklevel=2)
            class_counts = unet_kwargs.pop("classes")
        factor = 2 ** (len(dim_mults) - 1)
        if image_size < 1 or image_size % factor:
            raise UserError(f"image_size {image_size} is not a positive multiple of {factor}")
        if sampling_timesteps > timesteps:
            raise UserError(f"sampling_timesteps is {sampling_timesteps} of only {timesteps}")
        if full_attn is None:
            limit = DDPMConfig.FULL_ATTENTION_MAX_SIZE
            full_attn = full_attention_levels(image_size, dim_mults, limit)

        # Stored in files, to create this model again.
        self.architecture: dict[str, Any] = {
            "image_size": image_size, "dim": dim, "dim_mults": list(dim_mults),
            "channels": channels, "timesteps": timesteps, "sampling_timesteps": sampling_timesteps,
            "objective": objective, "beta_schedule": beta_schedule,
            "loss_weighting": loss_weighting, "min_snr_gamma": min_snr_gamma,
            "p_mean": p_mean, "schedule_base_size": schedule_base_size, "guidance": guidance,
            "dropout": dropout, "full_attn": list(full_attn),
            "attn_heads": per_level(attn_heads, dim_mults),
            "attn_dim_head": per_level(attn_dim_head, dim_mults),
            "class_counts": as_class_counts(class_counts or {}), "guidance_mode": guidance_mode,
            "guidance_min_sigma": guidance_min_sigma, "guidance_max_sigma": guidance_max_sigma,
            "consistency": consistency, **unet_kwargs,
        }  # fmt: skip
        for name in ("objective", "beta_schedule", "loss_weighting", "guidance_mode"):
            DDPMConfig.settings()[name.upper()].check(name, self.architecture[name])
        self.training_info: dict[str, dict[str, Any]] = {"config": {}, "progress": {}}
        self.graph_cache = GraphCache()
        self._build(**self.architecture)

    def _build(
        self, image_size: int, channels: int, timesteps: int, sampling_timesteps: int,
        objective: str, beta_schedule: str, loss_weighting: str, min_snr_gamma: float,
        p_mean: float, schedule_base_size: int, guidance: float, class_counts: Mapping[str, int],
        guidance_mode: str, guidance_min_sigma: float, guidance_max_sigma: float,
        consistency: bool, **unet_kwargs: Any,
    ) -> None:  # fmt: skip
        """Creates network and process of an architecture, with new weights and no guide.

        unet_kwargs: dim, dim_mults, dropout, attention and other arguments of upstream's Unet.
        """
        self.image_size = image_size
        self.channels = channels
        self.num_timesteps = timesteps
        self.sampling_timesteps = sampling_timesteps
        self.guidance = guidance
        self.is_consistency_tuned = consistency
        self.class_names = tuple(class_counts)
        self.class_counts = dict(class_counts)
        self.guidance_mode = guidance_mode if class_counts else "autoguidance"
        self.guide: nn.Module | None = None
        # JSON has lists where upstream wants tuples.
        unet_kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in unet_kwargs.items()}
        self.diffusion = GaussianDiffusion(
            FastUnet(channels=channels, num_classes=len(class_counts), **unet_kwargs),
            image_size=image_size, timesteps=timesteps, sampling_timesteps=sampling_timesteps,
            objective=objective, beta_schedule=beta_schedule, min_snr_loss_weight=min_snr_gamma > 0,
            min_snr_gamma=min_snr_gamma,
        )  # fmt: skip

        # Shift the noise schedule, and with it everything that refers to a noise level.
        shift = 2 * math.log(schedule_base_size / image_size) if schedule_base_size else 0.0
        self.log_snr_shift = shift
        if shift:
            shift_log_snr(self.diffusion, shift, min_snr_gamma)
        interval = guidance_min_sigma, guidance_max_sigma
        self.guidance_interval = tuple(shift_sigma(sigma, shift) for sigma in interval)

        # The distribution of the timesteps in training: uniform, or EDM's.
        timestep_cdf = torch.arange(1, timesteps + 1).double() / timesteps
        if loss_weighting == "edm":
            probabilities, weight = edm_weighting(self.diffusion, p_mean - shift / 2)
            self.diffusion.loss_weight.copy_(weight)
            timestep_cdf = probabilities.cumsum(0)
        self.register_buffer("timestep_cdf", timestep_cdf.float(), persistent=False)

    @classmethod
    def from_config(
        cls, config: DDPMConfig, class_counts: Mapping[str, int] | None = None
    ) -> "DDPMModel":
        """Creates the model of a configuration; its weights are a function of SEED."""
        torch.manual_seed(config.SEED)
        full_attn = full_attention_levels(
            config.IMAGE_SIZE, config.DIM_MULTS, config.FULL_ATTENTION_MAX_SIZE
        )
        model = cls(
            config.IMAGE_SIZE, config.DIM, config.DIM_MULTS, config.CHANNELS or 3, config.TIMESTEPS,
            sampling_timesteps=config.SAMPLING_TIMESTEPS, objective=config.OBJECTIVE,
            beta_schedule=config.BETA_SCHEDULE, loss_weighting=config.LOSS_WEIGHTING,
            min_snr_gamma=config.MIN_SNR_GAMMA, p_mean=config.P_MEAN,
            schedule_base_size=config.SCHEDULE_BASE_SIZE, dropout=config.DROPOUT,
            full_attn=full_attn, attn_heads=config.ATTENTION_HEADS,
            attn_dim_head=config.ATTENTION_DIM, class_counts=class_counts,
            **{name: getattr(config, name.upper()) for name in GUIDANCE_OPTIONS},
        )  # fmt: skip
        model.unet.checkpointing = config.GRADIENT_CHECKPOINTING
        return model

    @staticmethod
    def upgrade_architecture(architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Returns an architecture read from a file of any version in today's names."""
        levels = len(architecture["dim_mults"])
        former_defaults = {
            **{name.lower(): value for name, value in FORMER_DEFAULTS.items()},
            "loss_weighting": "min_snr", "guidance": 1.0, "class_counts": {},
            "guidance_mode": "autoguidance", "consistency": False, "dropout": 0.0,
            "schedule_base_size": 0,
            "full_attn": [False] * (levels - 1) + [True], "attn_heads": [4] * levels,
            "attn_dim_head": [32] * levels,
        }  # fmt: skip
        former_names = {"schedule_size": "schedule_base_size", "classes": "class_counts"}
        found = {former_names.get(k, k): v for k, v in architecture.items()}
        upgraded = former_defaults | found
        return upgraded | {"guidance": max(1.0, upgraded["guidance"])}  # less was allowed once

    @staticmethod
    def check_types(
        path: Path, architecture: Mapping[str, Any], training_info: Mapping[str, Any]
    ) -> None:
        """Raises UserError if settings read from a file have other types than ours."""
        for values in (architecture, training_info["config"]):
            DDPMConfig.check_types(values, str(path))
        for name, value in training_info["progress"].items():
            if not isinstance(value, (int, float, type(None))):
                raise UserError(f"{path}: {name} is {value!r}, but must be a number")

    def __getattr__(self, name: str) -> Any:
        """Finds attributes by their former names, with a warning."""
        if name not in RENAMED:
            return super().__getattr__(name)
        warnings.warn(f"{name} is now {RENAMED[name]}", RenamedWarning, stacklevel=2)
        return getattr(self, RENAMED[name])

    @property
    def unet(self) -> FastUnet:
        """The network: (B, C, H, W) and timesteps (B,) to (B, C, H, W)."""
        return self.diffusion.model

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.diffusion.betas.device

    @property
    def supports_cuda_graphs(self) -> bool:
        """Whether forward always does the same; self-conditioning is random."""
        return not self.unet.self_condition

    def snapshot_guide(self) -> None:
        """Makes a copy of the current network the guide.

        Autoguidance, Karras et al. (arXiv:2406.02507): a network trained for less time makes the
        same errors, but larger ones, so samples are moved away from what it predicts.
        """
        self.guide = copy.deepcopy(self.unet)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads the weights, and creates or removes the guide to match them.

        Those of an unconditional model fit a conditional one: its class embedding is zero then.
        """
        self.graph_cache.clear()  # with assign=True they would read the old weights
        self.guide = None
        if any(name.startswith("guide.") for name in state_dict):
            self.snapshot_guide()
        added = ((k, v) for k, v in self.named_parameters() if "class_embedding" in k)
        embeddings = {k: torch.zeros_like(v) for k, v in added}
        self.__dict__.pop("alpha_bar", None)  # cached; the new schedule may be another
        return super().load_state_dict(embeddings | dict(state_dict), *args, **kwargs)

    def start_from(self, source: "DDPMModel") -> None:
        """Copies the network of another model; for other classes, their embeddings are new."""
        weights = source.unet.state_dict()
        if source.class_names != self.class_names:
            name = "class_embedding.weight"
            weights.pop(name, None)
            weights |= {k: v for k, v in self.unet.state_dict().items() if k == name}
        self.unet.load_state_dict(weights)

    def add_teacher(self, state_dict: Mapping[str, Any]) -> None:
        """Adds a teacher as a state_dict has it; only models that are tuned have one."""

    def _apply(self, *args: Any, **kwargs: Any) -> "DDPMModel":
        """Moves or converts the weights; captured graphs would still read the old ones."""
        self.graph_cache.clear()
        return super()._apply(*args, **kwargs)

    def forward(
        self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the weighted mean squared error of what the network predicts, a scalar.

        images, noise: (B, C, H, W), images in [0, 1]. t: timesteps, (B,). labels: int64 (B,), -1:
        no label; None: none at all.
        """
        return (self.diffusion.loss_weight[t] * self.mse_per_image(images, t, noise, labels)).mean()

    def mse_per_image(
        self, images: Tensor, t: Tensor, noise: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Returns the unweighted error of each image, (B,); arguments as in forward."""
        process = self.diffusion
        x_0 = images * 2 - 1
        x_t = process.q_sample(x_0, t, noise)
        previous = None
        # Chen et al. (arXiv:2208.04202); always in validation, which is the same each time.
        if self.unet.self_condition and (not self.training or random.random() < 0.5):
            with torch.no_grad():
                output = call_network(self.unet, x_t, t, None, labels)
                scales = process.sqrt_alphas_cumprod, process.sqrt_one_minus_alphas_cumprod
                signal, noise_scale = (scale[t].view(-1, 1, 1, 1) for scale in scales)
                previous = predicted_start(process.objective, output, x_t, signal, noise_scale)
        prediction = call_network(self.unet, x_t, t, previous, labels).float()
        target = noise if process.objective == "pred_noise" else x_0
        if process.objective == "pred_v":
            target = process.predict_v(x_0, t, noise)
        return (prediction - target).square().mean(dim=(1, 2, 3))

    def timesteps_from_uniform(self, u: Tensor) -> Tensor:
        """Maps u (B,), uniform in [0, 1], to timesteps (B,) distributed as in training."""
        t = torch.searchsorted(self.timestep_cdf, u, right=True)
        return t.clamp(max=self.num_timesteps - 1)  # u can round to 1

    def _run_network(
        self, network: nn.Module, x: Tensor, t: Tensor, previous: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Runs a network; as a CUDA graph on a GPU if gradients are off and capture works."""
        use_graph = self.cuda_graph and self.supports_cuda_graphs and x.is_cuda
        if use_graph and not torch.is_grad_enabled():
            try:
                return self.graph_cache(network, x, t, labels)
            except GraphCaptureError as error:
                self.cuda_graph = False
                warn_fallback("CUDA graph capture", error)
        return call_network(network, x, t, previous, labels)

    def denoiser(
        self, clip: bool = True, guidance: float | None = None, labels: Tensor | None = None,
        guidance_mode: str | None = None, guidance_min_sigma: float | None = None,
        guidance_max_sigma: float | None = None,
    ) -> ModelDenoiser:  # fmt: skip
        """Returns this model as a denoiser for one trajectory (it may keep state).

        guidance_mode: what samples are moved away from: `autoguidance`, the guide with the same
        label; `cfg`, classifier-free guidance, this network without a label; `both`, the guide
        without a label. guidance_min_sigma, guidance_max_sigma: noise levels to guide, as where
        nothing is shifted. None means the model's own.
        """
        # The weaker network, if any.
        mode = guidance_mode or self.guidance_mode
        if mode not in GUIDANCE_MODES:
            known = ", ".join(GUIDANCE_MODES)
            raise UserError(f"unknown guidance_mode {mode}; choose from {known}")
        if mode == "cfg" and not self.class_names:
            raise UserError("guidance_mode cfg needs labels, but this model is unconditional")
        weaker, weaker_labels = weaker_network(mode, self.unet, self.guide, labels)
        if mode == "cfg" and labels is None:  # the difference is zero
            weaker = None

        # Both networks as functions of x and t.
        network = partial(self._run_network, self.unet)
        weaker = partial(self._run_network, weaker) if weaker is not None else None
        lowest, highest = self.guidance_interval
        if guidance_min_sigma is not None:
            lowest = shift_sigma(guidance_min_sigma, self.log_snr_shift)
        if guidance_max_sigma is not None:
            highest = shift_sigma(guidance_max_sigma, self.log_snr_shift)
        weight = self.guidance if guidance is None else guidance
        if self.is_consistency_tuned:  # guidance is in its weights
            weight = 1.0
        return ModelDenoiser(
            self.diffusion, self.alpha_bar, network, clip, weaker, weight, (lowest, highest),
            labels, weaker_labels, is_consistency_tuned=self.is_consistency_tuned,
        )  # fmt: skip

    def save_model(self, path: str | Path, compressed: bool = False) -> None:
        """Writes weights and architecture as .safetensors or .pt; compressed: in 8 and 16 bits."""
        path = Path(path)
        if torch.finfo(self.diffusion.betas.dtype).bits < 32:
            raise UserError("the model's noise schedule is rounded. Save the model in float32")
        state = without_teacher(self.state_dict())
        state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
        state = compress(state) if compressed else state
        if path.suffix == ".safetensors":
            checkpoints.save_safetensors(path, self.architecture, state)
        else:
            checkpoints.save(path, {"architecture": self.architecture, "model": state})

    @classmethod
    def from_file(cls, path: str | Path, image_size: int | None = None) -> "DDPMModel":
        """Creates the model of a file: its architecture, weights and training_info.

        Reads training checkpoints (the EMA weights), what save_model writes, and checkpoints of
        lucidrains' Trainer, which do not store their image_size. UserError for all others.
        """
        with checkpoints.refuse_damaged(Path(path), f"does not fit {cls.__name__}"):
            file = checkpoints.load_model_file(Path(path), image_size)
            cls.check_types(file.path, file.architecture, file.training_info)
            model = cls(**cls.upgrade_architecture(file.architecture))
            model.load_state_dict(decompress(without_teacher(file.weights)))
            checkpoints.check_weights(model.named_parameters(), file.path)
            model.training_info = file.training_info
        return model

    def load_model(self, path: str | Path, image_size: int | None = None) -> "DDPMModel":
        """Becomes the model of a file, as from_file creates it; returns itself.

        All parameters are replaced, so create an optimizer after it. image_size: by default what
        this model was created with if that was given. A file that is refused changes nothing.
        """
        loaded = self.from_file(path, image_size or self.given_size).to(self.device)
        loaded.given_size = self.given_size
        loaded.cuda_graph = self.cuda_graph
        self.__dict__ = loaded.train(self.training).__dict__
        return self

"""Quantization-aware training: any loop trains a model that `prepare` made; here is what goes around it."""

from pennyweight.training.batch_norm import freeze_batch_norm, reestimate_batch_norm
from pennyweight.training.callbacks import lightning_callback, transformers_callback
from pennyweight.training.distill import distillation_loss
from pennyweight.training.fit import Fit, fit
from pennyweight.training.inq import INQSchedule
from pennyweight.training.oscillation import OscillationFreezing, dampening_loss
from pennyweight.training.parameters import float_state_dict, parameter_groups
from pennyweight.training.prepare import prepare
from pennyweight.training.schedule import Schedule
from pennyweight.training.signs import RPReLU, RSign, SignSchedule, clip_latent_weights

__all__ = [
    "Fit",
    "INQSchedule",
    "OscillationFreezing",
    "RPReLU",
    "RSign",
    "Schedule",
    "SignSchedule",
    "clip_latent_weights",
    "dampening_loss",
    "distillation_loss",
    "fit",
    "float_state_dict",
    "freeze_batch_norm",
    "lightning_callback",
    "parameter_groups",
    "prepare",
    "reestimate_batch_norm",
    "transformers_callback",
]

"""Mixed precision under DeepSpeed as everywhere else: autocast over float32 trained parameters.

DeepSpeed's own bfloat16 casts every parameter, adapters included, when training begins.
"""

from types import MethodType
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from medft.errors import RunError


def shard_weights_in(dtype: str, arguments: TrainingArguments) -> None:
    """Have ZeRO-3 create the shards of a base in this precision when it is loaded next.

    It follows the plugin's configuration, whatever from_pretrained is asked for.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["bf16"]["enabled"] = dtype == "bfloat16"
        plugin.set_deepspeed_weakref()


def autocast_under_deepspeed(model: nn.Module, arguments: TrainingArguments) -> None:
    """Under DeepSpeed, run the forward under autocast instead of DeepSpeed's own bfloat16.

    Changes the model, the arguments and the plugin's configuration, after the model's weights were
    loaded and before the trainer is made. Outputs are float32, as Accelerate gives them.
    """
    plugin = arguments.deepspeed_plugin
    if plugin is None or not arguments.bf16:
        return
    plugin.deepspeed_config["bf16"]["enabled"] = arguments.bf16 = False
    autocast = torch.autocast(arguments.device.type, dtype=torch.bfloat16)
    forward = convert_outputs_to_fp32(autocast(type(model).forward))
    model.forward = MethodType(forward, model)


class Float32Callback(TrainerCallback):
    """Raises before the first step if a launcher has cast what is trained."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Check the trained parameters, as the launcher has prepared them."""
        cast = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
        if cast:
            raise RunError(
                f"expected every trained parameter in float32, the launcher made some "
                f"{', '.join(map(str, cast))}: use accelerate_configs/ddp.yaml, and report this"
            )

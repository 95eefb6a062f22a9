"""A loaded model spread over several devices by accelerate, for measuring what no single one holds; knows no texts.

Nothing that edits can work on such a model: its weights are not all in one place, or not in memory at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memscrub.errors import UsageError

SPREAD = "spread"
"""The name of this way to place a model, beside the names of devices."""


def spread(model: nn.Module, places: Mapping[str, Any] | None = None, *, offload: Path | None = None) -> nn.Module:
    """Put the model's modules where `places` says, by default over all GPUs as they have room, the rest in host memory.

    `places` maps module paths to devices or to "disk", for which `offload` names a folder that stays as long as the
    model is used. Raises UsageError where accelerate is not installed.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map  # type: ignore[import-untyped]
    except ImportError:
        raise UsageError(
            "--device spread needs accelerate; install it with `pip install 'memscrub[accelerate]'`."
        ) from None
    if places is None:
        # Residual connections must not cross devices in the middle of a block.
        whole = list(getattr(model, "_no_split_modules", None) or ())
        places = infer_auto_device_map(model, no_split_module_classes=whole)
    spread_out: nn.Module = dispatch_model(model, dict(places), offload_dir=offload)
    return spread_out


def refuse_spread(device: str) -> None:
    """Raise UsageError for what needs a model in one place."""
    if device == SPREAD:
        raise UsageError("an edit needs the whole model on one device; --device spread is for scan, gate and mine.")

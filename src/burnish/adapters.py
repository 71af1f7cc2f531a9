"""LoRA: trained as low-rank factors beside frozen weights, read and written as files.

Both layouts in use are read: that of diffusers (`pytorch_lora_weights.safetensors`, names below
`transformer.`) and that of peft (`adapter_model.safetensors` beside `adapter_config.json`, names
below `base_model.model.`). An adapter whose modules are not all found in the model is refused: half
a teacher is another teacher.
"""

import json
import math
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Shaped
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from burnish.config import Config, ConfigError
from burnish.tracking import writing
from burnish.wording import brief


class LoraConfig(Config):
    """Train low-rank factors beside the frozen weights instead of the weights themselves."""

    rank: int = Field(default=32, ge=1)
    alpha: int | None = Field(default=None, ge=1)
    """The factors' product counts alpha / rank; None is twice the rank."""
    targets: tuple[str, ...] | None = None
    """Endings of the names of modules; None is what the model's family adapts."""


FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of an adapter's file in its folder."""
_PREFIXES = ("transformer.", "base_model.model.")
_LOW, _HIGH, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_HEADER = "lora_adapter_metadata"
"""Where diffusers writes what peft writes as `adapter_config.json`, in a file's header."""
_OTHERS = ("use_dora", "lora_bias")
"""Settings of peft that add more than a product of two factors."""


@dataclass(frozen=True)
class Adapter:
    """What one module learnt: `scale * high @ low`."""

    low: Float[Tensor, "rank input"]
    high: Float[Tensor, "output rank"]
    scale: float

    def added_to(
        self, weight: Shaped[Tensor, "output input"], rows: slice = slice(None)
    ) -> Float[Tensor, "row input"]:
        """Some rows of the module's weight with what it learnt added, in float32."""
        learnt = self.scale * (self.high[rows].float() @ self.low.float())
        return weight[rows].float() + learnt


def attach(
    transformer: Any, config: LoraConfig, targets: Sequence[str], *, is_autocast: bool = False
) -> None:
    """Put trainable float32 factors beside the weights of a diffusers transformer, frozen now.

    The second factor is zero, so that nothing changes yet; the first is drawn from the global
    random generator.

    Args:
        transformer: changed in place.
        config: rank and strength.
        targets: endings of the names of modules, if the config has none.
        is_autocast: whether it is called under autocast alone, which gives the factors what they
            take; else every input is copied in float32 first.

    Raises:
        ConfigError: no module has such a name.
    """
    import peft  # It imports all of transformers.
    from peft.tuners.lora import LoraLayer

    wanted = list(config.targets or targets)
    alpha = config.alpha or 2 * config.rank
    plan = peft.LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=wanted)
    transformer.requires_grad_(False)
    try:
        transformer.add_adapter(plan)
    except ValueError:
        names = {
            n.rpartition(".")[2] for n, m in transformer.named_modules() if isinstance(m, nn.Linear)
        }
        raise ConfigError(
            f"lora.targets: need names of linear modules, got {', '.join(wanted)}, none of which "
            f"is one; take some of {', '.join(sorted(names))}"
        ) from None
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = not is_autocast
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            # In bfloat16 most steps would be lost by rounding.
            parameter.data = parameter.data.float()


def detach(transformer: Any) -> dict[str, Adapter]:
    """Add what was learnt to the weights, take the factors away, and return them by module."""
    import peft

    (plan,) = transformer.peft_config.values()
    state = peft.get_peft_model_state_dict(transformer)
    adapters = {
        name.removesuffix(_LOW): Adapter(
            low.detach().cpu(),
            state[name.removesuffix(_LOW) + _HIGH].detach().cpu(),
            plan.lora_alpha / plan.r,
        )
        for name, low in state.items()
        if name.endswith(_LOW)
    }
    transformer.fuse_lora()
    transformer.unload_lora()
    return adapters


def read_adapter(path: Path) -> dict[str, Adapter]:
    """The adapters of a file, of its folder or of a stage's, by the name of the module in the
    transformer.

    The scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA. A module's alpha is a tensor of
    the file, else what the settings of its trainer say (`lora_alpha`, `alpha_pattern`), else the
    rank; its rank is that of its factors.

    Raises:
        ConfigError: no such file, or one that holds no LoRA, or more of a module than its factors.
    """
    files = [place / name for place in (path, path / "lora") for name in FILES]
    file = next((one for one in files if one.is_file()), path)
    try:
        if file.is_dir():
            raise OSError("a folder without one")
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        reason = brief(error)
        raise ConfigError(
            f"need a LoRA as safetensors, got {path} ({reason}); name the file, or its folder or "
            "that of its stage"
        ) from None
    settings = _settings(file)
    found, unread = {}, set(tensors)
    for name, low in tensors.items():
        if not name.endswith(_LOW):
            continue
        stem = name.removesuffix(_LOW)
        high, own = tensors.get(stem + _HIGH), tensors.get(stem + _ALPHA)
        if high is None:
            raise ConfigError(f"need both factors of {stem} in {file}, got one; write it again")
        alpha = _alpha(_module(stem), settings) if own is None else float(own)
        count = math.sqrt(len(low)) if settings.get("use_rslora") else len(low)
        found[_module(stem)] = Adapter(low, high, 1.0 if alpha is None else alpha / count)
        unread -= {name, stem + _HIGH, stem + _ALPHA}
    if not found:
        raise ConfigError(
            f"need a LoRA with names that end in {_LOW}, got none among {len(tensors)} tensors in "
            f"{file}; convert it with peft or diffusers"
        )
    more = [name for name in _OTHERS if settings.get(name)] + sorted(unread)
    if more:
        raise ConfigError(
            f"need a LoRA of two factors for each module, got {more[0]} as well in {file}; merge "
            "it into its base with peft, or train one without"
        )
    return found


def _settings(file: Path) -> dict[str, Any]:
    """What the trainer of a LoRA says of it, as peft names it: in the file's header, or beside."""
    beside = file.parent / "adapter_config.json"
    with safe_open(file, "pt") as opened:
        header = (opened.metadata() or {}).get(_HEADER)
    if header is None and not beside.is_file():
        return {}
    try:
        found = json.loads(beside.read_text(encoding="utf-8") if header is None else header)
        return {name.removeprefix(_PREFIXES[0]): value for name, value in found.items()}
    except (AttributeError, OSError, ValueError):
        where = beside if header is None else f"{_HEADER} of {file}"
        raise ConfigError(f"need JSON in {where}, got other text; write the LoRA again") from None


def _alpha(module: str, settings: Mapping[str, Any]) -> float | None:
    """Of a module, as peft finds it: by the first pattern that is the end of the module's name."""
    patterns = settings.get("alpha_pattern") or {}
    found = (alpha for p, alpha in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    alpha = next(found, settings.get("lora_alpha"))
    return None if alpha is None else float(alpha)


def write_adapter(folder: Path, adapters: Mapping[str, Adapter]) -> Path:
    """Write a LoRA that diffusers reads, its scale in the first factor; returns the file."""
    tensors = {}
    for module, adapter in adapters.items():
        stem = _PREFIXES[0] + module
        tensors[stem + _LOW] = (adapter.scale * adapter.low.float()).contiguous()
        tensors[stem + _HIGH] = adapter.high.float().contiguous()
    file = folder / FILES[0]
    with writing(file):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    return file


def adapted(
    base: Mapping[str, Shaped[Tensor, "..."]], adapters: Mapping[str, Adapter], *, where: str
) -> dict[str, Tensor]:
    """The weights of the base with what the adapters learnt added, in float32.

    Args:
        base: weights by name, not changed.
        adapters: by module.
        where: the adapter's file, for messages.

    Raises:
        ConfigError: modules that the base does not have; the counts are told.
    """
    bound = by_weight(adapters, base, where=where)
    return {
        **base,
        **{name: adapter.added_to(base[name]) for name, adapter in bound.items()},
    }


def by_weight(
    adapters: Mapping[str, Adapter], names: Container[str], *, where: str
) -> dict[str, Adapter]:
    """Adapters by the names of the weights that they are added to.

    Args:
        adapters: by module.
        names: of all weights of the model.
        where: the adapter's file, for messages.

    Raises:
        ConfigError: modules that the model does not have; the counts are told.
    """
    missing = [module for module in adapters if f"{module}.weight" not in names]
    if missing:
        raise ConfigError(
            f"need a LoRA of this model, got {len(adapters) - len(missing)} of {len(adapters)} "
            f"modules bound in {where}, first that is not found {missing[0]}; take the LoRA's own "
            "base"
        )
    return {f"{module}.weight": adapter for module, adapter in adapters.items()}


def _module(stem: str) -> str:
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    return stem

"""What the recipes for real models are planned to need of a GPU, from their published sizes alone.

    python benchmarks/real_memory.py [--recipe flux2_klein ...] [KEY=VALUE ...] [--json]

No weights are here: a pipeline folder is written that has the settings of the real one, and the
headers of its weights in bfloat16. `burnish doctor --recipe` is asked about it, with prompts of 120
words and sources of a megapixel.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import nn
from transformers.utils import logging as transformers_logging

from burnish import images
from burnish.cli.recipes import recipe_path
from burnish.config import load
from burnish.planning.forecast import forecast
from burnish.planning.plan import shown
from burnish.run_config import RunConfig
from burnish.shelves import policy_class

RECIPES = (
    "flux2_klein",
    "flux2_klein_full",
    "qwen_image",
    "qwen_image_edit",
    "qwen_image21",
    "stable_diffusion3",
)
CATEGORIES = ("general", "portrait")
Sizes = dict[str, Any]
_QWEN_TEXT: Sizes = {"vocab_size": 152064, "num_attention_heads": 28, "num_key_value_heads": 4}
_QWEN25_VL: Sizes = {
    "text_config": {
        **_QWEN_TEXT,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "rope_parameters": {"mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
_CLIP = {"num_hidden_layers": 12, "intermediate_size": 3072, "num_attention_heads": 12}
REAL: dict[str, dict[str, Sizes]] = {
    "flux2_klein": {
        "transformer": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "vae": {},
        "text_encoder": {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    },
    "qwen_image": {"transformer": {}, "vae": {}, "text_encoder": _QWEN25_VL},
    "qwen_image_edit": {"transformer": {}, "vae": {}, "text_encoder": _QWEN25_VL},
    "qwen_image21": {
        "transformer": {},
        "vae": {},
        "text_encoder": {
            "text_config": {
                "vocab_size": 151936,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "rope_parameters": {"mrope_section": [24, 20, 20]},
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 4096,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    },
    "stable_diffusion3": {
        "transformer": {
            "sample_size": 128,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": list(range(13)),
        },
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        "text_encoder": {**_CLIP, "hidden_size": 768, "projection_dim": 768},
        "text_encoder_2": {
            "num_hidden_layers": 32,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "hidden_size": 1280,
            "projection_dim": 1280,
        },
        "text_encoder_3": {
            "vocab_size": 32128,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_heads": 64,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
        },
    },
}
"""Changes to the settings of the tiny pipeline's encoders, and to the defaults of diffusers'
classes, which are the published ones where nothing is changed."""


def write_pipeline(family: str, folder: Path) -> None:
    """A pipeline folder with the settings of the real one, and the headers of its weights."""
    policy_class(family).tiny().save(folder)
    for name, changes in REAL[family].items():
        path = folder / name / "config.json"
        old = json.loads(path.read_text())
        is_encoder = "text_encoder" in name
        kept = old if is_encoder else {"_class_name": old["_class_name"]}
        path.write_text(json.dumps(_merged(kept, changes)))
    for place, made in _networks(family, folder, torch.device("meta")):
        _write_header(place / "model.safetensors", made())


def draw_weights(family: str, folder: Path, device: torch.device) -> None:
    """Give a pipeline folder random weights that fit its settings, in bfloat16."""
    # One at a time is there.
    for place, made in _networks(family, folder, device):
        made().save_pretrained(place)
    # The device is for others now.
    torch.cuda.empty_cache()


def _networks(
    family: str, folder: Path, device: torch.device
) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """The networks that the settings of a pipeline folder tell of, in place of its weights; each is
    made when it is asked for, and held by nobody else."""
    pipeline: Any = policy_class(family).tiny().pipeline
    for name, network in pipeline.components.items():
        if isinstance(network, nn.Module):
            for old in (folder / name).glob("*.safetensors"):
                old.unlink()
            yield folder / name, partial(_made, type(network), folder / name, device)


def _made(kind: Any, place: Path, device: torch.device) -> Any:
    with torch.device(device):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(place)).to(torch.bfloat16)
        return kind(kind.config_class.from_pretrained(place)).to(torch.bfloat16)


def _write_header(path: Path, network: nn.Module) -> None:
    """A file of weights that takes no room on the disk: what follows its header is a hole."""
    header, end = {}, 0
    for name, weight in network.named_parameters():
        start, end = end, end + weight.nbytes
        span = {"shape": list(weight.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": "BF16", **span}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _merged(old: Sizes, changes: Sizes) -> Sizes:
    found = dict(old)
    if "num_hidden_layers" in changes:
        # One for each layer of the tiny encoder.
        found.pop("layer_types", None)
    for key, value in changes.items():
        found[key] = _merged(old[key], value) if isinstance(value, dict) else value
    return found


def write_prompts(path: Path) -> None:
    """One of each task, as large as prompts of people are."""
    pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    source = path.parent / "source.png"
    source.write_bytes(images.encode_png(Image.fromarray(pixels)))
    text = "two hundred words " * 40
    rows = [{"id": str(row), "text": text, "category": CATEGORIES[row % 2]} for row in range(32)]
    for row in rows[16:]:
        row |= {"task": "edit", "source": source.name}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_inputs(recipe: str, folder: Path) -> list[str]:
    """What a recipe has to be given, and the settings that give it."""
    plain = load(RunConfig, recipe_path(recipe), [])
    model, prompts = folder / "model", folder / "prompts.jsonl"
    write_pipeline(plain.policy.family, model)
    write_prompts(prompts)
    stages = [f"stages.{stage}.prompts.path={prompts}" for stage in plain.stages]
    return [f"policy.path={model}", f"evaluation.prompts={prompts}", *stages]


def plans(name: str, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        given = write_inputs(name, Path(folder))
        config = load(RunConfig, recipe_path(name), [*given, *overrides])
        for plan in forecast(config, "cuda"):
            yield {
                "recipe": name,
                "stage": plan.stage,
                "devices": plan.sharding.world_size,
                "needed": plan.needed,
                "peak": plan.peak,
                "largest": plan.largest.name,
                "host": plan.beside(plan.host_peak),
                "disk": sum(part.num_bytes for part in plan.disk),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that recipes for real models are to need.")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--json", action="store_true", help="print one JSON object as last line")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    # Of every prompt that is longer than CLIP reads, each time it is read.
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
    print("| recipe | stage | GPUs | of each | when | most of it | host | disk |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    rows = []
    for name in arguments.recipe:
        for row in plans(name, arguments.overrides):
            rows.append(row)
            sizes = [shown(row[key]) for key in ("needed", "host", "disk")]
            cells = [name, row["stage"], str(row["devices"]), sizes[0], row["peak"]]
            print(f"| {' | '.join([*cells, row['largest'], *sizes[1:]])} |", flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()

"""The family of Qwen-Image-Edit-2509 and 2511: changes of given pictures.

Decided here: as in the pipeline, a source has two sizes of its own, whatever `resolution` is, and
its shape: the text encoder sees about 384 by 384 pixels, and the transformer the latents of about
1024 by 1024. Transparency is dropped.
"""

from pathlib import Path
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from burnish import vision_build
from burnish.policies.parts.qwen_streams import StreamsPolicy, StreamsReader
from burnish.policies.parts.qwen_vae import encode_grid
from burnish.policies.parts.reading import source_images, tokenizer_facts
from burnish.types import Prompt, Task

# Before the import below: it fails where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus  # noqa: E402


class EditReader(StreamsReader):
    """Text encoder, processor and VAE of one pipeline, and the edits they have read."""

    def sources(self, prompt: Prompt) -> tuple[dict[str, Any], list[Tensor]]:
        prepare, vae = self._pipeline.image_processor, self._pipeline.vae
        seen, grids = [], []
        for picture in _pictures(prompt):
            shape = picture.width / picture.height
            width, height = edit_plus.calculate_dimensions(edit_plus.CONDITION_IMAGE_SIZE, shape)
            seen.append(prepare.resize(picture, height, width))
            width, height = edit_plus.calculate_dimensions(edit_plus.VAE_IMAGE_SIZE, shape)
            grids.append(encode_grid(vae, prepare.preprocess(picture, height, width)))
        return {"image": seen}, grids

    def template(self) -> Any:
        processor = self._pipeline.processor
        pictures = processor.image_processor
        return [
            *super().template(),
            tokenizer_facts(processor.tokenizer),
            [edit_plus.CONDITION_IMAGE_SIZE, edit_plus.VAE_IMAGE_SIZE],
            [pictures.patch_size, pictures.merge_size, dict(pictures.size)],
            [pictures.image_mean, pictures.image_std],
        ]


class QwenImageEditPolicy(StreamsPolicy):
    """A `diffusers.QwenImageEditPlusPipeline` as a policy."""

    family: ClassVar[str] = "qwen_image_edit"
    pipeline_class: ClassVar[type] = edit_plus.QwenImageEditPlusPipeline
    tasks: ClassVar[tuple[Task, ...]] = ("edit",)
    max_sources: ClassVar[int] = 3

    def _make_reader(self, cache_folder: Path | None) -> EditReader:
        return EditReader(self.pipeline, resolution=self.resolution, folder=cache_folder)

    def _given(self, prompt: Prompt) -> dict[str, Any]:
        return {"image": _pictures(prompt)}


def _pictures(prompt: Prompt) -> list[Image.Image]:
    return [picture.convert("RGB") for picture in source_images(prompt)]

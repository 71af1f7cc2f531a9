"""The family of Qwen-Image and Qwen-Image-2512: pictures from text."""

from typing import ClassVar

from burnish import vision_build
from burnish.policies.parts.qwen_streams import StreamsPolicy
from burnish.types import Task

# Before the import below: it fails where torch and torchvision are unequal builds.
vision_build.ensure_torchvision()

from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline  # noqa: E402


class QwenImagePolicy(StreamsPolicy):
    """A `diffusers.QwenImagePipeline` as a policy."""

    family: ClassVar[str] = "qwen_image"
    pipeline_class: ClassVar[type] = QwenImagePipeline
    tasks: ClassVar[tuple[Task, ...]] = ("t2i",)

"""The records that travel through a run, and nothing else.

    Prompt -> Trajectory -> Group -> Scores -> Signal -> update

Data flows one way. A record owns no behaviour beyond reading itself: whoever makes it fills it,
whoever receives it only looks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

Task = Literal["t2i", "edit"]
"""What is asked of the model: an image from text alone, or a change of given images."""

MAX_SOURCES = 8
"""Source images of one edit, at most: a data set cannot ask for more memory than that."""


class Guidance(NamedTuple):
    """How a policy is guided where it is deployed."""

    scale: float = 1.0
    """1 is no guidance."""
    negative_prompt: str = ""
    """What guidance leads away from; empty is the empty prompt of the pipeline."""

    def settings(self) -> dict[str, Any]:
        """As the keys of a recipe."""
        return {"guidance_scale": self.scale, "negative_prompt": self.negative_prompt}


@runtime_checkable
class Labelled(Protocol):
    """What tells prompts apart without reading their images: a `Prompt`, or its place in a set."""

    @property
    def id(self) -> str:
        """See `Prompt`."""
        ...

    @property
    def task(self) -> Task:
        """See `Prompt`."""
        ...

    @property
    def category(self) -> str:
        """See `Prompt`."""
        ...

    @property
    def num_sources(self) -> int:
        """Source images."""
        ...


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One request: a text and, for an edit, the images it changes."""

    id: str
    """Unique in its set; the unit of resampling in every interval."""
    text: str
    task: Task = "t2i"
    category: str = "general"
    """Chooses the reward weights, e.g. portrait, landscape, typography, general."""
    sources: tuple[bytes, ...] = ()
    """Encoded source images of an edit (PNG, JPEG or WebP), 1 to `MAX_SOURCES`, in the order in
    which models and judges read them; none for `t2i`. Decoded only by `burnish.images`. Whoever
    compares with one source takes the first: it is what is changed, the others are references."""
    aspect: str | None = None
    """Wanted width to height of the picture, such as 16:9; None leaves it to `burnish.buckets`."""
    target: bytes | None = None
    """An encoded picture that answers the prompt, where one is known; nothing is drawn from it."""
    tags: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What is known about the right answer; only a reward that asks for it reads it."""

    @property
    def num_sources(self) -> int:
        """Source images."""
        return len(self.sources)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sample's path from noise to image; the steps kept are the stochastic or the wanted
    ones."""

    seed: int
    latents: Float[Tensor, " step *latent"]
    """State at the start of each kept step."""
    sigmas: Float[Tensor, " step"]
    sigmas_next: Float[Tensor, " step"]
    noise: Float[Tensor, " step *latent"]
    """Injected standard normal noise of each kept step; zero where the step was an ODE step."""
    guided: Float[Tensor, " step *latent"]
    """The velocity that moved the sample (equal to `conditional` where guidance is off)."""
    conditional: Float[Tensor, " step *latent"]
    unconditional: Float[Tensor, " step *latent"]
    """What guidance led away from (likewise)."""
    clean: Float[Tensor, "*latent"]
    """Latents at sigma = 0."""
    image: Float[Tensor, "3 height width"]
    """The decoded sample in [0, 1]; without pixels where nobody looks at it."""


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """One image to be scored against its prompt."""

    prompt: Prompt
    image: Float[Tensor, "3 height width"]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One reward's opinion of one image."""

    value: float
    detail: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class NotApplicable:
    """The reward has no say on this prompt; decided per prompt, never per sample."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The reward could not be had. A failure is never a number."""

    reason: str


Score = Scored | NotApplicable | Failed


@dataclass(frozen=True, kw_only=True)
class Group:
    """The samples of one prompt, and what every reward said of each."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]
    scores: Mapping[str, tuple[Score, ...]] = field(default_factory=dict)
    """Reward name -> one score per trajectory, in order."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What the loss is told about one trajectory: where to ask for the velocity, and what to make
    of it.

    The algorithm that writes a signal is the one that reads it; the loop only carries, shuffles and
    stacks. `fields` holds what the algorithm needs per state, all with the leading axis `step`.
    """

    prompt: Prompt
    latents: Float[Tensor, " step *latent"]
    """Constant states at which the policy's velocity is wanted."""
    sigmas: Float[Tensor, " step"]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """Algorithm's own tensors, `step ...`: targets, anchors, noises, transition scales."""
    advantage: float = 0.0

    def with_fields(self, **fields: Tensor) -> "Signal":
        """The same signal with more fields."""
        return replace(self, fields={**self.fields, **fields})


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """The loss of one micro-batch and what to log about it."""

    loss: Float[Tensor, ""]
    metrics: Mapping[str, float]
    """By name: what ends in `_max` or `_min` is that, all others are means over states."""

"""The miniature's face embedder: who counts as the same person, its pictures, its training.

A person is a look (`world.scenes.LOOK`); whatever else a portrait shows is a nuisance that the
vector must not tell: mouth, hat, glasses, fingers, background, style, flaws of the whole picture,
and whether the picture passed the base's autoencoder, as everything a policy draws does. Looks with
a held-out combination are never trained on and measure the result.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata
from torch import Tensor, nn

from burnish import identity
from burnish.identity import DIMENSION, FaceNetwork, Standard
from burnish.miniature.base_model import reconstructed
from burnish.miniature.pictures import pixel_flaw, to_bytes
from burnish.policies.qwen_image21 import QwenImage21Policy
from burnish.progress import track
from burnish.runtime import derived_seed, generator, quick, seeded
from burnish.world.render import render
from burnish.world.scenes import DOMAINS, LOOK, Scene, Value, is_held_out, sample_scene

Look = tuple[Value, ...]
"""Values of `LOOK`, in order; the hair colour is "hidden" where nothing shows it."""
_OTHERS = ("general", "landscape", "typography")


@dataclass(frozen=True, kw_only=True)
class FacesPlan:
    """How many pictures, and how long."""

    portraits: int = 9000
    """Rendered portraits; each is seen as rendered and as the autoencoder gives it back."""
    others: int = 1800
    """Pictures without a face, seen in the same two ways."""
    steps: int = 1600
    people: int = 36
    """Looks in a batch, a third of them with two neighbours that differ in one attribute."""
    pictures: int = 4
    """Pictures of each look in a batch."""
    learning_rate: float = 3e-3
    temperature: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Portraits:
    """Pictures, and whom they show."""

    pixels: np.ndarray
    """uint8 `picture 64 64 3`."""
    looks: list[Look]
    """Empty where there is no face."""


def look_of(scene: Scene) -> Look:
    """Whom a portrait shows: its look, without a hair colour that nothing in it shows."""
    values = {name: scene.values[name] for name in LOOK}
    # A beard has the colour of the hair, so a bald head with one still shows it.
    if values["hair"] == "bald" and values["mark"] not in ("moustache", "beard"):
        values["hair_colour"] = "hidden"
    return tuple(values.values())


def looks(*, is_held: bool) -> list[Look]:
    """All people with a held-out combination, or all without, in a fixed order."""
    blank = sample_scene(np.random.default_rng(0), category="portrait")
    found = {}
    for values in itertools.product(*(DOMAINS[name] for name in LOOK)):
        look: dict[str, Value] = dict(zip(LOOK, values, strict=True))
        scene = blank.changed(look)
        if is_held_out(scene) == is_held:
            found[look_of(scene)] = None
    return list(found)


def portrait_of(look: Look, rng: np.random.Generator) -> Scene:
    """A portrait of one person with everything else left to chance."""
    values: dict[str, Value] = dict(zip(LOOK, look, strict=True))
    if values["hair_colour"] == "hidden":
        values["hair_colour"] = str(rng.choice(DOMAINS["hair_colour"]))
    values["eye_line"] = "uneven" if rng.random() < 0.05 else "even"
    return sample_scene(rng, category="portrait").changed(values)


def draw_portraits(
    base: QwenImage21Policy,
    people: Sequence[Look],
    rng: np.random.Generator,
    *,
    portraits: int,
    others: int = 0,
) -> Portraits:
    """Pictures of people in turn, and without a face, each twice: as rendered, and as the base's
    autoencoder gives it back. Three in ten carry a flaw of the whole picture."""
    whom = [people[number % len(people)] for number in range(portraits)] + [()] * others
    clean = []
    for look in track(whom, "portraits"):
        pixels = render(portrait_of(look, rng)) if look else _without_face(rng)
        if rng.random() < 0.3:
            pixels = pixel_flaw(pixels, rng)
        clean.append(to_bytes(pixels))
    rendered = np.stack(clean)
    return Portraits(np.concatenate([rendered, reconstructed(base, rendered)]), whom * 2)


def _without_face(rng: np.random.Generator) -> np.ndarray:
    """Another kind of scene, or now and then what a policy that lost its way may draw."""
    if rng.random() < 0.8:
        return render(sample_scene(rng, category=_OTHERS[int(rng.integers(len(_OTHERS)))]))
    spread = rng.uniform(0, 0.5)
    noise = spread * rng.standard_normal((64, 64, 3)) + rng.random(3)
    return noise.clip(0, 1).astype(np.float32)


def train_faces(
    base: QwenImage21Policy,
    plan: FacesPlan,
    *,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> FaceNetwork:
    """Train an embedder; a function of the base and the plan, in minutes on one core.

    Two losses shape the vectors: the supervised contrastive one over the looks of a batch, many of
    which differ in one attribute only, and reading every attribute off the vector, which is what
    carries over to combinations that were never shown. A third teaches what is no face.

    Args:
        base: whose autoencoder half of the pictures pass.
        plan: how much and how long.
        on_step: called with the number of the step and its loss.
    """
    rng = np.random.default_rng(derived_seed(plan.seed, "faces"))
    known = looks(is_held=False)[: plan.portraits]
    pool = draw_portraits(base, known, rng, portraits=plan.portraits, others=plan.others)
    rows: dict[Look, list[int]] = {}
    for row, look in enumerate(pool.looks):
        rows.setdefault(look, []).append(row)
    with seeded(plan.seed, "face network"):
        network = FaceNetwork()
        heads = nn.Linear(DIMENSION, sum(len(DOMAINS[name]) for name in LOOK))
    parameters = [*network.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, plan.learning_rate, total_steps=plan.steps, pct_start=0.15
    )
    for step in range(plan.steps):
        chosen = _batch(known, rows, plan, rng)
        pixels = _jittered(pool.pixels[chosen], generator(plan.seed, "faces", step))
        with quick().autocast():
            vectors, presence = network(pixels)
        shown = [pool.looks[row] for row in chosen]
        loss = _loss(vectors.float(), presence.float(), shown, heads, plan.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step, float(loss.detach()))
    # What is measured is what will be stored.
    return network.half().float().eval().requires_grad_(False)


def _batch(
    known: Sequence[Look],
    rows: dict[Look, list[int]],
    plan: FacesPlan,
    rng: np.random.Generator,
) -> list[int]:
    """Rows of the pool: pictures of some looks and of two neighbours of each, and of no face."""
    people: dict[Look, None] = {}
    while len(people) < min(plan.people, len(known)):
        look = known[int(rng.integers(len(known)))]
        near = [other for other in known if _distance(look, other) == 1]
        for place in rng.permutation(len(near))[:2]:
            people[near[place]] = None
        people[look] = None
    chosen = [int(row) for look in people for row in rng.choice(rows[look], plan.pictures)]
    return chosen + [int(row) for row in rng.choice(rows[()], plan.people // 2)]


def _distance(first: Look, second: Look) -> int:
    """Number of attributes in which two looks differ; hidden hair differs from any."""
    return sum(a != b for a, b in zip(first, second, strict=True))


def _jittered(pixels: np.ndarray, draws: torch.Generator) -> Float[Tensor, "batch 3 64 64"]:
    """uint8 pictures as floats, moved by up to two pixels, a little brighter or darker."""
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    moves = torch.randint(-2, 3, (len(batch), 2), generator=draws).tolist()
    padded = nn.functional.pad(batch, (2, 2, 2, 2), mode="replicate")
    batch = torch.stack(
        [p[:, 2 + y : 66 + y, 2 + x : 66 + x] for p, (y, x) in zip(padded, moves, strict=True)]
    )
    gain = 1 + 0.1 * (2 * torch.rand(len(batch), 1, 1, 1, generator=draws) - 1)
    noise = 0.02 * torch.randn(batch.shape, generator=draws)
    return (gain * batch + noise).clamp(0, 1)


def _loss(
    vectors: Float[Tensor, "batch 64"],
    presence: Float[Tensor, " batch"],
    shown: Sequence[Look],
    heads: nn.Linear,
    temperature: float,
) -> Float[Tensor, ""]:
    """Contrast between looks, the attributes off each vector, and whether there is a face."""
    is_face = torch.tensor([bool(look) for look in shown])
    loss = nn.functional.binary_cross_entropy_with_logits(presence, is_face.float())
    vectors, people = vectors[is_face], [look for look in shown if look]
    numbers = {look: number for number, look in enumerate(dict.fromkeys(people))}
    loss = loss + contrast(vectors, torch.tensor([numbers[look] for look in people]), temperature)
    # Unit vectors are too short to make a sharp softmax.
    read = heads(8 * vectors).split([len(DOMAINS[name]) for name in LOOK], dim=1)
    for place, (name, logits) in enumerate(zip(LOOK, read, strict=True)):
        options = DOMAINS[name]
        # -100 is what the loss leaves out: the colour of hair that is not there.
        right = [options.index(p[place]) if p[place] in options else -100 for p in people]
        loss = loss + 0.5 * nn.functional.cross_entropy(logits, torch.tensor(right))
    return loss


def contrast(
    vectors: Float[Tensor, "picture 64"], people: Int[Tensor, " picture"], temperature: float
) -> Float[Tensor, ""]:
    """The supervised contrastive loss (arXiv 2004.11362, `L_out`) of unit vectors.

    Args:
        vectors: of pictures, at least two of each person.
        people: number of the person in each picture.
        temperature: what the cosines are divided by.
    """
    itself = torch.eye(len(vectors), dtype=torch.bool)
    logits = (vectors @ vectors.T / temperature).masked_fill(itself, -torch.inf)
    log_probs = logits.log_softmax(dim=1).masked_fill(itself, 0.0)
    same: Bool[Tensor, "picture picture"] = (people[:, None] == people[None]) & ~itself
    return -((log_probs * same).sum(dim=1) / same.sum(dim=1)).mean()


def area_under_curve(higher: np.ndarray, lower: np.ndarray) -> float:
    """Probability that a draw of the first is above one of the second; ties count half.

    >>> area_under_curve(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    ranks = rankdata(np.concatenate([higher, lower]))[: len(higher)].sum()
    above = ranks - len(higher) * (len(higher) + 1) / 2
    return float(above / (len(higher) * len(lower)))


@torch.no_grad()
def measure_faces(network: FaceNetwork, portraits: Portraits) -> dict[str, Any]:
    """How well cosines tell people apart, over all pairs of the portraits.

    Returns:
        `auc` over all pairs of pictures; `auc_one_attribute` where the different people differ in
        one attribute, and the same for each attribute as `auc_<attribute>`; `faces_found` and
        `others_refused`, shares; quantiles of the cosines, for `Standard`.
    """
    batch = torch.from_numpy(portraits.pixels).permute(0, 3, 1, 2).float() / 255
    parts = [network(chunk) for chunk in batch.split(128)]
    vectors = torch.cat([vectors for vectors, _ in parts])
    found = (torch.cat([presence for _, presence in parts]) > 0).numpy()
    is_face = np.array([bool(look) for look in portraits.looks])
    people = [look for look in portraits.looks if look]
    cosines = vectors[torch.from_numpy(is_face)]
    cosines = (cosines @ cosines.T).numpy()
    values = np.array([[str(value) for value in look] for look in people])
    differs = values[:, None] != values[None]
    distance = differs.sum(axis=2)
    pairs = np.triu(np.ones_like(distance, dtype=bool), 1)
    same, different = cosines[pairs & (distance == 0)], cosines[pairs & (distance > 0)]
    near = pairs & (distance == 1)
    measured: dict[str, Any] = {
        "auc": area_under_curve(same, different),
        "auc_one_attribute": area_under_curve(same, cosines[near]),
    }
    for place, name in enumerate(LOOK):
        chosen = cosines[near & differs[..., place]]
        if chosen.size:
            measured[f"auc_{name}"] = area_under_curve(same, chosen)
    measured["faces_found"] = float(found[is_face].mean())
    if not is_face.all():
        measured["others_refused"] = float(1 - found[~is_face].mean())
    measured["different_median"] = float(np.median(different))
    measured["one_attribute_median"] = float(np.median(cosines[near]))
    measured["same_quartile"] = float(np.quantile(same, 0.25))
    measured["same_median"] = float(np.median(same))
    return measured


def build_faces(base: QwenImage21Policy, plan: FacesPlan, folder: Path) -> dict[str, Any]:
    """Train, measure on people never trained on, and write the finder's folder.

    The floor is the middle cosine of different people, the ceiling the lowest quarter of equal
    ones, so that three in four faithful edits get the full score.

    Returns:
        What `measure_faces` measured.
    """
    network = train_faces(base, plan)
    rng = np.random.default_rng(derived_seed(plan.seed, "faces", "measured"))
    held = draw_portraits(base, looks(is_held=True), rng, portraits=600, others=150)
    measured = measure_faces(network, held)
    rounded = {name: round(value, 4) for name, value in measured.items()}
    standard = Standard(
        cosine_floor=rounded["different_median"],
        cosine_ceiling=rounded["same_quartile"],
        min_size=0.0,
    )
    facts = {"standard": asdict(standard), "measured": rounded, "plan": asdict(plan)}
    identity.save(network, facts, folder)
    return rounded

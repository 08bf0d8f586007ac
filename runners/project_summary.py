"""What a projection run ends with: an example of what its store finds, what it costs, and the ways on."""

import logging
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from ghost import GhostError, GradProjLoRAEngine, ProjectionStore
from ghost.distortion import Distortion, measured_distortion
from ghost.gram import exact_gram
from runners.data.base import SampleSet
from runners.data.loader import collate
from runners.losses import Task
from runners.neighbours import neighbour_table, print_neighbours, with_texts
from runners.progress import readable
from runners.projection_store import read_facts, read_samples
from runners.queries import text_tokenizer
from runners.report import REPORT_FILE
from runners.summary import print_line, print_ways_on, replay_command
from runners.tracking import NullTracker
from runners.world import ALONE, World

log = logging.getLogger(__name__)

EXAMPLES = 5


def measure_distortion(
    cfg: DictConfig, store: ProjectionStore, engine: GradProjLoRAEngine, samples: SampleSet, task: Task
) -> Distortion | None:
    """Error of the stored rows' inner products on `engine.distortion_samples` samples from all over the
    store; None where none is asked for, or none can be measured.
    """
    if not cfg.engine.distortion_samples:
        return None
    places = spread(len(store), cfg.engine.distortion_samples)
    indices = store.sample_ids[places].tolist()
    batch = collate([samples[i] for i in indices], samples.layout)
    X, Y = task.place(batch.inputs, batch.labels)
    log.info("Comparing the rows of %d samples with their gradients.", len(places))
    try:
        gram = exact_gram(
            engine.model, engine.config, X, Y, task.mean,
            parameters=engine.layout.parameters, block=min(cfg.trainer.batch_size, len(places)),
        )  # fmt: skip
        return measured_distortion(torch.from_numpy(rows_of(store, places)), engine.layout, gram)
    except GhostError as error:  # the store is whole all the same
        log.error("The distortion could not be measured: %s", error)
        return None


def show_projection(
    cfg: DictConfig,
    out: Path,
    store: ProjectionStore,
    samples: SampleSet,
    distortion: Distortion | None,
    tracker: NullTracker,
    script: str,
    world: World = ALONE,
) -> None:
    """Print examples of nearest samples, the distortion, paths and commands."""
    console = Console()
    if len(store) > 1:
        print_example(store, samples, console, cfg.preview)
    if distortion is not None:
        print_line(
            console,
            f"Inner products of {distortion.samples} samples' rows against those of their gradients: "
            f"rms error {distortion.rms:.1%} of the norms, rank correlation {distortion.spearman:.3f}.",
        )
    if not store.complete:
        print_line(
            console,
            f"Rank {cfg.engine.rank} of {cfg.engine.world_size} is done; the store is complete once all are.",
        )
    size = f"{len(store):,} samples × {store.layout.width:,} numbers ({store.dtype})"
    ways = {
        "Run directory": str(out),
        "Report": str(out / REPORT_FILE),
        "Store": f"{store.directory}",
        "Size": f"{readable(store.nbytes)}, {size}",
        "Search it": search_command(cfg, store),
    }
    if store.complete:
        ways["Delete from it"] = delete_command(store)
    if cfg.engine.world_size == world.world_size:  # into another folder, since this store is complete
        ways["Run it again"] = replay_command(typed_overrides(), script, world.command)
    print_ways_on(console, ways, tracker.ui_command(), tracker.run_url())


def search_command(cfg: DictConfig, store: ProjectionStore) -> str:
    """What to type to search the store: by a text where its samples are text, else by validation samples."""
    command = f"python -m runners.search store={store.directory}"
    return f"{command} query.text=FILE" if text_tokenizer(cfg, read_facts(store.directory)) else command


def delete_command(store: ProjectionStore) -> str:
    """What to type to delete a sample from the store."""
    return f"""python -m analysis.forget paths={store.directory} "ids=['SAMPLE_ID']" compact=true"""


def typed_overrides() -> list[str]:
    """What was typed, but for the store's folder and the run that was gone on with."""
    overrides = HydraConfig.get().overrides.task
    return [override for override in overrides if not override.startswith(("engine.store=", "resume="))]


def print_example(store: ProjectionStore, samples: SampleSet, console: Console, preview: bool) -> None:
    """A few samples of the store, each with its nearest other; rows of zeros have none."""
    places = spread(len(store), EXAMPLES)
    queries = rows_of(store, places)
    places, queries = places[queries.any(axis=1)], queries[queries.any(axis=1)]
    if not len(places):
        return
    own = store.sample_ids[places]
    ids, scores = store.search(queries, k=2, metric="cosine")
    # The best is the sample itself, or a duplicate that stands before it.
    other = (ids[:, 0] == own).astype(int)
    rows = np.arange(len(places))
    nearest = neighbour_table(
        [(samples.sample_ids[i], samples.domains[i]) for i in own.tolist()],
        ids[rows, other][:, None],
        scores[rows, other][:, None],
        read_samples(store.directory),
    )
    if preview:
        words = {
            samples.sample_ids[i]: samples.preview(i) for i in {*own.tolist(), *nearest["index"].to_pylist()}
        }
        nearest = with_texts(nearest, words, words)
    print_neighbours(nearest, "Nearest training samples", "cosine", console)


def spread(rows: int, number: int) -> np.ndarray:
    """At most `number` row numbers from all over the store, ascending."""
    return np.unique(np.linspace(0, rows - 1, min(number, rows)).astype(np.int64))


def rows_of(store: ProjectionStore, places: np.ndarray) -> np.ndarray:
    """These rows of the store, `[n, K]` float32."""
    return np.asarray(store.matrix()[places], dtype=np.float32)

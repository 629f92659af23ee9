"""The rows of the step benchmark: this project's step, from pixels or cached latents, and the peer's."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peer_hf import HfRoss, make_batches
from peer_optimizer import MasterAdamW
from step_ours import OurStep
from step_samples import Pack
from step_sizes import StepSize
from step_timeline import Timeline, clock

from megatron_ross.planner.workload import Work, causal_pairs
from megatron_ross.platform import current_device

RowName = Literal["ours", "ours, cached latents", "peer"]
ALL_ROWS: tuple[RowName, ...] = ("ours", "ours, cached latents", "peer")
NUM_DRAWS, SEED, LEARNING_RATE = 4, 7, 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Row:
    """One implementation, ready for steps, and what was measured of it."""

    name: str
    prepare: Any = None  # packs -> prepared
    step: Any = None  # prepared, packs -> (lm loss, reconstruction loss)
    timeline: Timeline = field(default_factory=Timeline)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)
    own_bytes: int = 0
    """GPU memory that this row holds between its steps."""
    peak_bytes: int = 0

    def run(self, packs: list[Pack], *, timed: bool) -> None:
        """One step on `packs`."""
        with self.allocations():
            prepared = self.prepare(packs)
            begin, cpu = clock(), time.process_time()
            losses = self.step(prepared, packs)
            seconds, cpu_seconds = clock() - begin, time.process_time() - cpu
            del prepared
        if timed:
            self.seconds.append(seconds)
            self.cpu_seconds.append(cpu_seconds)
        self.losses.append(losses)

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """What is allocated on the GPU inside is this row's."""
        if not torch.cuda.is_available():
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        self.peak_bytes = max(self.peak_bytes, self.own_bytes + torch.cuda.max_memory_allocated() - before)
        self.own_bytes += torch.cuda.memory_allocated() - before


def peer_row(size: StepSize, stage: int, dtype: str, tf32: bool, micro_batch_size: int) -> tuple[Row, HfRoss]:
    row = Row("peer")
    with row.allocations():
        model = HfRoss(size.model, stage, DTYPES[dtype], current_device())
        # Published initialisation is zero where the denoiser modulates; nothing would be compared.
        with torch.no_grad():
            for parameter in model.denoiser.parameters():
                parameter.normal_(std=0.02)
        optimizer = MasterAdamW(model.parameters(), LEARNING_RATE)

    def prepare(packs: list[Pack]) -> Any:
        samples = [pair for pack in packs for pair in pack]
        return make_batches(samples, size.model, micro_batch_size, SEED, NUM_DRAWS, current_device())

    def step(batches: Any, packs: list[Pack]) -> tuple[float, float]:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        work, sums = work_of(packs, size), torch.zeros(2, device=current_device())
        for batch in batches:
            losses = model(batch, int(work.supervised_tokens), int(work.reconstructed_images))
            total = losses[0] + losses[1]
            row.timeline.loss(total)
            total.backward()
            sums += torch.stack(losses).detach()
        optimizer.step()
        torch.backends.cuda.matmul.allow_tf32 = False
        return tuple(sums.tolist())

    row.prepare, row.step = prepare, step
    model.watch(row.timeline)
    row.timeline.watch_method("optimizer", optimizer, "step")
    return row, model


def our_row(
    name: str, size: StepSize, stage: int, dtype: str, tf32: bool, settings: dict[str, Any]
) -> tuple[Row, OurStep]:
    flat = {
        "seq_length": size.seq_length[stage],
        "packing": True,
        "global_batch_size": size.sequences,
        "micro_batch_size": 1,
        "lr": LEARNING_RATE,
        "freeze_language_model": stage == 1,
        "seed": SEED,
        "num_noise_draws": NUM_DRAWS,
        "bf16": dtype == "bf16",
        "denoiser_dtype": "tf32" if tf32 else "fp32",
        **settings,
    }
    row = Row(name)
    with row.allocations():
        ours = OurStep.build(size.model, flat)

    def step(batches: Any, packs: list[Pack]) -> tuple[float, float]:
        result = ours.step(batches)
        return result.lm_loss, result.recon_loss

    row.prepare, row.step = ours.batches, step
    return row, ours


def build_rows(
    names: tuple[RowName, ...], size: StepSize, stage: int, dtype: str, tf32: bool, micro_batch_size: int,
    settings: dict[str, Any], steps: list[list[Pack]],
) -> list[Row]:  # fmt: skip
    """Rows with the same weights; without the peer, with random ones."""
    peer, model = peer_row(size, stage, dtype, tf32, micro_batch_size) if "peer" in names else (None, None)
    rows = [peer] if peer else []
    encoder = None
    for name in ("ours", "ours, cached latents"):
        if name not in names:
            continue
        is_cached = name != "ours"
        cached = {"latent_cache": "memory"} if is_cached else {}
        row, ours = our_row(name, size, stage, dtype, tf32, settings | cached)
        with row.allocations():
            ours.finish(None if model is None else model.published_tensors())
        ours.watch(row.timeline)
        if is_cached:
            ours.cache_latents([pack for packs in steps for pack in packs], encoder)
        else:
            encoder = ours.stages[0].reconstruction.latent_encoder
        rows.append(row)
    return sorted(rows, key=lambda row: names.index(row.name))


def work_of(packs: list[Pack], size: StepSize) -> Work:
    """What a step computes, for the planner's formulas."""
    samples = [sample for pack in packs for _, sample in pack]
    images = sum(len(sample.images) for sample in samples)
    lengths = [len(sample.input_ids) for sample in samples]
    labels = sum(int((sample.labels[1:] >= 0).sum()) for sample in samples)
    return Work(sum(lengths), causal_pairs(lengths), labels, images, images)

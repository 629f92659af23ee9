"""The quantities that are compared: cases, trajectories, sampling, greedy generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megatron_ross.config.model import IGNORE_LABEL, IMAGE_TOKEN_ID
from megatron_ross.config.schema import RunConfig, TrainabilityConfig
from megatron_ross.data.batch import ImageSpan, RossSample
from megatron_ross.data.images import ImageProcessor
from megatron_ross.models.denoiser import to_tokens
from megatron_ross.models.diffusion import cosine_tables, respace, sample
from megatron_ross.parity.compare import Row, compare_exact, compare_tensors, compare_values
from megatron_ross.parity.fixture import Case, FixtureError, FixtureModel, case_samples, recorded_draws
from megatron_ross.parity.runner import CaseResult, HiddenCapture, ImportedModel, Session

TRAINABILITY = {
    "stage1": TrainabilityConfig(freeze_language_model=True),
    "stage2": TrainabilityConfig(),
}
_LOSS_TOLERANCE = 1e-5
_GRADIENT_TOLERANCE = 1e-4
# Adam turns the rounding noise of gradients that are exactly zero (the k part of this bias) into updates.
_NOISY_AFTER_ADAM = "attn.qkv.bias"
_NOISY_TOLERANCE = 5e-2


def check_cases(fixture: FixtureModel, imported: ImportedModel, run: RunConfig) -> Iterator[Row]:
    """Losses, final hidden states and gradients of every recorded case; rows on rank 0."""
    cases = [fixture.case(letter) for letter in fixture.case_letters()]
    for stage, trainability in TRAINABILITY.items():
        for reconstructs in (True, False):
            wanted = [c for c in cases if _belongs(c, reconstructs, run) and _has(fixture, c, stage)]
            if not wanted:
                continue
            session = Session(imported, run, trainability, reconstructs=reconstructs)
            try:
                for case in wanted:
                    result = session.run_case(case)
                    if dist.get_rank() == 0:
                        yield from _case_rows(fixture, case, stage, result)
            finally:
                session.close()


def _belongs(case: Case, reconstructs: bool, run: RunConfig) -> bool:
    """Cases without reconstruction run without denoiser, unless the layout gives it a stage of its own."""
    own_stage = "D" in run.parallel.layout.split("|")
    return case.reconstructs == reconstructs or (own_stage and reconstructs)


def _has(fixture: FixtureModel, case: Case, stage: str) -> bool:
    norms = fixture.metadata.get("gradient_norms", {}).get(case.letter, {})
    return stage == "stage2" or f"grad_norms_{stage}" in norms or stage in case.gradients


def _case_rows(fixture: FixtureModel, case: Case, stage: str, result: CaseResult) -> Iterator[Row]:
    name = f"{fixture.name} case {case.letter} {stage}"
    expected = fixture.metadata["losses"][case.letter]
    tolerance = fixture.tolerance("losses_relative", _LOSS_TOLERANCE)
    yield compare_values(f"{name} lm_loss", result.lm_loss, expected["lm_loss"], tolerance)
    if case.reconstructs:
        yield compare_values(f"{name} vm_loss", result.recon_loss, expected["vm_loss"], tolerance)
    yield compare_values(f"{name} loss", result.lm_loss + result.recon_loss, expected["loss"], tolerance)
    yield from _hidden_rows(fixture, case, name, result)
    gradients = fixture.tolerance("gradients_max_over_maxabs", _GRADIENT_TOLERANCE)
    for parameter, gradient in sorted(case.gradients.get(stage, {}).items()):
        got = result.gradients.get(parameter, torch.zeros(0))
        yield compare_tensors(f"{name} grad {parameter}", got, gradient, gradients)
    norms = fixture.metadata["gradient_norms"].get(case.letter, {}).get(f"grad_norms_{stage}", {})
    limit = fixture.tolerance("gradient_norm_relative", _GRADIENT_TOLERANCE)
    largest = max(norms.values(), default=0.0)
    for parameter, norm in norms.items():
        gradient_norm = float(result.gradients[parameter].norm()) if parameter in result.gradients else float("nan")
        # A gradient that is zero but for rounding is compared on the scale of the others.
        yield compare_values(f"{name} grad norm {parameter}", gradient_norm, norm, limit, max(norm, 1e-6 * largest))
    unexpected = sorted(p for p in set(result.gradients) - set(norms) if norms and bool(result.gradients[p].any()))
    yield compare_exact(f"{name} parameters with gradient that should have none", unexpected, [])


def _hidden_rows(fixture: FixtureModel, case: Case, name: str, result: CaseResult) -> Iterator[Row]:
    recorded = case.tensors.get("out.hidden_final")
    if recorded is None and "out.hidden_states" in case.tensors:
        recorded = case.tensors["out.hidden_states"][-1]
    if recorded is None or result.final_hidden is None:
        return
    mask = case.tensors["out.new_attention_mask"] == 1
    got = result.final_hidden[:, : mask.shape[1]]
    tolerance = fixture.tolerance("hidden_states_max_over_maxabs", 0.0)
    yield compare_tensors(f"{name} hidden_final", got[mask], recorded[mask], tolerance, by_max=True)


def check_trajectories(fixture: FixtureModel, imported: ImportedModel, run: RunConfig) -> Iterator[Row]:
    """Ten optimizer steps in both stages: loss and gradient norm at every step, parameters at the end."""
    case = fixture.case("a")
    draws = fixture.read(fixture.root / "goldens" / "trajectory_draws.safetensors")
    for stage, trainability in TRAINABILITY.items():
        recorded = fixture.json(f"trajectory_{stage}.json")
        session = Session(imported, run, trainability, lr=recorded["optimizer"]["lr"])
        try:
            samples = case_samples(case, session.model)
            for expected in recorded["steps"]:
                i = expected["step"]
                step_draws = recorded_draws(*(draws[f"traj.{n}"][i] for n in ("t", "eps", "vae_noise")))
                result = session.train_on(samples, step_draws)
                if dist.get_rank() == 0:
                    name = f"{fixture.name} trajectory {stage} step {i}"
                    limit = fixture.tolerance("trajectory_loss_relative", 1e-4)
                    yield compare_values(f"{name} loss", result.loss, expected["loss"], limit)
                    limit = fixture.tolerance("trajectory_grad_norm_relative", 1e-4)
                    yield compare_values(f"{name} grad_norm", result.grad_norm, expected["grad_norm"], limit)
            yield from _final_parameter_rows(fixture, stage, recorded["final_parameters"], session.parameters())
        finally:
            session.close()


def _final_parameter_rows(
    fixture: FixtureModel, stage: str, recorded: dict, parameters: dict[str, Tensor]
) -> Iterator[Row]:
    if dist.get_rank() != 0:
        return
    name = f"{fixture.name} trajectory {stage} final"
    yield compare_exact(f"{name} trainable names", sorted(parameters), sorted(recorded))
    limit = fixture.tolerance("final_parameter_norm_relative", 1e-4)
    for parameter, expected in recorded.items():
        if parameter in parameters:
            tolerance = _NOISY_TOLERANCE if parameter.endswith(_NOISY_AFTER_ADAM) else limit
            got = parameters[parameter].double()
            yield compare_values(f"{name} norm {parameter}", float(got.norm()), expected["l2"], tolerance)


def check_sampling(fixture: FixtureModel, imported: ImportedModel, run: RunConfig) -> Iterator[Row]:
    """Ancestral sampling from recorded noise with the training stage's own denoiser, and decoding of the result."""
    recorded = fixture.tensors("sampling.safetensors")
    session = Session(imported, run, TRAINABILITY["stage2"])
    try:
        head = next((s.reconstruction for s in session.stages if s.spec.has("D")), None)
        rows: list[Row] = []
        if head is not None:
            limit = fixture.tolerance("sampling_max_over_maxabs", 0.0)
            with torch.no_grad():
                condition = head.denoiser.z_embedder(to_tokens(recorded["in.context"]))
                for respacing in fixture.metadata["sampling"]:
                    key = f"steps_{respacing.replace(',', '_')}"
                    if f"{key}.z_0" not in recorded:
                        continue
                    tables = respace(cosine_tables(), respacing)
                    bank = recorded["in.noise_bank"]
                    z = sample(
                        lambda x, t: head.denoiser.predict_noise(x, t, condition),
                        recorded["in.x_T"],
                        lambda k: bank[k % bank.shape[0]],  # noqa: B023  (called before the loop goes on)
                        tables,
                    )
                    name = f"{fixture.name} sampling {respacing}"
                    rows.append(compare_tensors(f"{name} z_0", z, recorded[f"{key}.z_0"], limit, by_max=True))
                    if f"{key}.decoded" in recorded:
                        assert head.latent_encoder is not None
                        image = head.latent_encoder.decode_latents(z)
                        rows.append(
                            compare_tensors(f"{name} decoded", image, recorded[f"{key}.decoded"], limit, by_max=True)
                        )
        yield from _from_first_holder(rows)
    finally:
        session.close()


def _from_first_holder(rows: list[Row]) -> list[Row]:
    """Rows of the first rank that has any, on rank 0."""
    everything: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(rows, everything if dist.get_rank() == 0 else None)
    return next((part for part in everything if part), [])


def check_generation(fixture: FixtureModel, imported: ImportedModel, run: RunConfig) -> Iterator[Row]:
    """Greedy continuations through the pipeline, token for token."""
    recorded = fixture.json("greedy_generation.json")
    session = Session(imported, run, TRAINABILITY["stage2"])
    try:
        processor = ImageProcessor.from_config(session.model.vision)
        for prompt in recorded:
            if max(prompt["input_ids"]) >= session.model.language.vocab_size:
                raise FixtureError(f"greedy prompt {prompt['id']} holds ids beyond the checkpoint's vocabulary")
            pixels = processor(_open_image(fixture.root, prompt["image"]))
            generated = greedy(session, prompt["input_ids"], pixels, len(prompt["generated"]))
            if dist.get_rank() == 0:
                yield compare_exact(f"{fixture.name} greedy {prompt['id']}", generated, prompt["generated"])
    finally:
        session.close()


def _open_image(root: Path, name: str) -> Image.Image:
    path = root / "preprocess" / "images" / name
    try:
        return Image.open(path)
    except OSError as error:
        raise FixtureError(f"{path}: {error}") from error


def greedy(session: Session, prompt: list[int], pixels: Tensor, num_new: int) -> list[int]:
    """Continue a one-image prompt by arg-max, running the whole pipeline per token; the same list on every rank."""
    num_tokens = session.model.vision.num_image_tokens
    start = prompt.index(IMAGE_TOKEN_ID)
    ids = prompt[:start] + [IMAGE_TOKEN_ID] * num_tokens + prompt[start + 1 :]
    copies = session.run.data.micro_batch_size * session.groups.dp.size() * _least_microbatches(session)
    for _ in range(num_new):
        tokens = torch.tensor(ids)
        span = ImageSpan(start, 0, lambda: pixels, reconstruct=False)
        sample_ = RossSample(0, tokens, torch.full_like(tokens, IGNORE_LABEL), (span,))
        capture = HiddenCapture(session)
        session.forward(session.batches([sample_] * copies, None))
        hidden = capture.gather()
        ids.append(_argmax(session, hidden, len(ids) - 1))
    return ids[-num_new:]


def _least_microbatches(session: Session) -> int:
    return (
        session.run.parallel.pipeline_model_parallel_size if session.layout.virtual_pipeline_model_parallel_size else 1
    )


def _argmax(session: Session, hidden: Tensor | None, position: int) -> int:
    """Most likely next token, from rank 0's hidden states and the vocabulary shards of the stage with the head."""
    payload: list = [None if hidden is None else hidden[0, position]]
    dist.broadcast_object_list(payload)
    best = (float("-inf"), -1)
    for stage in session.stages:
        if stage.spec.has("H"):
            logits = stage.logits(payload[0].to(stage.output_weight.device)[None])[0].float()
            value, index = logits.max(0)
            best = (value.item(), int(index) + session.groups.tp.rank() * logits.shape[0])
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, best)
    return max(everything)[1]

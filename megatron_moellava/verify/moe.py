"""The MoE models with injected noise: gates, logits, the three losses, gradients; and greedy generation."""

from dataclasses import replace

import torch

from megatron_moellava.config import MoEConfig, RunConfig
from megatron_moellava.data.encode import IMAGE_TOKEN
from megatron_moellava.model.roles import freeze
from megatron_moellava.stages import LANGUAGE, STAGES
from megatron_moellava.verify.dense import LOSS, compare_gradients, compare_logits
from megatron_moellava.verify.folder import Folder, prompt_batch, to_batch
from megatron_moellava.verify.gates import IN_MODEL, cases_of, compare_gate, noise_of, short
from megatron_moellava.verify.session import Session, Subject, open_session
from megatron_moellava.verify.table import Table

GATE_LOGITS = 2e-5  # as the model's logits; measured 4e-6
SETTINGS = {
    "capacity_factor": "moe_expert_capacity_factor",
    "eval_capacity_factor": "eval_capacity_factor",
    "min_capacity": "min_capacity",
    "router_aux_loss_coef": "moe_aux_loss_coeff",
    "top_k_experts": "moe_router_topk",
}


def verify_moe(folder: Folder, file: str, run: RunConfig, subject: Subject, table: Table) -> None:
    """Every case of moe.pt or moe_residual.pt."""
    for case, recorded in cases_of(folder.load(file), file).items():
        if "logits" not in recorded:  # gates alone
            continue
        settings = recorded.get("settings", {"input": "img_text", "train": False})
        assert subject.model.moe is not None
        moe = changed(subject.model.moe, settings)
        session = open_session(run, subject, moe)
        batch = to_batch(folder.inputs[settings["input"]], subject.num_features, session.multiple)
        _verify_case(table, f"moe {case}", session, moe, batch, recorded, settings)


def changed(moe: MoEConfig, settings: dict) -> MoEConfig:
    """The checkpoint's MoE settings with those of a case."""
    moe = replace(moe, **{field: settings[key] for key, field in SETTINGS.items() if key in settings})
    # Reentrant checkpointing cuts the balance loss off from the graph, which is how the recipes were run.
    return replace(moe, aux_loss_gradient=settings.get("grad_ckpt") not in (True, "reentrant"))


def _verify_case(
    table: Table, case: str, session: Session, moe: MoEConfig, batch, recorded: dict, settings: dict
) -> None:
    session.inject({name: noise_of(gate) for name, gate in recorded["gates"].items()})
    session.train(settings["train"])
    compare_logits(table, case, session.logits(batch), batch, recorded["logits"])
    gatings = session.gates()
    for name, expected in recorded["gates"].items():
        table.close(case, f"gate logits {short(name)}", gatings[name].logits_NE, expected["logits"], GATE_LOGITS)
        compare_gate(table, f"{case} {short(name)}", gatings[name], expected, IN_MODEL)

    ours_aux = [float(gatings[name].gate.aux_loss) for name in recorded["gates"]]
    table.close(case, "balance losses", ours_aux, recorded["l_aux"], IN_MODEL)
    moe_loss = moe.moe_aux_loss_coeff * sum(ours_aux)
    table.close(case, "moe_loss", moe_loss, recorded["moe_loss"], LOSS)
    if "grad_norms" in recorded:
        for chunk in session.chunks:
            freeze(chunk, ("projector", *LANGUAGE) if settings.get("all_grad") else STAGES[3])
        ce = session.backward(batch)
        compare_gradients(table, case, session, recorded)
    else:
        ce = session.loss(batch)
    table.close(case, "cross-entropy", ce, recorded["ce"], LOSS)
    table.close(case, "loss", ce + moe_loss, recorded["loss"], LOSS)


def verify_generation(folder: Folder, run: RunConfig, subject: Subject, table: Table) -> None:
    """Greedy tokens with zero noise; every step recomputes the whole sequence."""
    session = open_session(run, subject)
    session.inject(None)
    session.train(False)
    for case, expected in folder.load("generate.pt").items():
        if "output_ids" not in expected:  # the original failed there, and that is what is recorded
            continue
        prompt = expected["prompt_ids"][0].tolist()
        count = expected["output_ids"].shape[1] - len(prompt)
        pixels_NCHW = torch.stack(_images_of(folder, prompt)[: prompt.count(IMAGE_TOKEN)])
        ours = greedy(session, prompt, pixels_NCHW, subject.num_features, count)
        table.equal(f"generation {case}", f"{count} greedy tokens", torch.tensor([ours]), expected["output_ids"])


def _images_of(folder: Folder, prompt: list[int]) -> list[torch.Tensor]:
    """The recording names no images: they are those of the batch that begins with the prompt, else of `single`."""
    for recorded in folder.inputs.values():
        if recorded["input_ids"][0, : len(prompt)].tolist() == prompt:
            return recorded["images"]
    return folder.inputs["single"]["images"]


def greedy(session: Session, prompt: list[int], pixels_NCHW: torch.Tensor, num_features: int, count: int) -> list[int]:
    """`prompt` and its `count` most probable next tokens, one after the other without a cache."""
    ids = list(prompt)
    for _ in range(count):
        batch = prompt_batch(ids, pixels_NCHW, num_features, session.multiple)
        last = int(batch.padding_mask_BS.sum()) - 1
        ids.append(int(session.logits(batch)[0, last].argmax()))
    return ids

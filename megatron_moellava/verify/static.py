"""What needs no forward pass: names, shapes, trained parameters of each stage, placements, the stage-1 artefact."""

import torch

from megatron_moellava.config import RunConfig
from megatron_moellava.conversion.layout import ORIGINAL, entries
from megatron_moellava.conversion.original import moe_config
from megatron_moellava.costs.shapes import PROJECTOR, TOWER, Model
from megatron_moellava.model.roles import freeze
from megatron_moellava.placement import moe_layer_freq, moe_layers
from megatron_moellava.stages import STAGES
from megatron_moellava.verify.folder import Folder
from megatron_moellava.verify.session import Session, Subject, open_session, without_tied_head
from megatron_moellava.verify.table import Table


def verify_placements(folder: Folder, num_layers: int, table: Table) -> None:
    """Layer lists of the named modes, and of explicit lists ("custom[1,2]")."""
    for mode, layers in folder.load("moe_layers.json").items():
        if isinstance(layers, dict):
            layers, mode = layers["idx"], tuple(layers["idx"])
        if isinstance(layers, list):  # the others say which error the original raises
            ours = moe_layers(mode, num_layers)
            built = [layer for layer, is_moe in enumerate(moe_layer_freq(mode, num_layers)) if is_moe]
            table.equal("placement", str(mode), (list(ours), built), (layers, layers))


def verify_names(folder: Folder, subjects: dict[str, Subject], table: Table) -> None:
    """Every tensor's name and shape, and the MoE settings."""
    names = folder.load("names.json")
    for checkpoint, key in (("dense", "all_dense_names"), ("moe", "all_moe_names")):
        if checkpoint in subjects and key in names:
            model = subjects[checkpoint].model
            listed = without_tied_head(model, names[key]).items()
            theirs = {name: tuple(shape) for name, shape in listed if "image_tower" not in name}
            ours = names_and_shapes(model)
            wrong = ours.items() ^ theirs.items()
            table.add(
                f"names {checkpoint}", "names and shapes", len(wrong), 0, ", ".join(sorted(name for name, _ in wrong))
            )
    if "moe" in subjects and "moe_config" in names:
        model = subjects["moe"].model
        settings = moe_config({"moe": names["moe_config"], "num_hidden_layers": model.backbone.num_layers})
        table.equal("names moe", "config.moe", model.moe, settings)


def names_and_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The language model's and the projector's tensors, as the original calls them."""
    lines = (line for line in entries(model, ORIGINAL) if not line.megatron.startswith(TOWER))
    return {name: shape for line in lines for name, shape in zip(line.names, line.shapes, strict=True)}


def verify_trained(folder: Folder, run: RunConfig, subjects: dict[str, Subject], table: Table) -> None:
    """The parameters that `freeze` leaves trainable, mapped to the original's names."""
    trainable = folder.load("names.json")["trainable"]
    for stage, expected in sorted(trainable.items()):
        number = int(stage.removeprefix("stage"))
        checkpoint = "moe" if number == 3 else "dense"
        if checkpoint not in subjects:
            continue
        session = open_session(run, subjects[checkpoint])
        theirs = without_tied_head(session.model, dict.fromkeys(expected))
        wrong = trained_names(session, STAGES[number]) ^ theirs.keys()
        table.add("trained names", stage, len(wrong), 0, ", ".join(sorted(wrong)))


def trained_names(session: Session, roles: tuple[str, ...]) -> set[str]:
    """Freeze all but `roles`; names of the tensors that still get gradients."""
    for chunk in session.chunks:
        freeze(chunk, roles)
    return set(session.tensors(lambda parameter: parameter if parameter.requires_grad else None))


def verify_projector(folder: Folder, model: Model, session: Session, table: Table) -> None:
    """`mm_projector.bin` holds the projector of `dense/`, under the names that an export gives it."""
    ours = session.tensors(lambda parameter: parameter)
    wanted = {name for line in entries(model, ORIGINAL) if line.megatron.startswith(PROJECTOR) for name in line.names}
    theirs = folder.load("mm_projector.bin")
    same = ours.keys() & theirs.keys() & wanted
    differing = (wanted ^ theirs.keys()) | {name for name in same if not torch.equal(ours[name], theirs[name].float())}
    table.add("mm_projector.bin", "tensors", len(differing), 0, ", ".join(sorted(differing)))

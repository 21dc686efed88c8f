"""moellava analyze: a checkpoint and a data set -> PNGs, routing.json and report.html."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_moellava import parallel
from megatron_moellava.analysis import figures
from megatron_moellava.analysis.pathways import Pathways, coactivation, frequent_pathways, principal_pathways
from megatron_moellava.analysis.plots import plot_expert_load
from megatron_moellava.analysis.report import Section, write_html
from megatron_moellava.analysis.routing import Routes, collect_routes
from megatron_moellava.analysis.similarity import Similarity, expert_similarity
from megatron_moellava.analysis.traffic import divisions, traffic
from megatron_moellava.checkpoint.folders import require_checkpoint
from megatron_moellava.inference.load import load_model
from megatron_moellava.routing.health import advise, find_anomalies
from megatron_moellava.training.metrics import rounded


def analyse(args) -> str:
    """Runs on every rank; rank 0 writes. Returns what to print."""
    checkpoint = require_checkpoint(args.load)
    model, prompter = load_model(
        checkpoint,
        tokenizer=args.tokenizer,
        template=args.template,
        precision=args.precision,
        overrides=args.overrides,
        rows=True,
        verify=not args.no_verify,
    )
    data = [(path, args.image_folder) for path in args.data]
    routes = collect_routes(model, prompter, data, limit=args.limit, pictures=args.overlays)
    text = ""
    if dist.get_rank() == 0:
        origin = Path(args.origin) if args.origin else None
        similarity = expert_similarity(checkpoint, origin, verify=not args.no_verify, verified=True)
        text = write_report(args.out, str(args.load), [path for path, _ in data], routes, similarity, pca=args.pca)
    parallel.shutdown()
    return text


def write_report(
    out: Path, name: str, data: Sequence[str], routes: Routes, similarity: Similarity, *, pca: bool = False
) -> str:
    """PNGs, routing.json and report.html in `out`; returns a summary for the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    warnings = advise(find_anomalies(routes.record))
    for part, record in routes.vision.items():
        warnings += [f"{part}, {text}" for text in advise(find_anomalies(record), part)]
    facts = {
        "checkpoint": name,
        "data": ", ".join(data),
        "samples": f"{routes.num_samples:,}"
        + (f" ({len(routes.skipped)} more could not be used)" if routes.skipped else ""),
        "tokens": f"{len(routes.is_image_T):,}, {int(routes.is_image_T.sum()):,} of them image",
        "experts": f"{routes.num_experts}, top-{routes.topk}, in layers {', '.join(map(str, routes.layers))}",
    }
    sections = [
        load_section(out, routes),
        preference_section(out, routes),
        confidence_section(out, routes),
        pathway_section(out, routes, pca),
        *([coactivation_section(out, routes)] if routes.topk > 1 else []),
        *([traffic_section(routes)] if divisions(routes.num_experts) else []),
        *(vision_section(part, record) for part, record in routes.vision.items()),
        similarity_section(out, similarity),
        *([overlay_section(out, routes)] if routes.pictures else []),
    ]
    numbers = {"facts": facts, "warnings": warnings, **routes.record, **routes.vision, "similarity": plain(similarity)}
    (out / "routing.json").write_text(json.dumps(rounded(numbers), indent=1))
    write_html(out / "report.html", f"Routing of {name}", facts, warnings, sections)
    lines = [f"{key}: {value}" for key, value in facts.items()] + [f"warning: {text}" for text in warnings]
    return "\n".join([*lines, f"wrote {out / 'report.html'}, {out / 'routing.json'} and the pictures beside them"])


def _saved(figure, path: Path) -> Path:
    figures.save(figure, path)
    return path


def load_section(out: Path, routes: Routes) -> Section:
    """Share of the choices that each expert takes, layer by layer, with balance and dropped tokens."""
    path = out / "load.png"
    plot_expert_load(routes.counts_LME, routes.layers, path, "Expert load", routes.modalities)
    text = "Share of the choices that each expert takes. Balance is Switch Transformer's auxiliary loss: 1 is perfect."
    return Section("Expert load", text, [path], [load_table(routes.record)])


def vision_section(part: str, record: dict) -> Section:
    """The same for the experts of the tower or the projector, as a table."""
    text = f"Experts of the {part}: share of the choices that each takes; its tokens are those of images."
    return Section(f"Expert load of the {part}", text, [], [load_table(record)])


def load_table(record: dict) -> tuple[list[str], list[list[str]]]:
    """Head and rows, one for each layer with experts."""
    head = [
        "layer",
        "tokens",
        "busiest / mean",
        "balance",
        *(f"expert {e}" for e in range(record["num_experts"])),
        "dropped",
    ]
    rows = []
    for layer in record["layers"]:
        total = max(sum(layer["choices"]), 1)
        asked = total + sum(layer["dropped"])
        shares = [f"{count / total:.1%}" for count in layer["choices"]]
        rows.append(
            [str(layer["layer"]), f"{layer['tokens']:,}", f"{layer['max_load']:.2f}", f"{layer['balance']:.3f}", *shares,
             f"{sum(layer['dropped']) / asked:.1%}"]
        )  # fmt: skip
    return head, rows


def preference_section(out: Path, routes: Routes) -> Section:
    """Image against text tokens of each expert and, where questions have types, the load by type."""
    counts_MLE = routes.counts_LME[list(routes.layers)].transpose(1, 0, 2)
    paths = [_saved(figures.modality_preference(counts_MLE, routes.layers, routes.modalities), out / "modality.png")]
    by_type = figures.load_by_type(routes.record)
    if by_type is not None:
        paths.append(_saved(by_type, out / "types.png"))
    text = (
        "An expert with a preference has bars far from the middle. Question types split the text tokens only: an image "
    )
    return Section("Modality and question type", text + "stands before the question and cannot know it.", paths)


def traffic_section(routes: Routes) -> Section:
    """What these routes would send under expert parallelism, and who would wait."""
    head = ["expert-parallel ranks", "rows sent", "copies sent", "busiest / mean", "waiting"]
    found = [traffic(routes.choices_TLK, routes.num_experts, ranks) for ranks in divisions(routes.num_experts)]
    rows = [
        [str(one.ranks), f"{one.rows:.2f}", f"{one.copies:.2f}", f"{one.busiest:.2f}", f"{one.wait_share:.0%}"]
        for one in found
    ]
    text = (
        "Means over tokens and layers. Of a token other ranks get a row for each choice (all-to-all), or one copy for all "
        "experts of a rank (DeepEP). Waiting: share of the experts' time in which the mean rank waits for the busiest."
    )
    return Section("Expert parallelism", text, [], [(head, rows)])


def confidence_section(out: Path, routes: Routes) -> Section:
    """Entropy of the routers' probabilities, layer by layer."""
    text = (
        "Entropy 1 is a router that does not care, 0 one that is certain. Near 0 in every layer is a sign of collapse."
    )
    return Section(
        "Confidence", text, [_saved(figures.confidence(routes.record, routes.modalities), out / "confidence.png")]
    )


def pathway_section(out: Path, routes: Routes, pca: bool) -> Section:
    """The ten most frequent pathways of each modality; `pca` adds the original's picture of principal components."""
    parts = routes.first_by_modality
    found = {name: frequent_pathways(first_TL) for name, first_TL in parts.items()}
    pictures = [_saved(figures.pathways(found, routes.layers, routes.num_experts), out / "pathways.png")]
    if pca:
        components = {name: principal_pathways(first_TL, routes.num_experts) for name, first_TL in parts.items()}
        drawn = figures.principal_pathways(components, routes.layers, routes.num_experts)
        pictures.append(_saved(drawn, out / "pathways_pca.png"))
    head = ["tokens", *(f"layer {layer}" for layer in routes.layers), "count", "share"]
    rows = [row for name, ways in found.items() for row in _pathway_rows(name, ways)]
    text = "The first choices of a token, layer after layer; the ten most frequent of each modality, counted."
    return Section("Pathways", text, pictures, [(head, rows)])


def _pathway_rows(name: str, ways: Pathways) -> list[list[str]]:
    return [
        [name, *map(str, experts_L), f"{count:,}", f"{share:.1%}"]
        for experts_L, count, share in zip(ways.experts_PL.tolist(), ways.counts_P, ways.shares(), strict=True)
    ]


def coactivation_section(out: Path, routes: Routes) -> Section:
    """How often two experts are chosen for the same token."""
    pairs_LEE = coactivation(routes.choices_TLK, routes.num_experts)
    path = _saved(figures.coactivation(pairs_LEE, routes.layers), out / "coactivation.png")
    return Section("Co-activation", "Experts that are often chosen together may have become one.", [path])


def similarity_section(out: Path, similarity: Similarity) -> Section:
    """How far the experts have moved from their common origin, and how alike their moves are."""
    paths = [
        _saved(figures.similarity(similarity), out / "similarity.png"),
        _saved(figures.siblings(similarity), out / "siblings.png"),
    ]
    text = (
        "All experts of a layer start as the same FFN. How far has each gone, and are their ways different? A cosine near 1 "
        "says that they have all learned the same."
    )
    if similarity.identical:
        text += " Here all experts of a layer are still identical: this checkpoint has not been trained."
    return Section("Expert similarity", text, paths)


def overlay_section(out: Path, routes: Routes) -> Section:
    """First choices drawn over each picture, one file per picture."""
    paths = []
    for number, picture in enumerate(routes.pictures):
        figure = figures.overlay(picture, routes.layers, routes.num_experts)
        paths.append(_saved(figure, out / f"overlay_{number:02d}.png"))
    text = "First choices over the picture as the model sees it; grey: dropped. Few layers are left out where there are many."
    return Section("Pictures", text, paths)


def plain(similarity: Similarity) -> dict:
    """`Similarity` as JSON values, for routing.json."""
    values = {
        "origin": similarity.origin,
        "layers": list(similarity.layers),
        "from_origin": similarity.from_origin_LE.tolist(),
        "between": similarity.between_LEE.tolist(),
    }
    cosine: np.ndarray | None = similarity.cosine_LEE
    return values | ({} if cosine is None else {"cosine_of_moves": cosine.tolist()})

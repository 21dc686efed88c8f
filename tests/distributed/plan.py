"""Jobs as plain dicts (id, run, world, arguments), and what has to run before them. Imports no torch: pytest reads it."""

from tests.distributed.layouts import BY_ID, REFERENCES, Layout


def layout_job(layout: Layout) -> dict:
    return {"id": layout.id, "run": "run_layout", "layout": layout.id, "world": layout.world}


def continuation_job(source: str, target: str, **control) -> dict:
    """`control`: zero_moments or skip_weights, the negative controls."""
    name = "".join(f" {name}" for name in control)
    world = BY_ID[target].world
    return {
        "id": f"{source} -> {target}{name}",
        "run": "run_continuation",
        "source": source,
        "layout": target,
        "world": world,
        **control,
    }


def refused_job(name: str, source: str, layout: str, **how) -> dict:
    return {
        "id": name, "run": "run_refused", "source": source, "layout": layout, "world": BY_ID[layout].world, **how
    }  # fmt: skip


def with_dependencies(asked: list[dict]) -> list[dict]:
    """References first, then layouts, then what continues their checkpoints; each once."""
    ordered: dict[str, dict] = {}
    layouts = [BY_ID[name] for job in asked for name in (job.get("source"), job.get("layout")) if name in BY_ID]
    for layout in layouts:
        reference = layout_job(REFERENCES[layout.model])
        ordered[reference["id"]] = reference
    for name in (job.get("source") for job in asked):
        if name in BY_ID:
            ordered[name] = layout_job(BY_ID[name])
    others = [job for job in asked if job["run"] not in ("run_layout", "run_whole")]
    for job in [job for job in asked if job not in others] + others:
        for needed in job.get("needs", ()):
            ordered[needed["id"]] = needed
        ordered[job["id"]] = job
    return list(ordered.values())

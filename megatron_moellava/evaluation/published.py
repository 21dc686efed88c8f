"""The paper's results as data, to stand beside ours (MoE-LLaVA, arXiv 2401.15947 v3, tables 3 and 7).

None is a value the paper does not give. The LLaVAW column holds two judges: the MoE-LLaVA rows were reviewed by another
model than the LLaVA-1.5 rows, so that 86-97 and 63-71 are not on one scale. The POPE column is the mean F1 of the three
categories of the detail table, except in the last row, where the two tables disagree (85.7 against a mean of 85.2).
"""

from dataclasses import dataclass

COLUMNS = ("VQAv2", "GQA", "VisWiz", "SQA-I", "TextVQA", "POPE", "MME", "MMB", "LLaVAW", "MM-Vet")
POPE_COLUMNS = ("accuracy", "f1", "yes_ratio")


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One row of the paper's tables."""

    model: str
    activated: str  # parameters per token
    resolution: int  # pixels
    scores: tuple[float | None, ...]  # in the order of COLUMNS
    # adversarial, popular, random: (accuracy, F1, share of yes), in percent
    pope: tuple[tuple[float, float, float], ...] = ()

    def score(self, column: str) -> float | None:
        """The paper's value in `column`; None where it gives none."""
        return self.scores[COLUMNS.index(column)] if column in COLUMNS else None


PUBLISHED = (
    Published(
        model="LLaVA-1.5 Vicuna-13B",
        activated="13B",
        resolution=336,
        scores=(80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 70.7, 35.4),
        pope=((85.5, 84.4, 43.3), (87.4, 86.2, 41.3), (88.0, 87.1, 41.7)),
    ),
    Published(
        model="LLaVA-1.5 Vicuna-7B",
        activated="6.7B",
        resolution=336,
        scores=(78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 63.4, 30.5),
    ),
    Published(
        model="LLaVA-Phi",
        activated="2.7B",
        resolution=336,
        scores=(71.4, None, 35.9, 68.4, 48.6, 85.0, 1335.1, 59.8, None, 28.9),
    ),
    Published(
        model="MoE-LLaVA-1.6Bx4-Top2 (StableLM)",
        activated="2.0B",
        resolution=336,
        scores=(76.7, 60.3, 36.2, 62.6, 50.1, 85.7, 1318.2, 60.2, 86.8, 26.9),
        pope=((86.9, 85.7, 41.7), (85.3, 84.2, 43.5), (88.0, 87.1, 41.6)),
    ),
    Published(
        model="MoE-LLaVA-1.8Bx4-Top2 (Qwen)",
        activated="2.2B",
        resolution=336,
        scores=(76.2, 61.5, 32.6, 63.1, 48.0, 87.0, 1291.6, 59.7, 88.7, 25.3),
        pope=((86.1, 85.4, 44.9), (88.6, 87.7, 42.5), (88.7, 88.0, 43.0)),
    ),
    Published(
        model="MoE-LLaVA-2.7Bx4-Top2 (Phi-2)",
        activated="3.6B",
        resolution=336,
        scores=(77.6, 61.4, 43.9, 68.5, 51.4, 86.3, 1423.0, 65.2, 94.1, 34.3),
        pope=((85.9, 84.9, 43.2), (87.5, 86.4, 41.8), (88.5, 87.7, 41.8)),
    ),
    Published(
        model="MoE-LLaVA-1.6Bx4-Top2-384 (StableLM)",
        activated="2.0B",
        resolution=384,
        scores=(78.6, 61.5, 40.5, 63.9, 54.3, 85.9, 1335.7, 63.3, 90.3, 32.3),
        pope=((86.9, 85.6, 41.5), (85.7, 84.6, 43.0), (88.4, 87.5, 41.5)),
    ),
    Published(
        model="MoE-LLaVA-2.7Bx4-Top2-384 (Phi-2)",
        activated="3.6B",
        resolution=384,
        scores=(79.9, 62.6, 43.7, 70.3, 57.0, 85.7, 1431.3, 68.0, 97.3, 35.9),
        pope=((85.5, 84.2, 41.9), (86.7, 84.4, 41.7), (87.9, 86.9, 40.6)),
    ),
)

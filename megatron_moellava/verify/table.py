"""The result of a verification: one row per compared quantity, with the largest error and what is tolerated."""

import math
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One compared quantity with its largest error."""

    case: str
    quantity: str
    error: float
    tolerance: float
    where: str = ""  # which tensor or sample is the worst

    @property
    def passes(self) -> bool:
        """Whether the error is tolerated; NaN never is."""
        return self.error <= self.tolerance  # False for NaN


@dataclass(slots=True)
class Table:
    """The rows so far, and what could not be compared."""

    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # recordings that are missing, empty, or that no case reads

    def add(self, case: str, quantity: str, error: float, tolerance: float, where: str = "") -> None:
        """Add a quantity whose error is known."""
        self.rows.append(Row(case, quantity, float(error), tolerance, where))

    def close(self, case: str, quantity: str, ours, theirs, tolerance: float) -> None:
        """Largest absolute difference of two numbers or tensors. A different shape or a NaN is an infinite error."""
        self.add(case, quantity, largest_difference(ours, theirs), tolerance)

    def equal(self, case: str, quantity: str, ours, theirs) -> None:
        """Number of elements that differ; none may."""
        self.add(case, quantity, count_differences(ours, theirs), 0)

    def named(self, case: str, quantity: str, errors: dict[str, float], tolerance: float) -> None:
        """The worst of several tensors, with its name. No tensor at all is a failure."""
        where, error = max(errors.items(), key=lambda item: _rank(item[1]), default=("nothing to compare", math.inf))
        self.add(case, quantity, error, tolerance, where)

    @property
    def passes(self) -> bool:
        """Whether there is a row and every row passes."""
        return bool(self.rows) and all(row.passes for row in self.rows)

    def render(self) -> str:
        """The table as text, and a last line that counts."""
        case, quantity = (max([len(name), *(len(getattr(row, name)) for row in self.rows)]) for name in COLUMNS)
        lines = [f"{'case':{case}}  {'quantity':{quantity}}  {'error':>9}  {'tolerance':>9}  result"]
        for row in self.rows:
            result = "pass" if row.passes else f"FAIL  {row.where}".rstrip()
            numbers = f"{_number(row.error):>9}  {_number(row.tolerance):>9}"
            lines.append(f"{row.case:{case}}  {row.quantity:{quantity}}  {numbers}  {result}")
        failed = sum(not row.passes for row in self.rows)
        lines += [f"not compared: {what}" for what in self.left_out]
        return "\n".join([*lines, f"{len(self.rows)} quantities compared, {failed} failed"])


COLUMNS = ("case", "quantity")


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0f}" if value == int(value) else f"{value:.1e}"


def largest_difference(ours, theirs) -> float:
    """Largest absolute difference in fp64; infinite for different shapes or NaN."""
    ours, theirs = (torch.as_tensor(item, dtype=torch.float64).cpu() for item in (ours, theirs))
    if ours.shape != theirs.shape:
        return math.inf
    difference = (ours - theirs).abs().nan_to_num(nan=math.inf, posinf=math.inf)
    return float(difference.max()) if difference.numel() else 0.0


def count_differences(ours, theirs) -> float:
    """Number of differing elements; infinite for different shapes. 0 or 1 for what is no tensor."""
    if isinstance(theirs, torch.Tensor):
        return float((ours.cpu() != theirs.cpu()).sum()) if ours.shape == theirs.shape else math.inf
    return float(ours != theirs)


def relative_errors(ours: dict, theirs: dict, floor: float = 0.0) -> dict[str, float]:
    """Per name: largest difference over the largest expected element, at least `floor`. A name on one side only: inf."""
    errors = dict.fromkeys(ours.keys() ^ theirs.keys(), math.inf)
    for name in ours.keys() & theirs.keys():
        expected = torch.as_tensor(theirs[name], dtype=torch.float64).cpu()
        errors[name] = largest_difference(ours[name], expected) / max(float(expected.abs().max()), floor, 1e-30)
    return errors

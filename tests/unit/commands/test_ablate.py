"""What `moellava ablate` writes into the document."""

from megatron_moellava.commands.ablate import CLAIMS_HEAD, DOCS_HEAD
from tests.helpers.paths import REPO


def test_the_document_has_the_text_that_the_command_writes():
    text = (REPO / "docs/measurements/ablations.md").read_text()
    assert text.startswith(DOCS_HEAD) and CLAIMS_HEAD in text

"""The published towers."""

import re

from megatron_moellava.towers import RULES, TOWERS, get_tower
from tests.helpers.paths import REPO


def test_visual_tokens_of_the_published_towers():
    assert get_tower("clip-vit-large-patch14-336").num_features == 576
    assert get_tower("siglip-so400m-patch14-384").num_features == 729
    assert get_tower("siglip-so400m-patch14-384@original").num_features == 728
    assert get_tower("clip-vit-large-patch14-336").num_used_layers == 23
    assert get_tower("siglip2-so400m-patch16-naflex").num_features == 256
    assert get_tower("siglip2-so400m-patch16-naflex").num_used_layers == 27, "features are those after the last layer"
    assert get_tower("clip-vit-large-patch14-336").pad_color == (122, 116, 104)


def test_the_page_lists_every_published_tower_and_every_rule():
    page = (REPO / "docs/reference/data.md").read_text().split("### Towers")[1].split("### Native")[0]
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = [[*re.findall(r"`([^`]+)`", line), line.split("|")[-2]] for line in lines]
    listed = {name: tokens for *names, tokens in rows for name in names if "patch" in name}
    published = {name: tower for name, tower in TOWERS.items() if tower.source.startswith("https")}
    assert listed.keys() == published.keys() - {"siglip-so400m-patch14-384-original"}
    for name, tokens in listed.items():
        assert str(get_tower(name).num_features) in tokens.replace(",", ""), name
    assert {name for names in rows for name in names if name.startswith("@")} == RULES.keys()

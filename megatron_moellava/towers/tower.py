"""`Tower`: one frozen vision encoder as data, with the rule that turns its hidden states into visual tokens."""

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field

from megatron_moellava.mapping import Heads, Mapping
from megatron_moellava.towers.projector import PROJECTORS
from megatron_moellava.towers.tiling import TILINGS, Tiling


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerHuggingFace:
    """The `config.json` and `preprocessor_config.json` side of a tower family."""

    family: str
    model_type: str  # "clip_vision_model"
    wrapper_model_type: str  # "clip": a config of image and text towers, whose `vision_config` is read
    architecture: str  # "CLIPVisionModel"
    image_processor: str  # "CLIPImageProcessor"
    constants: Dict[str, object]  # config key -> the only supported value
    inert: tuple[str, ...] = ()
    defaults: Dict[str, object] = field(default_factory=dict)  # what an absent key means
    counts_patches: bool = False  # the config has `num_patches`, those of the position table, instead of `image_size`
    fields: Dict[str, str] = field(default_factory=dict)  # further keys of its config -> fields of `Tower`
    is_wrapped: bool = False  # published as the `vision_config` of a config of image and text towers, never alone


@dataclass(frozen=True, kw_only=True, slots=True)
class Tower:
    """One vision tower. Sizes in elements or pixels."""

    name: str  # "clip-vit-large-patch14-336"
    source: str  # URL of the published config
    num_layers: int  # all layers of the published model
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    image_size: int  # native resolution: the square picture that the table of positions is made for
    patch_size: int
    activation: str  # "quick_gelu", "gelu_tanh", "gelu"
    layernorm_epsilon: float
    class_token: bool
    pre_layernorm: bool
    patch_bias: bool
    feature_layer: int = -2  # index into transformers' hidden_states (0: embeddings, -1: after the last layer)
    drop_first_feature: bool  # CLIP: the class token. SigLIP has none, yet MoE-LLaVA drops its first patch (728 of 729)
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    resize: str  # "shortest_edge_crop" or "square"
    resample: str = "bicubic"  # or "bilinear": how pixels are interpolated
    # Each picture keeps its shape and has a grid of patches of its own; the table of positions is resized to it.
    native: bool = False
    post_layernorm: bool = False  # features are those after the published model's last norm
    projector: str = "mlp2x_gelu"  # a name in PROJECTORS
    tiling: str = "next"  # a name in TILINGS: how data.image_grid cuts large pictures
    newline: bool = False  # tiles are put together without their padding, and a learned row ends each line of features
    max_num_patches: int = 0  # native resolution: of one picture; 0: as many as the table has positions
    num_frames: int = (
        1  # of a video, which its layers attend across; more than one: it takes such videos and no pictures
    )
    hf: TowerHuggingFace
    mapping: tuple[Mapping, ...]
    unused: tuple[str, ...]  # tensors (below `vision_model.`) that no feature needs; `{i}`: every layer not used

    @property
    def pad_color(self) -> tuple[int, int, int]:
        """What `image_aspect_ratio: pad` fills the square with: the mean colour, rounded down as the original does."""
        red, green, blue = (int(value * 255) for value in self.image_mean)
        return red, green, blue

    @property
    def num_patches(self) -> int:
        """Patches of one image; at native resolution of the largest."""
        patches = self.max_num_patches or (self.image_size // self.patch_size) ** 2
        return patches - patches % self.shuffle**2 if self.native else patches

    @property
    def position_side(self) -> int:
        """Patches along one side of the square that the table of positions is made for."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding: the patches, and the class token if there is one."""
        return self.position_side**2 + self.class_token

    @property
    def num_rows(self) -> int:
        """Rows of the tower's sequence for one image (at native resolution the largest): patches, and the class token."""
        return self.num_patches + self.class_token

    @property
    def shuffle(self) -> int:
        """Neighbouring patches along one side that become one visual token."""
        return PROJECTORS[self.projector].shuffle

    @property
    def num_features(self) -> int:
        """Visual tokens per image: 576 for CLIP-L/14-336, 729 for SigLIP-so400m-384 (728 with the first dropped).

        At native resolution those of the largest picture: its budget.
        """
        return (self.num_rows - self.drop_first_feature) // self.shuffle**2

    @property
    def feature_side(self) -> int:
        """Visual tokens along one side of an image (of a tile)."""
        return self.position_side // self.shuffle

    @property
    def tiles(self) -> Tiling:
        """How large pictures are cut."""
        return TILINGS[self.tiling]

    @property
    def has_grids(self) -> bool:
        """Whether a picture's size decides how its visual tokens lie: batches then bring `grids`."""
        return self.native or self.newline

    @property
    def projector_input_size(self) -> int:
        """Width of what enters the projector."""
        return self.hidden_size * self.shuffle**2

    @property
    def pixel_shape(self) -> tuple[int, int, int]:
        """Of what a batch counts as one: an image (or a tile) of three channels; at native resolution a patch."""
        side = self.patch_size if self.native else self.image_size
        return 3, side, side

    def work(self, patches: int) -> float:
        """What an image costs in one layer, in units of 4 * hidden_size FLOPs: products of each patch, and attention between
        all of them; of a frame also what it costs to attend across its video."""
        across = 2 * self.hidden_size + self.num_frames if self.takes_videos else 0
        return float(patches * (2 * self.hidden_size + self.ffn_hidden_size + patches + across))

    @property
    def takes_videos(self) -> bool:
        """Whether its layers attend across the frames of a video, so that it takes whole videos alone."""
        return self.num_frames > 1

    @property
    def num_used_layers(self) -> int:
        """Layers that the feature needs: hidden_states has num_layers + 1 entries, so -2 leaves the last layer out."""
        return self.feature_layer % (self.num_layers + 1)

    @property
    def heads(self) -> Heads:
        """What the mapping of a fused QKV tensor needs to know."""
        return Heads(
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_attention_heads,
            kv_channels=self.hidden_size // self.num_attention_heads,
        )

"""Turn a LLaVA JSON and its images into WebDataset shards for training, or describe a JSON without writing any.

  moellava prepare-data --data pretrain.json --image-folder images --out shards --workers 8
  moellava prepare-data --data pretrain.json --image-folder images --statistics --tokenizer phi-2 --out report

Small sets need no shards: training reads the JSON itself. Shards are for slow or shared file systems, where hundreds of
thousands of small files hurt. The same command continues an interrupted run and
looks at bad rows again. Bad rows stop it unless --max-skip-share
allows them; OUT/report.json names each. With --tokenizer it also writes OUT/token_lengths.png and prints how well the
samples will pack. Exit code 2: the data cannot be used as asked.
"""

import argparse
import json
import sys
from pathlib import Path

from megatron_moellava.commands.program import COUNT, command_parser, exit_code_of, number


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of `moellava prepare-data`."""
    parser = command_parser("prepare-data", __doc__)
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSON, JSON Lines or Parquet; docs/reference/data.md"
    )
    parser.add_argument(
        "--image-folder", default="", metavar="DIR", help="image paths are relative to it (FILE's folder)"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards and the report")
    parser.add_argument("--workers", type=COUNT, default=4, help="processes (4)")
    parser.add_argument("--rows-per-shard", type=COUNT, default=1000, help="1000")
    parser.add_argument("--max-images", type=COUNT, default=16, help="per row (16)")
    parser.add_argument("--video-frames", type=COUNT, default=8, help="frames kept of each video (8)")
    parser.add_argument(
        "--video-fps",
        type=number(float, least=0),
        default=0.0,
        help="frames kept of a second, up to --video-frames (0: off)",
    )
    parser.add_argument(
        "--video-pooling",
        choices=("none", "2x2", "2x2x2"),
        default="none",
        help="that of the training: frames pooled together share a time (none)",
    )
    parser.add_argument(
        "--video-times",
        choices=("none", "seconds"),
        default="none",
        help="what the text says of each frame's time (none)",
    )
    parser.add_argument(
        "--max-skip-share", type=number(float, least=0, most=1), default=0.0, help="bad rows tolerated, e.g. 0.01 (0)"
    )
    parser.add_argument("--ignore-keys", nargs="*", default=[], metavar="KEY", help="keys of rows to pass over (none)")
    parser.add_argument(
        "--trust-paths", action="store_true", help="pictures may lie anywhere: absolute names, `..`, symbolic links"
    )
    parser.add_argument("--config", metavar="FILE", help="the run's YAML, for its data.modalities (none)")
    parser.add_argument("--statistics", action="store_true", help="only describe the JSON; needs --tokenizer")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder or SentencePiece .model, for token lengths")
    parser.add_argument("--template", default="v1", help="conversation version (v1)")
    parser.add_argument(
        "--tower", default="clip-vit-large-patch14-336", help="vision tower (clip-vit-large-patch14-336)"
    )
    parser.add_argument("--seq-length", type=COUNT, default=4096, help="tokens per packed row (4096)")
    parser.add_argument("--max-sample-length", type=COUNT, default=2048, help="longer samples are cut (2048)")
    parser.add_argument(
        "--length-counts",
        choices=["positions", "text"],
        default="positions",
        help="what --max-sample-length counts: positions, or ids before images grow, as the original does (positions)",
    )
    parser.add_argument("--packing-buffer", type=COUNT, default=128, help="samples the packer looks at (128)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Write shards, statistics, or both, and return the exit code."""
    parsed = parse_arguments(arguments)
    from megatron_moellava.config import MoELlavaError

    try:
        if not parsed.statistics:
            _print_report(_shards(parsed))
        if parsed.tokenizer or parsed.statistics:
            _statistics(parsed)
    except (MoELlavaError, OSError) as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0


def _shards(parsed: argparse.Namespace) -> dict:
    from megatron_moellava.data.shards import make_shards

    return make_shards(
        parsed.data,
        parsed.image_folder or Path(parsed.data).parent,
        parsed.out,
        rows_per_shard=parsed.rows_per_shard,
        workers=parsed.workers,
        max_images=parsed.max_images,
        video_frames=parsed.video_frames,
        video_fps=parsed.video_fps,
        video_times=parsed.video_times,
        video_pooling=parsed.video_pooling,
        max_skip_share=parsed.max_skip_share,
        ignore_keys=tuple(parsed.ignore_keys),
        trust_paths=parsed.trust_paths,
        modalities=_modalities(parsed.config),
    )


def _modalities(config: str | None) -> tuple:
    """`data.modalities` of a run's YAML. ConfigError for records that are wrong."""
    from megatron_moellava.config import ConfigError, DataConfig, from_dict, read_yaml
    from megatron_moellava.validation.modalities import modality_problems

    if not config:
        return ()
    found = (read_yaml(config).get("data") or {}).get("modalities") or ()
    data = from_dict(DataConfig, {"modalities": found})
    if problems := [*modality_problems(data)]:
        raise ConfigError("\n".join(problems))
    return data.modalities


def _print_report(report: dict) -> None:
    skipped = ", ".join(f"{count} {reason}" for reason, count in report["skipped"].items()) or "none"
    print(
        f"wrote {report['written']:,} of {report['rows']:,} rows, {report['images']:,} images, {report['shards']} shards"
    )
    print(f"skipped {len(report['skipped_rows']):,}: {skipped}")
    for name, count in report["notes"].items():
        print(f"note: {count:,} x {name}")
    if report["rows_with_duplicate_id"]:
        print(f"note: {report['duplicates_message']}")


def _statistics(parsed: argparse.Namespace) -> None:
    from megatron_moellava.config import ConfigError, DataConfig
    from megatron_moellava.data.index import index_json
    from megatron_moellava.data.loader import build_encoder
    from megatron_moellava.data.statistics import describe, plot, token_lengths
    from megatron_moellava.data.tokenizer import load_tokenizer
    from megatron_moellava.towers import get_tower

    if not parsed.tokenizer:
        raise ConfigError("--statistics needs --tokenizer: the language model's folder, or a SentencePiece .model")
    data = DataConfig(
        seq_length=parsed.seq_length,
        max_sample_length=parsed.max_sample_length,
        length_counts=parsed.length_counts,
        template=parsed.template,
        ignore_keys=tuple(parsed.ignore_keys),
        modalities=_modalities(parsed.config),
    )
    encoder = build_encoder(data, load_tokenizer(parsed.tokenizer), get_tower(parsed.tower))
    out = Path(parsed.out)
    out.mkdir(parents=True, exist_ok=True)
    index = index_json(parsed.data, out / "index")
    tokens, images, unusable = token_lengths(index, encoder, data.ignore_keys, data.modalities)
    found = {"rows": index.rows, "unusable_rows": unusable}
    found |= describe(tokens, images, parsed.seq_length, parsed.packing_buffer)
    plot(tokens, images, out / "token_lengths.png", f"{Path(parsed.data).name}: {len(tokens):,} samples")
    (out / "statistics.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))

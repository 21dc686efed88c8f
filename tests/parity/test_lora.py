"""`peft` on an exported base is the oracle of our adapters: the same logits, gradients and three steps of AdamW."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from megatron_moellava import parallel
from megatron_moellava.config import MoEConfig, ParallelConfig
from megatron_moellava.conversion.adapter_exports import export_adapter
from megatron_moellava.conversion.adapter_imports import import_adapter
from megatron_moellava.conversion.exports import export_checkpoint
from megatron_moellava.conversion.imports import import_checkpoint
from megatron_moellava.conversion.megatron_checkpoint import open_checkpoint
from megatron_moellava.conversion.merge import merge_adapter
from megatron_moellava.conversion.upcycle import upcycle_checkpoint
from megatron_moellava.model.build import build_model
from megatron_moellava.model.inputs import model_inputs
from megatron_moellava.model.weights import load_weights
from megatron_moellava.training.checkpoint import save_checkpoint
from tests.helpers.conversion_models import read
from tests.helpers.lora_models import Rows, Theirs, lora_run, started, step_with_gradients
from tests.helpers.process_groups import release_groups
from tests.parity.test_hf_conversion import VISION, VOCABULARY, language_model, load, randomised

TOLERANCE = 1e-5  # of the largest entry of each tensor, fp32
EVERYWHERE = ["attention", "ffn", "experts", "router"]
CASES = {  # (family, experts, pictures, settings of the run)
    "dense": (
        "llama-3.1",
        None,
        True,
        {"training.lora.targets": ["attention", "ffn", "projector", "tower"], "training.trains": []},
    ),
    "gated experts": (
        "stablelm",
        MoEConfig(placement=(1,)),
        False,
        {"training.lora.targets": EVERYWHERE, "training.trains": []},
    ),
    "biased experts, router whole": (
        "phi",
        MoEConfig(placement=(1, 2), use_residual=True),
        False,
        {"training.trains": ["router"], "training.lora.use_rslora": True},
    ),
    "experts in one tensor": (
        "qwen3",
        MoEConfig(),
        False,
        {"training.lora.targets": EVERYWHERE, "training.trains": [], "training.lora.use_rslora": True},
    ),
    "shared outer": ("stablelm", MoEConfig(), False, {"training.trains": [], "training.lora.shared_outer": True}),
}


class Case:
    """Both sides of one case: everything that is compared, computed once."""

    def __init__(self, folder, name: str):
        family, moe, pictures, settings = CASES[name]
        self.folder, self.rows = folder, Rows(pictures=pictures, vocabulary=VOCABULARY)
        tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
        randomised(tower).save_pretrained(folder / "tower")
        language_model(family, folder / "hf")
        import_checkpoint(
            folder / "hf", save=folder / "base", tower=str(folder / "tower"), keep_output_bias=family == "phi"
        )
        self.base = folder / "base"
        if moe is not None:
            upcycle_checkpoint(self.base, save=folder / "moe", moe=moe, noise_std=0.5)
            self.base = folder / "moe"
        export_checkpoint(self.base, save=folder / "exported", layout="transformers")
        run = lora_run(self.base, folder / "run", **{"training.lora.rank": 3, "training.lora.alpha": 5.0} | settings)
        self.trainer = started(run, self.rows)
        save_checkpoint(folder / "run", run, self.trainer.chunks, self.trainer.state)
        export_adapter(folder / "run", save=folder / "adapter")
        self.ours = self.logits(self.trainer.chunks[0])
        self.gradients = step_with_gradients(self.trainer)
        for _ in range(2):
            self.trainer.step()
        self.trainer.save()
        export_adapter(folder / "run", save=folder / "trained")
        merge_adapter(folder / "run", save=folder / "merged")

    def logits(self, model) -> torch.Tensor:
        model.eval()
        inputs = {name: value for name, value in model_inputs(self.rows.batch()).items() if name != "labels_BS"}
        with torch.no_grad():
            logits = model(**inputs)[..., :VOCABULARY]
        model.train()
        return logits

    @property
    def is_fused(self) -> bool:
        return not (self.folder / "exported/modeling_moe_llava.py").exists() and self.trainer.run.moe is not None

    def theirs(self, adapter: str) -> Theirs:
        model = load(self.folder / "exported")
        return Theirs(PeftModel.from_pretrained(model, self.folder / adapter, is_trainable=True), self.rows)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    parallel.initialize(ParallelConfig(), 1)
    yield Case(tmp_path_factory.mktemp("lora"), request.param)
    parallel.shutdown()
    release_groups()


def assert_close(here: dict[str, torch.Tensor], there: dict[str, torch.Tensor]) -> None:
    assert here.keys() == there.keys(), sorted(here.keys() ^ there.keys())[:6]
    for name, value in here.items():
        error = (value - there[name]).abs().max() / there[name].abs().max()
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def test_logits_gradients_and_three_steps_are_those_of_peft(case):
    theirs = case.theirs("adapter")
    with torch.no_grad():
        assert_close({"logits": case.ours}, {"logits": theirs.logits()})
        with theirs.model.disable_adapter():
            assert (theirs.logits() - case.ours).abs().max() > 100 * TOLERANCE  # the adapters matter
    if case.trainer.run.training.lora.shared_outer:
        return  # peft trains a copy for each expert
    gradients = theirs.step()
    assert case.gradients
    assert_close(case.gradients, {name: gradients[name] for name in case.gradients})
    if case.is_fused:
        return  # peft's B has entries between gate and up, which it trains too
    for _ in range(2):
        theirs.step()
    before, trained = (load_file(case.folder / name / "adapter_model.safetensors") for name in ("adapter", "trained"))
    assert_close(trained, dict(get_peft_model_state_dict(theirs.model)))
    assert not any(torch.equal(value, before[name]) for name, value in trained.items())


def test_merged_equals_unmerged_here_and_in_transformers(case):
    trained = case.logits(case.trainer.chunks[0])
    run = lora_run(case.folder / "merged", case.folder / "unused")
    (model,) = build_model(run)
    load_weights(case.folder / "merged/iter_0000000", [model])
    assert_close({"logits": case.logits(model)}, {"logits": trained})
    export_checkpoint(case.folder / "merged", save=case.folder / "merged_hf", layout="transformers")
    with torch.no_grad():
        there = Theirs.logits(type("Merged", (), {"model": load(case.folder / "merged_hf"), "rows": case.rows})())
    assert_close({"logits": there}, {"logits": trained})


def test_what_peft_saves_is_imported_again(case):
    theirs = case.theirs("trained")
    theirs.model.save_pretrained(case.folder / "saved")
    import_adapter(case.folder / "saved", base=case.base, save=case.folder / "again")
    before, after = (open_checkpoint(case.folder / name, adapter=True).tensors for name in ("run", "again"))
    assert before.keys() == after.keys()
    shared = case.trainer.run.training.lora.shared_outer
    for name, tensor in before.items():
        there = read(after[name])
        assert torch.equal(
            read(tensor).expand_as(there) if shared and tensor.shape != there.shape else read(tensor), there
        )
    merge_adapter(case.folder / "again", save=case.folder / "merged_again")
    here, there = (open_checkpoint(case.folder / name).tensors for name in ("merged", "merged_again"))
    assert all(torch.equal(read(tensor), read(there[name])) for name, tensor in here.items())

"""What lmms-eval finds by its entry point group `lmms_eval.models`: the name of our model and where its class is.

Apart from the class, because lmms-eval asks every installed plugin at every start; the class imports Megatron-Core.
"""

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """`--model megatron_moellava`."""
    return ModelManifest(
        model_id="megatron_moellava",
        simple_class_path="megatron_moellava.evaluation.lmms_eval_model.MegatronMoELlava",
        aliases=("moellava",),
    )

"""The one table of methods: what exists, what it is called, where it lives."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType


@dataclass(frozen=True)
class Method:
    """One row. `names` are the public names of the method's module; `objective` is the one among
    them that `--method` builds, where the method is a loss that a trainer can follow."""

    id: str
    title: str
    arxiv: str
    domain: str
    kind: str
    kernels: tuple[str, ...]
    names: tuple[str, ...]
    objective: str | None = None

    @property
    def module(self) -> str:
        return f"stillhouse.methods.{self.domain}.{self.id.replace('-', '_')}"

    @property
    def recipe(self) -> str:
        return f"stillhouse.recipes.{self.domain}.{self.id.replace('-', '_')}"

    def load(self) -> ModuleType:
        """The method's module."""
        return import_module(self.module)

    def load_recipe(self) -> ModuleType:
        """The module whose `run(report, seeds, budget)` measures the method's claims."""
        return import_module(self.recipe)


METHODS = {
    method.id: method
    for method in (
        Method(
            id="taid",
            title="Temporally adaptive interpolated distillation",
            arxiv="2501.16937",
            domain="language",
            kind="logit loss with a schedule",
            kernels=("divergence",),
            names=("taid_loss", "TAIDLoss"),
            objective="TAIDLoss",
        ),
        Method(
            id="sinkd",
            title="Sinkhorn distance minimisation",
            arxiv="2402.17110",
            domain="language",
            kind="logit loss across samples",
            kernels=("sinkhorn", "divergence"),
            names=("sinkhorn_kd", "sample_sinkhorn_kd", "embedded_sinkhorn_kd", "SinKDLoss"),
            objective="SinKDLoss",
        ),
        Method(
            id="mgsr",
            title="Multi-granularity semantic revision",
            arxiv="2407.10068",
            domain="language",
            kind="logit loss, with corrected responses",
            kernels=("divergence",),
            names=("clipped_kl", "DACKL", "span_correlation", "revise", "phrase_spans", "MGSRLoss"),
            objective="MGSRLoss",
        ),
        Method(
            id="teacher-hacking",
            title="Teacher hacking: a study and a detector",
            arxiv="2502.02671",
            domain="language",
            kind="analysis of a training run",
            kernels=("divergence",),
            names=("HackingStudy", "Trace", "detect", "sequence_kl"),
        ),
        Method(
            id="first",
            title="Efficient trustworthy distillation",
            arxiv="2408.12168",
            domain="language",
            kind="logit loss on a calibrated top k",
            kernels=("divergence",),
            names=("recalibrate", "fit_temperature", "FIRSTLoss"),
            objective="FIRSTLoss",
        ),
        Method(
            id="codegen2",
            title="Causal and span-corruption mixture, with infilling",
            arxiv="2305.02309",
            domain="language",
            kind="data transform, attention mask and sampler",
            kernels=(),
            names=(
                "Sentinels",
                "CausalLM",
                "PrefixLM",
                "SpanCorruption",
                "FillInMiddle",
                "Mixture",
                "restore",
                "prefix_lm_mask",
                "document_mask",
                "infill_prompt",
                "infill",
                "truncate_completion",
                "pass_at_k",
            ),
        ),
        Method(
            id="multi-teacher-bert",
            title="Distilling from several teachers",
            arxiv="2112.12650",
            domain="language",
            kind="logit and feature loss, masking and metrics",
            kernels=("divergence",),
            names=(
                "ensemble_kl",
                "multi_teacher_loss",
                "EnsembleLoss",
                "TeacherEnsemble",
                "common_tokens",
                "rare_word_masking",
                "retokenize_embeddings",
                "label_loyalty",
                "probability_loyalty",
                "regression_loyalty",
            ),
        ),
        Method(
            id="llava-mod",
            title="Mixture-of-experts distillation",
            arxiv="2408.15881",
            domain="language",
            kind="logit loss and preference loss, in stages",
            kernels=("divergence",),
            names=("LLaVAMoDLoss", "preference_batch", "VisionPrefix"),
            objective="LLaVAMoDLoss",
        ),
        Method(
            id="capacity-gap",
            title="Law of capacity gap",
            arxiv="2311.07052",
            domain="language",
            kind="pruned students, logit loss, scaling law",
            kernels=("divergence",),
            names=(
                "mask_importance",
                "component_sparsity",
                "CapacityGapLoss",
                "capacity_gap_sweep",
                "optimal_teacher",
                "fit_capacity_gap_law",
            ),
            objective="CapacityGapLoss",
        ),
        Method(
            id="return-of-encoder",
            title="An encoder-decoder student of a decoder-only teacher",
            arxiv="2501.16273",
            domain="language",
            kind="logit loss across architectures, and the model",
            kernels=("divergence",),
            names=(
                "align_seq2seq",
                "Seq2SeqRows",
                "CrossArchitectureLoss",
                "EncoderDecoder",
                "EncoderDecoderConfig",
                "layer_split",
            ),
            objective="CrossArchitectureLoss",
        ),
        Method(
            id="making-the-most",
            title="Making the most of a pretrained transformer",
            arxiv="2408.16241",
            domain="language",
            kind="model surgery, training loss, sampler, search and analysis",
            kernels=("divergence",),
            names=(
                "WindowRecurrence",
                "HiddenStateOptimizer",
                "UnrolledDenoiser",
                "seq2seq_from_mlm",
                "conditional_beam_search",
                "exact_length_mode",
                "train_prefix_classifier",
                "LengthAttribute",
                "mode_flip_threshold",
                "output_entropy",
            ),
        ),
        Method(
            id="mend",
            title="Demonstrations distilled into vectors",
            arxiv="2403.06914",
            domain="language",
            kind="hyper-network for prompts, logit loss",
            kernels=("divergence",),
            names=(
                "ContextDistiller",
                "context_distillation_loss",
                "split_for_pretraining",
                "build_icl_batch",
                "prefix_cache",
                "score_candidates",
            ),
        ),
        Method(
            id="dm-codec",
            title="A speech codec taught by text and speech models",
            arxiv="2410.15017",
            domain="speech",
            kind="feature loss, and the codec with its training",
            kernels=("rvq",),
            names=(
                "feature_axis_distillation",
                "dm_codec_loss",
                "align_text",
                "CodecConfig",
                "SpeechCodec",
                "CodecWeights",
                "codec_losses",
                "DiscriminatorConfig",
                "codec_discriminators",
                "MultiTeacherCodecDistiller",
            ),
        ),
        Method(
            id="aded",
            title="Adaptive draft-verification",
            arxiv="2407.12021",
            domain="speculative",
            kind="drafter without a model, for speculative decoding",
            kernels=("draft", "tree"),
            names=("TrigramTable", "MCTSDrafter", "BeamDrafter", "NGramDrafter"),
        ),
        Method(
            id="db-llm",
            title="Dual-binarized weights and deviation-aware distillation",
            arxiv="2402.11960",
            domain="compression",
            kind="quantized layers, and a logit loss weighted by entropies",
            kernels=("fdb", "divergence"),
            names=(
                "quantize_fdb_",
                "entropy_weighted_kd",
                "EntropyWeightedLoss",
                "save_fdb",
                "load_fdb",
            ),
            objective="EntropyWeightedLoss",
        ),
        Method(
            id="distillspec",
            title="Draft models distilled for speculative decoding",
            arxiv="2310.08461",
            domain="speculative",
            kind="logit loss on the draft's own text, exact and lossy decoding",
            kernels=("divergence", "tree"),
            names=(
                "DistillSpecLoss",
                "tvd_plus_plus",
                "acceptance_rate",
                "block_efficiency",
                "speed_up",
                "lenient_law",
                "lenient_chain",
            ),
            objective="DistillSpecLoss",
        ),
        Method(
            id="fspad",
            title="Draft heads with feature sampling and partial alignment",
            arxiv="2408.15562",
            domain="speculative",
            kind="draft head, feature and logit loss, trees that it grows",
            kernels=("divergence", "draft", "tree"),
            names=(
                "FSPADHead",
                "draft_head_loss",
                "target_features",
                "train_draft_head",
                "DynamicTreeDrafter",
            ),
        ),
    )
}


def find(id: str) -> Method:
    """The row of a method. Raises ValueError naming the ids that exist."""
    if id not in METHODS:
        raise ValueError(f"no method {id!r}: expected one of {', '.join(METHODS)}")
    return METHODS[id]

"""The settings of the local rules: each field is a recipe key and a command-line option."""

from typing import Literal, Self

from pydantic import Field, model_validator

from converter.errors import StiefelError
from trainers.cuts.blocks import CutSettings


class FeedbackSettings(CutSettings):
    """What a root's features and feedback hold, shared by every rule with feedback."""

    pool: int = Field(
        4, ge=1, description="side of the grid to which feature maps are averaged for the feedback"
    )
    readout: int = Field(
        2**20,
        ge=1,
        description="most numbers in a root's feedback basis, features x rank; the grid's side is "
        "halved while there are more, as there are with a thousand classes",
    )
    storage: Literal["stored", "recomputed"] = Field(
        "stored",
        description="with the output's error: keep all block graphs until it is known (stored), or "
        "run a second forward in constant memory (recomputed); with a lookahead: likewise keep the "
        "graphs of the teacher's blocks, or run these again",
    )


class SSA(FeedbackSettings):
    """SVD-space alignment: local losses, structured feedback B = B_U diag(B_S) B_Vᵀ."""

    name: Literal["ssa"] = Field("ssa", description="rule: SVD-space alignment")
    error: Literal["layerwise", "global"] = Field(
        "layerwise",
        description="each block's own read-out error (layerwise), or the output's error sent "
        "straight to each block (global)",
    )
    feedback: Literal["fixed", "learned", "calibrated", "kolen-pollack"] = Field(
        "learned", description="how the feedback matrices B come about"
    )
    readout_layers: int | None = Field(
        None,
        ge=0,
        description="3x3 convolutions, learned locally, that read-out and similarity see beside a "
        "map itself, the first two on twice the pool's grid; default: one for every three layers "
        "that follow the block, from one to four, where feedback is learned from a layerwise "
        "error, else 0",
    )
    readout_width: int = Field(64, ge=1, description="channels of these convolutions")
    cross_entropy: float | None = Field(
        None, ge=0, description="weight of the cross-entropy; default 1, or 0 with a teacher"
    )
    similarity: float | None = Field(
        None,
        ge=0,
        description="weight of similarity matching; default 10, or 0 with teacher or global error",
    )
    distillation: float | None = Field(
        None,
        ge=0,
        description="weight of local distillation; default 1 with a teacher, 0.3 where its blocks "
        "are looked ahead through, else 0",
    )
    lookahead: int = Field(
        0,
        ge=0,
        description="blocks of the teacher that a block's output runs on through, to be compared "
        "there too, and with the labels at the teacher's output",
    )
    overlap: int = Field(
        1,
        ge=1,
        description="on one GPU: blocks at work at once, each one's backward beside the next one's "
        "forward, in the memory of so many; not named blocks, nor such as share a layer",
    )
    alpha: float = Field(0.0, ge=0, description="weight of alignment of U with the feedback")
    beta: float = Field(0.0, ge=0, description="weight of the orthogonality penalty on U and V")
    cosine: float = Field(0.0, ge=0, description="weight of the cosine term, output to feedback")
    hoyer: float = Field(0.0, ge=0, description="weight of Hoyer sparsity on S")

    def resolved(self, with_teacher: bool) -> "SSA":
        """With every coefficient a number; `readout_layers` None where it goes by what follows.

        Raises:
            StiefelError: distillation or a lookahead is asked for and there is no teacher,
                read-outs are to have layers and there are none, blocks are to overlap that wait for
                each other, or nothing trains.
        """
        learned = self.error == "layerwise" and self.feedback == "learned"
        # A lookahead ends at the labels, which are to be heard beside the teacher's features.
        taught = 0.3 if self.lookahead else 1.0
        defaults = {
            "readout_layers": None if learned else 0,
            "cross_entropy": 0.0 if with_teacher else 1.0,
            "similarity": 0.0 if with_teacher or self.error == "global" else 10.0,
            "distillation": taught if with_teacher else 0.0,
        }
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        settings = self.model_copy(update=missing)
        if settings.distillation and not with_teacher:
            raise StiefelError("distillation needs a teacher: name the dense original's checkpoint")
        if settings.lookahead and not settings.distillation:
            raise StiefelError(
                "lookahead goes through the teacher: name the dense original's checkpoint, and let "
                "distillation be more than 0"
            )
        if not (settings.cross_entropy or settings.similarity or settings.distillation):
            raise StiefelError(
                "cross_entropy, similarity and distillation are all 0: nothing would train"
            )
        alone = self.error == "layerwise" and not with_teacher
        for name in ("overlap", "sample"):
            if getattr(settings, name) > 1 and not alone:
                raise StiefelError(
                    f"{name} needs blocks that wait for nothing but their input: error: layerwise, "
                    "and no teacher"
                )
        if settings.readout_layers and self.error == "global":
            raise StiefelError(
                "readout_layers are of a block's own read-out: they need error: layerwise"
            )
        if not (settings.cross_entropy or settings.similarity or settings.cosine):
            settings = settings.model_copy(update={"readout_layers": 0})  # nothing would read them
        return settings


class DFA(FeedbackSettings):
    """Direct feedback alignment (Nøkland 2016): the output error through dense random matrices."""

    name: Literal["dfa"] = Field("dfa", description="rule: direct feedback alignment")

    @model_validator(mode="after")
    def _of_all_images(self) -> Self:
        if self.sample > 1:
            raise ValueError("sample needs a layerwise error, which is for rule ssa")
        return self

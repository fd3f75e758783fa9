"""Methods for language models."""

from stillhouse.methods.language.taid import TAIDLoss, taid_loss

__all__ = ["TAIDLoss", "taid_loss"]

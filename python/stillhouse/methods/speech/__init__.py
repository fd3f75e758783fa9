"""Methods for speech."""

from stillhouse.methods.speech.metrics import phone_purity, pnmi, stoi, wer, wil

__all__ = ["phone_purity", "pnmi", "stoi", "wer", "wil"]

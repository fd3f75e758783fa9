"""What a prefix says of the whole text: a classifier on a language model's own hidden states."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class PrefixClassifier(nn.Module):
    """Logits [B, k, classes] of what becomes of a text, from the model's state [B, D] at its last
    token and the token [B, k] that is to follow; a candidate needs no pass of the model."""

    def __init__(self, features: int, vocabulary: int, classes: int, width: int, seed: int):
        super().__init__()
        self.classes = classes
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.state = nn.Linear(features, width)
            self.token = nn.Embedding(vocabulary, width)
            self.middle = nn.Linear(width, width)
            self.head = nn.Linear(width, classes)

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        x = (self.state(hidden)[:, None] + self.token(tokens)).relu()
        return self.head(self.middle(x).relu())

    def attribute(self, ids: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
        """q [B, k]: the probability of class 1, of two, for `conditional_beam_search`."""
        return self.probability(hidden, tokens, 1)

    @torch.no_grad()
    def probability(self, hidden: Tensor, tokens: Tensor, label: int) -> Tensor:
        """Of one class [B, k], above 0: what is learned rules nothing out. Where the tokens are."""
        q = self(hidden, tokens.to(hidden.device)).softmax(-1)[..., label]
        return q.clamp(min=torch.finfo(q.dtype).tiny).to(tokens.device)


class LengthAttribute:
    """q(the text has n tokens | prefix, next token), for `conditional_beam_search`.

    classifier: of how many tokens follow the next one, the last class standing for so many or more.
    Raises ValueError for n < 1 or more tokens than the classifier can tell apart.

    Defaults: none.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import LengthAttribute, train_prefix_classifier
        >>> hidden, tokens = torch.randn(64, 3), torch.arange(64) % 4
        >>> classifier = train_prefix_classifier(
        ...     hidden, tokens, 3 - tokens, vocabulary=5, classes=4, steps=100
        ... )
        >>> attribute = LengthAttribute(classifier, 3, eos=4)
        >>> q = attribute(torch.empty(1, 0), torch.tensor([[0, 1, 4]]), hidden[:1])
        >>> [round(each) for each in q[0].tolist()]  # 2 tokens follow a 1, and this is no end
        [0, 1, 0]
    """

    def __init__(self, classifier: PrefixClassifier, n: int, *, eos: int):
        if not 1 <= n < classifier.classes:
            raise ValueError(
                f"the classifier was trained for lengths 1 to {classifier.classes - 1}, got {n}"
            )
        self.classifier, self.n, self.eos = classifier, n, eos

    def __call__(self, ids: Tensor, tokens: Tensor, hidden: Tensor) -> Tensor:
        left = self.n - ids.shape[1] - 1
        if left < 0:
            q = torch.zeros(tokens.shape)
        else:
            q = self.classifier.probability(hidden, tokens, left)
        return q.masked_fill(tokens == self.eos, float(left == -1))


def train_prefix_classifier(
    hidden: Tensor,
    tokens: Tensor,
    labels: Tensor,
    *,
    vocabulary: int,
    classes: int = 2,
    width: int = 64,
    steps: int = 400,
    batch: int = 256,
    lr: float = 3e-3,
    seed: int = 0,
) -> PrefixClassifier:
    """Fits q(label | hidden state of a prefix, next token) on prefixes of sampled texts.

    hidden: [N, D], the model's state where it predicts the next token; tokens: int64 [N], the one
    that was drawn; labels: int64 [N] in [0, classes): 1 where the whole text has the attribute, or
    for `LengthAttribute` the tokens that followed, at most classes - 1. Adam on the cross-entropy,
    its rate falling linearly; the result is in evaluation mode, its weights frozen.
    Raises ValueError for tensors of unlike lengths, no prefix at all, and labels out of range.

    Defaults: ours: the paper says that the classifier reads the model's own states, not its size.

    Example:
        >>> import torch
        >>> from stillhouse.methods.language import train_prefix_classifier
        >>> hidden, tokens = torch.randn(512, 3), torch.arange(512) % 7
        >>> classifier = train_prefix_classifier(
        ...     hidden, tokens, (tokens > 3).long(), vocabulary=7, steps=100
        ... )
        >>> q = classifier.attribute(torch.empty(1, 0), torch.tensor([[2, 5]]), hidden[:1])
        >>> bool(q[0, 0] < 0.1), bool(q[0, 1] > 0.9)
        (True, True)
    """
    if not len(hidden) == len(tokens) == len(labels) > 0:
        raise ValueError(
            f"{len(hidden)} states, {len(tokens)} tokens and {len(labels)} labels: one each, "
            "at least one"
        )
    if not bool(((labels >= 0) & (labels < classes)).all()):
        raise ValueError(f"labels must be in [0, {classes})")
    model = PrefixClassifier(hidden.shape[-1], vocabulary, classes, width, seed).to(hidden.device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        some = torch.randint(len(hidden), (batch,), generator=generator).to(hidden.device)
        logits = model(hidden[some], tokens[some, None])[:, 0]
        optimizer.zero_grad()
        cross_entropy(logits, labels[some]).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)

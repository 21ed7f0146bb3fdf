"""Multiple-instance learning with gated attention: one answer for a bag of any number of feature vectors."""

import torch
from torch import Tensor, nn

HIDDEN = (128, 64)  # units of the layers between the bag's vector and its answer


class AttentionMil(nn.Module):
    """Logits float32[B, outputs] of bags float32[B, 1, tiles, width] (Ilse et al. 2018, equations 8 and 9).

    A tile is embedded by one linear layer; the bag's vector is the mean of its tiles' by attention. A row of zeros is
    no tile: it fills a bag up to the longest of its batch, and gets no attention.
    """

    def __init__(self, width: int, embedding: int, attention: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, embedding)
        self.value = nn.Linear(embedding, attention)
        self.gate = nn.Linear(embedding, attention)
        self.score = nn.Linear(attention, 1)
        self.classifier = nn.Sequential(
            nn.Linear(embedding, HIDDEN[0]), nn.ReLU(),
            nn.Linear(HIDDEN[0], HIDDEN[1]), nn.ReLU(),
            nn.Linear(HIDDEN[1], outputs),
        )  # fmt: skip

    def forward(self, bags: Tensor) -> Tensor:
        tiles = bags[:, 0]
        embedded = self.embed(tiles)
        scores = self.score(torch.tanh(self.value(embedded)) * torch.sigmoid(self.gate(embedded)))[..., 0]
        none = (tiles == 0).all(dim=-1)
        shares = torch.softmax(scores.masked_fill(none, torch.finfo(scores.dtype).min), dim=1)
        answer: Tensor = self.classifier((shares[..., None] * embedded).sum(dim=1))
        return answer

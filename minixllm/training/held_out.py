"""Means over held-out records: over all of them, and over those of each language."""

import torch

from minixllm.data.stream import in_order
from minixllm.training.losses import answer_logps


@torch.no_grad()
def held_out_means(world, data, records, tokens: int, measure, stopped=()) -> dict[str, float] | None:
    """{"loss": mean over all records, "loss/deu": over one language, ...}; {} if no record is held out. A collective.

    measure(batch) -> {"loss": of each record (R,), ...}. Sums over records are divided by `data.count`: the number of
    supervised tokens, or of pairs. tokens: how many are computed at a time.
    stopped: is asked before each batch. None is returned if it is true in any process, as it is after a signal.
    """
    if not len(records):
        return {}
    totals = torch.zeros(())
    for batch in in_order(data, records, tokens, world.rank, world.size):
        if world.any(stopped):
            return None
        quantities = measure(batch)
        rows = torch.stack([*quantities.values()], dim=1).double().cpu()  # (R, quantities)
        languages = torch.as_tensor(data.languages[batch.records], dtype=torch.long)
        totals = totals + rows.new_zeros(len(data.language_names), rows.shape[1]).index_add_(0, languages, rows)
    totals = world.sum(totals.to(world.device)).cpu()
    means = dict(zip(quantities, (totals.sum(0) / data.count(records)).tolist()))
    for row, name in sorted(enumerate(data.language_names), key=lambda language: language[1]):
        if len(own := records[data.languages[records] == row]):
            means |= {f"{quantity}/{name}": total / data.count(own)
                      for quantity, total in zip(quantities, totals[row].tolist())}
    return means


def held_out_loss(model, world, data, records, tokens: int, stopped=()) -> dict[str, float] | None:
    """The mean loss per supervised token, as `held_out_means` gives it."""
    return held_out_means(world, data, records, tokens, lambda batch: {"loss": -answer_logps(model, batch)}, stopped)

"""What a step of preference optimisation computes: log-probabilities of pairs under the policy and the reference.

The two answers of a pair are two branches of one document (`attention.Packed`): their prompt is computed once. The
reference is the model that training started from, in one of three forms, each a function from a batch to (P, 2)
log-probabilities: `adapters_off` (LoRA: the same weights with the adapters switched off), `frozen` (a second model), or
`cached` (computed once, kept on disk).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minixllm.data.stream import in_order
from minixllm.data.token_cache import file_digest
from minixllm.files import atomic_write
from minixllm.models import lora
from minixllm.models.attention import to_device
from minixllm.training.losses import answer_logps, dpo_loss, ipo_loss


def pair_logps(model, batch) -> torch.Tensor:
    """(P, 2) fp32: log-probabilities of the chosen and the rejected answer of each pair, EOS included, summed."""
    return answer_logps(model, batch).view(-1, 2)


def compare(model, batch, reference, kind: str, beta: float, label_smoothing: float,
            nll_weight: float) -> dict[str, torch.Tensor]:
    """What is known of each pair, {name: (P,)}: its loss and, without gradient, rewards and log-probabilities.

    nll_weight: so many times the chosen answer's negative log-likelihood is added to its loss, which keeps that answer
    likely where DPO alone is content to make the rejected one unlikelier (Pang et al. 2024, arXiv 2404.19733, eq. 2,
    which divides it by the answer's length).

    Rewards are the implicit ones, beta (log pi - log ref) (Rafailov et al. 2023, section 4); accuracy is 1 where the
    chosen answer's is the larger.
    """
    reference_logps = reference(model, batch)
    logps = pair_logps(model, batch)
    if kind == "ipo":
        lengths = [answers for _, answers in batch.documents[:len(batch.records)]]
        losses = ipo_loss(logps, reference_logps, logps.new_tensor(lengths).view(-1, 2), beta)
    else:
        losses = dpo_loss(logps, reference_logps, beta, label_smoothing)
    if nll_weight:
        losses = losses - nll_weight * logps[:, 0]
    chosen, rejected = (beta * (logps - reference_logps)).detach().unbind(1)
    return {"loss": losses, "accuracy": (chosen > rejected).float(), "margin": chosen - rejected,
            "chosen_reward": chosen, "rejected_reward": rejected,
            "chosen_logps": logps[:, 0].detach(), "rejected_logps": logps[:, 1].detach()}


def preference_loss(model, batch, reference, **options):
    """(summed loss, sums of what is logged) of a batch of pairs, as `training.train` takes them."""
    sums = {name: values.sum() for name, values in compare(model, batch, reference, **options).items()}
    return sums.pop("loss"), sums


# The reference

def adapters_off(model, batch):
    """Under LoRA the reference is the policy without its adapters: no second copy in memory."""
    with torch.no_grad(), lora.disabled(model):
        return pair_logps(model, batch)


def frozen(reference_model):
    """The reference as a second model."""
    @torch.no_grad()
    def reference(model, batch):
        return pair_logps(reference_model, batch)
    return reference


def cached(model, world, data, directory, folder, dtype: str, tokens: int):
    """The reference as a table (pairs, 2) of what `model`, as it now is, gives; made once and kept below `folder`.

    A collective. The file is named by what it depends on: the pairs as tokenised, the weights in `directory`, which the
    model was loaded from, and the types these are held and computed in. Only the first process reads and writes it: the
    others may be on machines that do not see it. `tokens`: about how many are computed at once.
    """
    path = table = None
    if world.first:
        files = [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]
        inputs = [data.key, *map(file_digest, files), str(model.embedding.weight.dtype), dtype]
        path = Path(folder) / f"reference-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]}.npy"
        table = _stored(path, len(data))
    table = world.gather(table)[0]
    if table is None:
        table = torch.zeros(len(data), 2, device=world.device)
        with tqdm(total=len(data), unit="pair", desc="reference", disable=not world.first, dynamic_ncols=True) as bar:
            for batch in in_order(data, np.arange(len(data)), tokens, world.rank, world.size):
                with torch.no_grad():
                    table[batch.records] = pair_logps(model, batch)
                bar.update(len(batch.records) * world.size)
        table = world.sum(table).cpu()
        if world.first:
            with atomic_write(path, "wb") as file:
                np.save(file, table.numpy())

    def reference(model, batch):
        return to_device(table[batch.records], world.device)
    return reference


def _stored(path: Path, pairs: int) -> torch.Tensor | None:
    """The table (pairs, 2) in a file; None where there is none or it is damaged, to be made anew."""
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    return table if table.shape == (pairs, 2) else None

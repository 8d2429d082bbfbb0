"""The losses of both stages, the log-probabilities they are made of, and the reference model of the second.

A loss function takes the model and a micro-batch and returns (the summed loss, {name: a summed quantity to log}).
The two answers of a preference pair are two branches of one document (`attention.Packed`), so that their prompt is
computed once.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minixllm.data.stream import in_order
from minixllm.files import atomic_write, digest, save_array
from minixllm.models import lora
from minixllm.models.attention import Packed, to_device


def label_logps(model, batch) -> torch.Tensor:
    """(N,) fp32: the log-probability of each label of a `stream.Batch`; 0 where a token has no label."""
    device = model.embedding.weight.device
    return model(to_device(batch.input_ids, device), Packed(batch.documents, device), to_device(batch.labels, device))


def answer_logps(model, batch) -> torch.Tensor:
    """(answers,) fp32: the log-probability of each answer, its EOS included. A record has one answer, a pair two."""
    lengths = []
    for document in batch.documents:
        if isinstance(document, int):
            lengths.append(document)
        else:  # the prompt has no labels: its zeros can be summed with the first answer
            prompt, (first, *others) = document
            lengths += [prompt + first, *others]
    # A GPU adds by index in no fixed order, and a resumed run would differ. So each answer is summed by itself.
    sums = torch.stack([answer.sum() for answer in label_logps(model, batch).split(lengths)])
    return sums if batch.records else sums[:0]  # an empty batch has no answers


def pair_logps(model, batch) -> torch.Tensor:
    """(P, 2) fp32: the log-probabilities of the chosen and the rejected answer of each pair, EOS included."""
    return answer_logps(model, batch).view(-1, 2)


# ---------------------------------------------------------------------------------------------------------- losses


def sft_loss(model, batch):
    """Cross-entropy of the answers' tokens, summed: -sum_t log p(y_t | x, y_<t). -> (loss, {}: nothing else to log)."""
    return -label_logps(model, batch).sum(), {}


def dpo_loss(policy_logps, reference_logps, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): one loss a pair, (P,).

    policy_logps, reference_logps (P, 2): log-probabilities of the chosen and the rejected answer, summed over tokens.
    With D = (log pi_c - log ref_c) - (log pi_r - log ref_r),

        loss = -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)

    Bradley-Terry (their eq. 1): the chosen answer is preferred with probability sigmoid(r_c - r_r), r being rewards.
    KL: the policy that earns most reward minus beta KL(pi || ref) has r = beta (log pi - log ref) + a constant (eq. 5).
    e = `label_smoothing` is the chance that a pair is labelled the wrong way round: above 0 this is conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).
    """
    margins = beta * _log_ratio_difference(policy_logps, reference_logps)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def ipo_loss(policy_logps, reference_logps, lengths, beta: float) -> torch.Tensor:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17): one loss a pair, (P,).

    loss = (D - 1 / (2 beta))^2. D is that of `dpo_loss`, but of log-probabilities averaged over each answer's tokens,
    `lengths` (P, 2): the authors confirmed that the paper's results were made so.
    """
    return (_log_ratio_difference(policy_logps / lengths, reference_logps / lengths) - 1 / (2 * beta)) ** 2


def _log_ratio_difference(policy_logps, reference_logps):
    chosen, rejected = (policy_logps - reference_logps).unbind(1)
    return chosen - rejected


def pair_measures(model, batch, reference, kind: str, beta: float, label_smoothing: float,
                  nll_weight: float) -> dict[str, torch.Tensor]:
    """What is measured of each pair, {name: (P,)}: its loss and, without gradient, its rewards and log-probabilities.

    nll_weight: this many times the chosen answer's negative log-likelihood is added to its loss. It keeps that answer
    likely; DPO alone is content to make the rejected one less likely (Pang et al. 2024, arXiv 2404.19733, eq. 2, which
    divides it by the answer's length).
    A reward is beta (log pi - log ref) (Rafailov et al. 2023, section 4); accuracy is 1 where the chosen answer's
    reward is the larger.
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
    """`pair_measures` summed over the pairs of a batch: (loss, the other measures, to log)."""
    sums = {name: values.sum() for name, values in pair_measures(model, batch, reference, **options).items()}
    return sums.pop("loss"), sums


# ------------------------------------------------------------------------------------------------- the reference
# It is the model that training starts from. Each of the three forms is a function from (policy, batch) to what
# `pair_logps` gives of the reference, (P, 2).


@torch.no_grad()
def policy_without_adapters(model, batch):
    """Under LoRA, the policy with its adapters switched off: no second copy in memory."""
    with lora.disabled(model):
        return pair_logps(model, batch)


def second_model(reference_model):
    """A frozen model beside the policy."""
    @torch.no_grad()
    def reference(model, batch):
        return pair_logps(reference_model, batch)
    return reference


def stored_logps(model, world, data, directory, folder, dtype: str, tokens: int):
    """A table of what `model`, as it now is, gives for all pairs, computed once and kept below `folder`. A collective.

    The file's name is a hash of what it depends on: the tokenised pairs, the weights in `directory`, which the model
    was loaded from, and the types these are held and computed in. Only the first process reads and writes the file:
    the others may be on machines that do not see it. tokens: about how many are computed at once.
    """
    path = table = None
    if world.first:
        files = [Path(directory) / "config.json", *sorted(Path(directory).glob("*.safetensors"))]
        inputs = [data.key, *map(digest, files), str(model.embedding.weight.dtype), dtype]
        path = Path(folder) / f"reference-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]}.npy"
        table = _read_table(path, len(data))
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
                save_array(file, table.numpy())

    def reference(model, batch):
        return to_device(table[batch.records], world.device)
    return reference


def _read_table(path: Path, pairs: int) -> torch.Tensor | None:
    """The table (pairs, 2) in a file; None if there is none or it is damaged, and has to be made anew."""
    try:
        table = torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError):
        return None
    return table if table.shape == (pairs, 2) else None

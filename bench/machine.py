"""What the benches share: the device they run on, its limits, and sizes of models.

`tiny` only shows that a bench runs; `small` is what two CPU cores can train; `1b` has the shapes of LLaMA 3.2 1B and of bloom-1b1, `7b` of LLaMA 7B and
bloom-7b1, with random weights.
"""

import resource
import time

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARMUP = 1 if DEVICE == "cpu" else 8  # steps that are not timed: the first makes the optimiser's state, a GPU's compile
LLAMA = {
    "tiny": dict(vocab_size=32000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2),
    "small": dict(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                  num_attention_heads=8),
    "1b": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
    "7b": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32)}
BLOOM = {
    "tiny": dict(vocab_size=32000, hidden_size=32, n_layer=2, n_head=2),
    "small": dict(vocab_size=32000, hidden_size=512, n_layer=8, n_head=8),
    "1b": dict(vocab_size=250880, hidden_size=1536, n_layer=24, n_head=16),
    "7b": dict(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)}
SIZES = {"llama": LLAMA, "bloom": BLOOM}


def ours(architecture: str, size: dict, dtype=torch.float32):
    """A model with random weights, made on the device."""
    from minixllm.weights.hf_directory import ARCHITECTURES, initial
    model_class = ARCHITECTURES[architecture]
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict({**size, "eos_token_id": None})).to(dtype)
    model = model.to_empty(device=DEVICE)
    model.tie_weights()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        initial(name, parameter.data, 0.02, generator)
    return model


def theirs(architecture: str, size: dict, dtype=torch.float32):
    """The same in `transformers`."""
    import transformers
    name = {"llama": "Llama", "bloom": "Bloom"}[architecture]
    config = getattr(transformers, f"{name}Config")(**size, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    with torch.device(DEVICE):
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    return model.to(dtype)


def now() -> float:
    """Seconds, when all that was asked of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function, *args, **kwargs):
    """(how long it took, what it returned)."""
    start = now()
    result = function(*args, **kwargs)
    return now() - start, result


def reset_peak_memory() -> None:
    """Forget what a GPU's memory held until now; what a CPU's did is remembered."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float:
    """GB: of a GPU's memory what tensors took since the last reset, of a CPU's what this process ever did."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops(dtype: torch.dtype) -> float:
    """The fastest product of two square matrices, FLOP/s."""
    n = 8192 if DEVICE == "cuda" else 2048
    a = torch.randn(n, n, dtype=dtype, device=DEVICE)
    return 2 * n**3 / min(seconds(torch.mm, a, a)[0] for _ in range(10))


def bandwidth() -> float:
    """Bytes a second that the sum of a large array reads."""
    array = torch.randn(2**30 if DEVICE == "cuda" else 2**27, device=DEVICE)
    return array.numel() * 4 / min(seconds(array.sum)[0] for _ in range(4))


def description() -> str:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"

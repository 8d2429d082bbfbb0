"""The architectures there are. What differs between them beyond their layers stands in their classes as attributes."""

from minixllm.models.bloom import Bloom
from minixllm.models.llama import Llama

ARCHITECTURES = {model.config_class.model_type: model for model in (Llama, Bloom)}  # by config.json's model_type

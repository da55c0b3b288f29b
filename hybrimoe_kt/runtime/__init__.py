"""What any engine talks to: experts in, one call a layer, everything between host and accelerators behind it.

experts = ModelExperts(options)
experts.add(layer_experts)                                      # once per MoE layer
runtime = assemble(experts)
job = runtime.begin(layer, Routed(hidden, ids, weights, logits))
shared = shared_experts(hidden)                                 # beside the CPU's share
out = runtime.finish(job) + shared
"""

from hybrimoe_kt.device.backend import Routed
from hybrimoe_kt.device.experts import ExpertMatrix, LayerExperts
from hybrimoe_kt.device.readback import Guesses, Predict

from .experts import ModelExperts
from .health import AcceleratorHealth, Health
from .recording import RoutingRecorder
from .runtime import Job, Runtime, assemble

__all__ = [
    "AcceleratorHealth", "ExpertMatrix", "Guesses", "Health", "Job", "LayerExperts", "ModelExperts", "Predict",
    "Routed", "RoutingRecorder", "Runtime", "assemble",
]  # fmt: skip

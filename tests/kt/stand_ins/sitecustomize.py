"""Lets the legacy framework, which was written for machines with a GPU, run on one without.

Put on PYTHONPATH, so that `python -m ktransformers.local_chat` itself stays unmodified. Only what touches a GPU is
changed: queries about one answer as if there were none in use, moves to one stay where they are, and the one Triton
kernel that decoding calls is computed in torch. Besides, the likeliest token is taken instead of a drawn one.
"""

import sys

import paged_attention
import torch

sys.modules["ktransformers.operators.triton_attention"] = paged_attention

_zeros = torch.zeros


def _pageable_zeros(*size, pin_memory=False, **options):
    return _zeros(*size, **options)


torch.zeros = _pageable_zeros
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.is_current_stream_capturing = lambda: False
torch.cuda.set_device = lambda device: None
torch.cuda.synchronize = lambda device=None: None  # not one function for both: torch's compiler looks for duplicates
torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _likeliest(probabilities, num_samples):
    """Instead of a draw, so that two runs can be compared: they use up random numbers differently while loading."""
    return probabilities.topk(num_samples, dim=-1).indices


torch.multinomial = _likeliest

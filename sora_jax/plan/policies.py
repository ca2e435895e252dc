"""What each policy of rematerialisation keeps and computes again, in closed form."""

# Of a policy: what a layer keeps on the device, and on the host, in bytes a token and width;
# forward passes of linear layers and of attention done again. "attention_out" keeps the block's
# input in float32, and the output of both attentions.
POLICIES = {
    "none": (90.0, 0.0, 0.0, 0.0),
    "dots_no_batch": (56.0, 0.0, 0.1, 1.0),
    "attention_out": (8.0, 0.0, 0.8, 0.0),
    "full": (4.0, 0.0, 1.0, 1.0),
    "offload": (0.0, 4.0, 1.0, 1.0),
    "attention_out_offload": (0.0, 8.0, 0.8, 0.0),
}
# Of one layer while it is computed again, with all else that does not grow with depth: bytes a
# token and width. Compiled programs (docs/plans.md) have 95 to 150.
WORKING_SET = 120.0
# Of those that no search tries: what a layer keeps on the device.
_OTHERS = {"dots": 56.0, "dots_no_batch_attention_out": 60.0, "attention_out_offload_input": 4.0}


def kept(remat: str) -> float:
    """Bytes a token and width that a layer keeps on the device."""
    return POLICIES[remat][0] if remat in POLICIES else _OTHERS[remat]


def freed(remat: str, better: str, *, depth: int) -> float:
    """Share of all activations that the policy `better` does not keep on the device."""
    of_layers = depth * kept(remat)
    return (of_layers - depth * kept(better)) / (of_layers + WORKING_SET)

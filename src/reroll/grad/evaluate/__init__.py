"""How perturbed losses are computed, without the model knowing.

    in_place    weights are overwritten and come back bit for bit     memory: a copy, or none     any module
    tiles       products are handed perturbed pieces of weights       memory: 8 MB or 1 %         torch operations
    batched     a probe axis under torch.func.vmap                    memory: 2·chunk copies      small models

`plan.py` chooses by static rules; `substitute.py` is the mechanism that tiles and batched share.
"""

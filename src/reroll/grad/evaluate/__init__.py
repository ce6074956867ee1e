"""How perturbed losses are computed, without a change of the model.

    in_place    weights are overwritten and come back bit for bit     memory: a copy, or none     any module
    tiles       operations get perturbed tiles of weights             memory: 8 MB or 1 %         torch operations
    batched     a probe axis under torch.func.vmap                    memory: 2·chunk copies      small models

`plan.py` chooses by static rules; `intercept.py` is the mechanism that tiles and batched share.
"""

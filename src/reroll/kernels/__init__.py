"""Operations with more than one implementation: a readable reference in torch, and fast ones beside it.

| op            | what it computes                                     | implementations                    |
|---------------|------------------------------------------------------|------------------------------------|
| `noise_axpy`  | out ← p + Σ_k alpha_k z_k, z never stored            | reference (torch), cpu, triton     |
| `linear_scan` | s_t = A_t s_{t−1} + b_t for all t, and Kalman filters | reference (torch), cpu, triton    |
| `lstm_scan`   | a whole LSTM sequence, block-diagonal recurrence     | reference (torch), library, cpu    |
| `program`     | straight-line code over rows, and its derivative     | cpu                                |
| `cross_entropy` | the loss of a linear head, its logits chunk by chunk | reference (torch), chunks (torch) |
| `recurrence`  | a program along time: step by step, or by Newton     | cpu                                |

`dispatch` picks one by static rules and says why. `philox` is the generator, `simd` the vector type of the CPU kernels.
This layer imports no other.
"""

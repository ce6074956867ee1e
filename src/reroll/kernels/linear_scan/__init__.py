import torch


def linear_scan(A, b, initial=None, reverse=False, *, structure=None):
    T = b.shape[1]
    s = torch.zeros_like(b[:, 0]) if initial is None else initial
    out = [None] * T
    for t in range(T - 1, -1, -1) if reverse else range(T):
        a = A[:, t]
        if structure in ("diagonal", "identity"):
            s = a * s + b[:, t]
        elif structure == "dense":
            s = (a @ s.unsqueeze(-1)).squeeze(-1) + b[:, t]
        else:
            s = torch.einsum("bklc,blc->bkc", a, s) + b[:, t]
        out[t] = s
    return torch.stack(out, 1)


def kalman_scan(a, r, variance, structure):
    T = r.shape[1]
    B, _, D = r.shape
    var = variance if isinstance(variance, float) else variance.view(-1, 1)
    if structure == "diagonal":
        m = torch.zeros_like(r[:, 0])
        P = torch.zeros_like(m)
        ms = []
        Ps = []
        for t in range(T):
            pred = a[:, t] * m + r[:, t]
            Pp = a[:, t] ** 2 * P + 1
            K = Pp / (Pp + var)
            m = pred * (1 - K)
            P = (1 - K) * Pp
            ms.append(m)
            Ps.append(P)
        return torch.stack(ms, 1), torch.stack(Ps, 1)
    var = variance if isinstance(variance, float) else variance.view(-1, 1, 1)
    m = torch.zeros_like(r[:, 0])
    P = r.new_zeros(B, D, D)
    I = torch.eye(D, dtype=r.dtype)
    ms = []
    Ps = []
    for t in range(T):
        A = a[:, t]
        pred = (A @ m.unsqueeze(-1)).squeeze(-1) + r[:, t]
        Pp = A @ P @ A.mT + I
        K = torch.linalg.solve_ex(Pp + var * I, Pp)[0].mT
        m = pred - (K @ pred.unsqueeze(-1)).squeeze(-1)
        P = Pp - K @ Pp
        ms.append(m)
        Ps.append(P)
    return torch.stack(ms, 1), torch.stack(Ps, 1)

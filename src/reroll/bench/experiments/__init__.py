"""The experiments on parallel-in-time evaluation that were published, run here: one module each, three functions each.

measure(full)           runs it, in minutes on two cores, or at the published size; returns plain numbers
report(found)           them as a table, with what was published beside
draw(found, figure)     them as a matplotlib figure

`lorenz`        a chaotic flow: which damping converges, and at which variance
`agreement`     how far parallel trajectories are from the sequential one
`predictable`   iterations against the Lyapunov exponent
`generator`     a trained generator that feeds itself, on which undamped methods explode
`scaling`       time and memory against length and width
`worms`         a deep GRU trained on long series by one rollout and another
"""

"""The experiments behind `reroll reproduce`, one module each. Those on parallel evaluation are of published figures.

measure(full)            runs it, in minutes on two cores, or at the published size; returns plain numbers
holds(result)            whether it bears the claim out
report(result)           it as a table, with what was published beside
draw(result, figure)     it on a matplotlib figure, where there is one

`memory`        what a step needs above the model, by backpropagation and by probes
`memorise`      nine symbols learned by probes
`lorenz`        a chaotic flow: which damping converges, and at which variance
`agreement`     how far parallel trajectories are from the sequential one
`predictable`   iterations against the Lyapunov exponent
`generator`     a trained generator that feeds itself, on which undamped methods explode
`sweep`         which variance damps best, on the last and on the flow
`scaling`       time and memory against length and width
`worms`         a deep GRU trained on long series by one rollout and another
"""

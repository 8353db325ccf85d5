# TEMPORARY stand-in by the lead so that the loop can run; the owner of algorithms/ replaces this file.
import torch
def group_advantages(rewards, mode="group_std"):
    r=torch.tensor(rewards,dtype=torch.float64)
    if (r==r[0]).all(): return torch.zeros_like(r)
    return (r-r.mean())/(r.std()+1e-6)
def has_signal(rewards): return any(x!=rewards[0] for x in rewards)
def lambda_at(step, config): return config.rlsd_lambda if config.name=="rlsd" else 0.0
def token_loss_weights(lengths, aggregation): return [1/max(1,sum(lengths))]*len(lengths)

"""From a masked variant DAG to one differentiable `torch.fx.GraphModule`, and its saved form."""

"""State space models."""

from oracles.common import called, classes, released, renamed


def state_space(*kind, **config):
    oracle = released(*kind, hidden_size=24, n_groups=1, chunk_size=64, **config)
    names = "in_proj.weight=project.weight conv1d.weight=conv conv1d.bias=conv_bias A_log=A_log dt_bias=dt_bias D=D "
    names += "norm.weight=norm out_proj.weight=o.weight"
    return lambda w, x: called(oracle, renamed(w, names), (x,))


def mamba2():
    sizes = {"num_heads": 3, "head_dim": 16, "state_size": 8, "num_hidden_layers": 1}
    return state_space("mamba2", "Mamba2Config", "Mamba2Mixer", **sizes)


def nemotron():
    sizes = {"mamba_num_heads": 3, "mamba_head_dim": 16, "ssm_state_size": 8, "time_step_min": 0.0}
    sizes["layers_block_type"] = ["linear_attention"]
    return state_space("nemotron_h", "NemotronHConfig", "NemotronHMamba2Mixer", **sizes)


ORACLES = {
    "Mamba2Mixer": classes("mamba2", mamba2, 16),
    "NemotronHMamba2Mixer": classes("mamba2", nemotron, 16),
}

"""State space models."""

import torch

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


MAMBA = "in_proj.weight=project.weight conv1d.weight=conv conv1d.bias=conv_bias x_proj.weight=select.weight D=D "
MAMBA += "dt_proj.weight=dt_up dt_proj.bias=dt_bias out_proj.weight=o.weight "


def mamba(*kind, names="", **config):
    with torch.device("meta"):  # all weights are ours, and Falcon Mamba cannot start its own
        oracle = released(*kind, hidden_size=24, num_hidden_layers=1, **config)
    return lambda w, x: called(oracle, renamed(w, MAMBA + names) | {"A_log": w["A_log"].mT}, (x,))


def jamba():
    norms = "dt_layernorm.weight=norms.0 b_layernorm.weight=norms.1 c_layernorm.weight=norms.2"
    sizes = {"mamba_d_state": 8, "rms_norm_eps": 1e-5}
    return mamba("jamba", "JambaConfig", "JambaMambaMixer", names=norms, **sizes)


def falcon_mamba():
    return mamba("falcon_mamba", "FalconMambaConfig", "FalconMambaMixer", state_size=8, mixer_rms_eps=1e-5)


ORACLES = {
    "Mamba2Mixer": classes("mamba2", mamba2, 16),
    "NemotronHMamba2Mixer": classes("mamba2", nemotron, 16),
    "MambaMixer": classes("mamba", lambda: mamba("mamba", "MambaConfig", "MambaMixer", state_size=8), 16),
    "JambaMambaMixer": classes("mamba", jamba, 16, state_norm="learned"),
    "FalconMambaMixer": classes("mamba", falcon_mamba, 16, state_norm="weightless"),
}

"""Checkpoints of the distributed optimizer around torch's Adam.

It counts the steps of each parameter, in a tensor of its state, which it makes in its first step.
The Adam of Transformer Engine and that of Apex count those of a group, as a number. megatron-core
asks which of them there is, but not everywhere.
"""

from contextlib import ExitStack
from typing import Any

import torch


def checkpoints_of_torch_adam(undo: ExitStack) -> None:
    """Let the distributed optimizer load what it has saved, until `undo` is closed."""
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    owner = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = owner.state_dict, owner.load_state_dict
    set_states = owner._set_main_param_and_optimizer_states

    # The lines are those of distrib_optimizer.py of 0.19.2.
    def state_dict_of_any_step(self: Any) -> Any:
        # 838 takes the number of steps from the states; before loading there are none.
        if not self.optimizer.state:
            self.init_state_fn(self.optimizer, self.config)
            for state in self.optimizer.state.values():
                state["step"] = torch.tensor(0.0)
        return state_dict(self)

    def load_state_dict_with_steps(self: Any, loaded: Any) -> None:
        # 1032 sets one tensor for all parameters, and the step of each of them would count it up.
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @torch.no_grad()  # 1225 writes into parameters in fp32, which 2093 lets autograd see
    def set_states_but_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        # 1223 wants every tensor of the state, and passes over what is given as something else.
        set_states(self, parameter, tensors | {"step": None})

    for name, replacement in (
        ("state_dict", state_dict_of_any_step),
        ("load_state_dict", load_state_dict_with_steps),
        ("_set_main_param_and_optimizer_states", set_states_but_step),
    ):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)

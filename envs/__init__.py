"""The worlds. Importing this package registers `OversightGrid-v0` with gymnasium."""

import gymnasium

gymnasium.register(
    id="OversightGrid-v0",
    entry_point="envs.gym:OversightGridEnv",
    vector_entry_point="envs.gym:OversightGridVectorEnv",
)

"""The worlds. Importing this package registers their ids with gymnasium.

They are `OversightGrid-v0`, and `MiniGrid-DiamondGhost-NAME-v0` with NAME one of `5x5`, `8x8`,
`16x16` and `FourRooms`.
"""

import gymnasium

gymnasium.register(
    id="OversightGrid-v0",
    entry_point="envs.gym:OversightGridEnv",
    vector_entry_point="envs.gym:OversightGridVectorEnv",
)
for _size in (5, 8, 16):
    gymnasium.register(
        id=f"MiniGrid-DiamondGhost-{_size}x{_size}-v0",
        entry_point="envs.minigrid:DiamondGhostEnv",
        kwargs={"size": _size},
    )
gymnasium.register(
    id="MiniGrid-DiamondGhost-FourRooms-v0",
    entry_point="envs.minigrid:DiamondGhostEnv",
    kwargs={"size": 19, "layout": "four_rooms"},
)

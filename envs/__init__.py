"""The worlds. Importing this package registers their ids with gymnasium.

They are `OversightGrid-v0`, and `MiniGrid-DiamondGhost-NAME-v0` with NAME one of `5x5`, `8x8`,
`16x16` and `FourRooms`.
"""

import gymnasium

_MINIGRID = {f"{size}x{size}": {"size": size} for size in (5, 8, 16)} | {
    "FourRooms": {"size": 19, "layout": "four_rooms"}
}


def register() -> None:
    """Register the ids, once; the entry point of the group `gymnasium.envs`."""
    if "OversightGrid-v0" in gymnasium.registry:
        return
    gymnasium.register(
        id="OversightGrid-v0",
        entry_point="oversight_rl.envs.gym:OversightGridEnv",
        vector_entry_point="oversight_rl.envs.gym:OversightGridVectorEnv",
    )
    for name, kwargs in _MINIGRID.items():
        gymnasium.register(
            id=f"MiniGrid-DiamondGhost-{name}-v0",
            entry_point="oversight_rl.envs.minigrid:DiamondGhostEnv",
            kwargs=kwargs,
        )


register()
if __name__ == "envs":  # imported by the folder's own name, in a checkout
    from oversight_rl.aliases import same_as_ours

    same_as_ours(__name__)

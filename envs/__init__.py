"""The worlds. Importing this package registers their ids with gymnasium.

They are `OversightGrid-v0`, and `MiniGrid-DiamondGhost-NAME-v0` with NAME one of `5x5`, `8x8`,
`16x16` and `FourRooms`.
"""

import gymnasium

_MINIGRID = "oversight_rl.envs.minigrid:DiamondGhostEnv"


def register() -> None:
    """Register the ids, once; the entry point of the group `gymnasium.envs`."""
    if "OversightGrid-v0" in gymnasium.registry:
        return
    gymnasium.register(
        id="OversightGrid-v0",
        entry_point="oversight_rl.envs.gym:OversightGridEnv",
        vector_entry_point="oversight_rl.envs.gym:OversightGridVectorEnv",
    )
    for size in (5, 8, 16):
        gymnasium.register(
            id=f"MiniGrid-DiamondGhost-{size}x{size}-v0",
            entry_point=_MINIGRID,
            kwargs={"size": size},
        )
    gymnasium.register(
        id="MiniGrid-DiamondGhost-FourRooms-v0",
        entry_point=_MINIGRID,
        kwargs={"size": 19, "layout": "four_rooms"},
    )


register()
if __name__ == "envs":  # imported by the folder's own name, in a checkout
    from oversight_rl.aliases import same_as_ours

    same_as_ours(__name__)

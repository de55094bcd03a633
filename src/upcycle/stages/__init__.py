"""The paper's four stages (UpIT, section 3), in its order:

1. `expert_preparation`: instruction-tune the dense model and keep checkpoints, or take existing ones (`prepare`).
2. `expert_expansion`: the plan from n checkpoints to m experts (`expand`).
3. `router_initialization`: score seed data under each expert, start the router from them (`route`).
4. `model_upcycling`: the experts side by side in a MoE (`assemble`), trained on (`posttrain`), given out (`export`).

`assemble` runs before stage 3, which works on the assembled MoE. Stages never import each other.
"""

"""Trust on our own API: who listens how, who calls, and what they may.

`dialing` is a client's side, `listening` a server's; `authentication` finds out who calls, `guard`
lets through what a role may. `settings` are the blocks that both services have in their files.
"""

"""The modules that run inside a sandbox, handed over as text: standard library only, and no other module of ours."""

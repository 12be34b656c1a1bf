"""Robust graders judge what an answer says, however it is written. They import no JAX, so that workers start fast."""

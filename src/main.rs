//! The `registryfs` command.

fn main() {}

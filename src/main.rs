//! The `registryfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    // Before anything else: the helper must hold none of this process's descriptors, and start fast.
    registryfs::fuse::helper_main_if_asked().unwrap_or_else(registryfs::cli::main)
}

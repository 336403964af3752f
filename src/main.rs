//! The `registryfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    registryfs::cli::main()
}

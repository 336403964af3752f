//! The `registryfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(code) = registryfs::fuse::helper_main_if_asked() {
        return code;
    }
    ExitCode::SUCCESS
}

//! File descriptors: every layer in use has one, and a session of many images more than the 1024 that a process may have
//! by default.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Allows this process as many descriptors as it can without a privilege. Nothing here uses select(2), for which the
/// low default is kept. Where the limit cannot be raised, work goes on with what there is.
pub(super) fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}

//! Ends a connection that outlives its daemon.
//!
//! When a daemon dies the kernel closes its /dev/fuse, and every use of the mount fails. But a thread that waits in the kernel
//! for an answer which only the daemon itself could give ([`super::ahead`]) cannot be killed: it keeps the descriptor open, and
//! everyone who uses the mount waits for ever. So a helper process without that descriptor watches the daemon, from
//! before such a thread writes first, and ends the connection when the daemon is dead and still there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, geteuid, getppid};

use super::helper::{Done, Request};
use super::helper_process::{Helper, end};
use super::{detached_helper, fusermount};
use crate::error::{Error, Result};

/// How often the daemon is looked at. As long, at most, users of the mount wait after its death.
const LOOK_INTERVAL_MS: u16 = 1000;

/// A helper process that watches for as long as this is there.
#[derive(Debug)]
pub(super) struct DeathWatch {
    helper: Option<Child>,
    /// Closed with this, also when the process ends, which tells the helper.
    _socket: OwnedFd,
}

impl DeathWatch {
    /// Returns when this process is watched. Blocks.
    ///
    /// # Errors
    /// Where nobody here may end the connection, as in a container without fusectl; those of the helper.
    pub(super) fn start(helper: &Helper, device_number: &str) -> Result<Self> {
        let request = Request::WatchDeath {
            device: device_number.to_owned(),
        };
        let (done, child, socket) = helper.begin(&request)?;
        let watch = Self {
            helper: Some(child),
            _socket: socket,
        };
        match done {
            Done::Ok => Ok(watch),
            _ => Err(Helper::nonsense()),
        }
    }
}

impl Drop for DeathWatch {
    fn drop(&mut self) {
        if let Some(helper) = self.helper.take() {
            end(helper);
        }
    }
}

/// The helper's side.
pub(super) struct Watch {
    daemon: Pid,
    control: File,
}

impl Watch {
    /// Of this process's parent and its connection.
    pub(super) fn of(device: &str) -> Result<Self> {
        let file = match geteuid().is_root() {
            true => detached_helper::control_file(device)?,
            false => fusermount::control_file(device),
        };
        let absent = || {
            Error::unsupported(
                format!("ending the connection {device}"),
                "fusectl does not show it",
            )
        };
        Ok(Self {
            daemon: getppid(),
            control: file.ok_or_else(absent)?,
        })
    }

    /// Watches until the other side of the socket is closed.
    pub(super) fn keep(mut self) -> io::Result<()> {
        // For so long nobody's directory is kept busy.
        std::env::set_current_dir("/")?;
        while !has_closed(&io::stdin())? {
            if is_dead(self.daemon) {
                // Where the connection has ended by itself meanwhile this ends none.
                return self.control.write_all(b"1");
            }
        }
        Ok(())
    }
}

/// Whether the other side of the socket is closed, after a while.
fn has_closed(socket: &impl AsFd) -> io::Result<bool> {
    let mut sockets = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    match poll(&mut sockets, PollTimeout::from(LOOK_INTERVAL_MS)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a process has died, and something of it is left: its first thread is a zombie, others may wait in the kernel.
fn is_dead(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The name before it may have any characters.
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X'))
}

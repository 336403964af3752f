//! The daemon's side of the helper: starts one process an operation, waits for its answer up to a deadline, kills it.

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::fd_passing;
use super::helper::{Done, NewMount, Reply, Request, SUBCOMMAND, Unmount};
use super::mount::MountOptions;
use crate::error::{Error, Result};

/// How long a mount, an unmount or a question about one may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(15);
/// How long a fresh mount may take to answer; its first listing may have to ask a registry.
const CHECK_DEADLINE: Duration = Duration::from_secs(30);

/// How to start the helper: a process of its own for everything that touches a mountpoint.
#[derive(Debug, Clone)]
pub struct Helper {
    program: PathBuf,
}

/// A fresh mount, not served by anyone yet.
pub(super) struct Mounted {
    /// The descriptor over which the kernel sends its requests.
    pub(super) device: OwnedFd,
    /// The canonical mountpoint.
    pub(super) mountpoint: PathBuf,
    /// `major:minor` of the mount.
    pub(super) device_number: String,
}

/// What a helper says, with the descriptors that came along.
type Answered = (Done, Vec<OwnedFd>);

impl Helper {
    /// The program that runs now, also if its file has been replaced since.
    #[must_use]
    pub fn this_program() -> Self {
        Self::at("/proc/self/exe")
    }

    /// Another `registryfs` binary.
    pub fn at(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }

    /// Unmounts what is mounted at `mountpoint` if it is ours, whoever serves it. While it is busy this fails and names
    /// who uses it, unless `lazy` takes it out of the tree and lets them go on.
    pub fn unmount(&self, mountpoint: &Path, lazy: bool) -> Result<()> {
        let how = if lazy { Unmount::Lazy } else { Unmount::Idle };
        self.unmount_device(mountpoint, None, how)
    }

    /// Whether a live mount of ours is at `mountpoint`.
    pub fn is_mounted(&self, mountpoint: &Path) -> Result<bool> {
        match self.ask(mountpoint, &Request::IsMounted, &[], DEADLINE)? {
            (Done::Live { live }, _) => Ok(live),
            _ => Err(Self::nonsense()),
        }
    }

    /// Mounts.
    pub(super) fn mount(&self, options: &MountOptions) -> Result<Mounted> {
        let mountpoint = &options.mountpoint;
        let request = Request::Mount(NewMount {
            source: options.source.clone(),
            allow_other: options.allow_other,
            no_exec: options.no_exec,
            place: options.place.clone(),
        });
        let result = self.ask(mountpoint, &request, &[], DEADLINE);
        if let Err(Error::Timeout { .. } | Error::Io { .. }) = &result {
            // The helper may have been killed between mounting and answering.
            if let Err(error) = self.unmount_device(mountpoint, None, Unmount::Dead) {
                tracing::debug!(%error, "nothing to clean up after a failed mount");
            }
        }
        let (done, mut fds) = result?;
        match (done, fds.pop()) {
            (Done::Mounted { mountpoint, device }, Some(fd)) => Ok(Mounted {
                device: fd,
                mountpoint: PathBuf::from(OsString::from_vec(mountpoint)),
                device_number: device,
            }),
            _ => Err(Self::nonsense()),
        }
    }

    /// Sees that a new mount answers, where it can be walked to.
    pub(super) fn check(&self, mountpoint: &Path, device_number: &str, options: &MountOptions) -> Result<()> {
        let request = Request::Check {
            can_walk: options.place.is_none(),
            device: device_number.to_owned(),
            read_ahead_kib: options.read_ahead_kib,
        };
        self.ask(mountpoint, &request, &[], CHECK_DEADLINE).map(drop)
    }

    /// Unmounts one certain mount, or with no `device_number` ours at that place.
    pub(super) fn unmount_device(
        &self,
        mountpoint: &Path,
        device_number: Option<&str>,
        how: Unmount,
    ) -> Result<()> {
        let request = Request::Unmount {
            device: device_number.map(str::to_owned),
            how,
        };
        self.ask(mountpoint, &request, &[], DEADLINE).map(drop)
    }

    /// Asks a helper process for one operation on `mountpoint`, with copies of `fds`.
    pub(super) fn ask(
        &self,
        mountpoint: &Path,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<Answered> {
        let (child, _socket, answer) = self.exchange(mountpoint, request, fds, deadline)?;
        end(child);
        answer
    }

    /// Asks a helper process that goes on with it after it has answered, for as long as the socket is open.
    pub(super) fn begin(&self, request: &Request) -> Result<(Done, Child, OwnedFd)> {
        let (child, socket, answer) = self.exchange(Path::new("/"), request, &[], DEADLINE)?;
        match answer {
            Ok((done, _)) => Ok((done, child, socket)),
            Err(error) => {
                end(child);
                Err(error)
            }
        }
    }

    /// Starts a helper process and asks it: the process, the socket to it, and what it answers.
    fn exchange(
        &self,
        mountpoint: &Path,
        request: &Request,
        fds: &[BorrowedFd<'_>],
        deadline: Duration,
    ) -> Result<(Child, OwnedFd, Result<Answered>)> {
        let failed = |error: &io::Error| Error::io(format!("the helper {}", self.program.display()), error);
        let until = Instant::now() + deadline;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .map_err(|errno| failed(&errno.into()))?;
        let request = serde_json::to_vec(request).map_err(|error| failed(&error.into()))?;
        let child = Command::new(&self.program)
            .arg0("registryfs")
            .arg(SUBCOMMAND)
            .arg(mountpoint)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C at the terminal is for the daemon, which ends its helpers itself.
            .process_group(0)
            .spawn()
            .map_err(|error| failed(&error))?;
        let received = (|| {
            setsockopt(&socket, sockopt::SendTimeout, &left(until)?)?;
            fd_passing::send_message(&socket, &request, fds)?;
            fd_passing::receive_message(&socket, || {
                Ok(setsockopt(&socket, sockopt::ReceiveTimeout, &left(until)?)?)
            })
        })();
        let answer = match received {
            Ok(message) => serde_json::from_slice(&message.bytes)
                .map_err(|error| failed(&error.into()))
                .and_then(|reply: Reply| reply.map(|done| (done, message.fds))),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(Error::Timeout {
                    what: mountpoint.display().to_string(),
                    waited_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
                })
            }
            Err(error) => Err(failed(&error)),
        };
        Ok((child, socket, answer))
    }

    pub(super) fn nonsense() -> Error {
        Error::malformed("the helper's answer", "it answers another question")
    }
}

/// The time that is left, which as a timeout of a socket must not be zero.
fn left(until: Instant) -> io::Result<TimeVal> {
    let left = until.saturating_duration_since(Instant::now());
    match i64::try_from(left.as_micros()).unwrap_or(i64::MAX) {
        0 => Err(io::ErrorKind::TimedOut.into()),
        microseconds => Ok(TimeVal::microseconds(microseconds)),
    }
}

/// Ends a helper that has answered, or never will. A thread collects it, because one that hangs in the kernel does not
/// die at once even when killed.
pub(super) fn end(mut child: Child) {
    if let Ok(Some(_)) = child.try_wait() {
        return;
    }
    // One that has answered needs no more time: what it holds is ours by now.
    if let Err(error) = child.kill() {
        tracing::debug!(%error, "a mount helper could not be killed");
    }
    let collector = std::thread::Builder::new().name("helper-wait".into());
    if let Err(error) = collector.spawn(move || child.wait().map(drop)) {
        tracing::debug!(%error, "no thread to collect a mount helper");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Instant;

    use super::*;

    /// A helper that is a shell script. Another process writes it: a child of another test, forked meanwhile, would
    /// hold a descriptor of this one open for writing, and the kernel starts no program that is being written.
    fn script(dir: &Path, text: &str) -> Helper {
        let path = dir.join("helper");
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", write, "sh", text]).arg(&path);
        assert!(shell.status().unwrap().success());
        Helper::at(path)
    }

    #[test]
    fn a_helper_that_hangs_is_killed_after_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let hanging = script(
            dir.path(),
            &format!("echo $$ > {}; exec sleep 60", pid_file.display()),
        );
        let deadline = Duration::from_millis(300);
        let result = hanging.ask(dir.path(), &Request::IsMounted, &[], deadline);
        assert!(matches!(result, Err(Error::Timeout { waited_ms: 300, .. })));
        let pid = fs::read_to_string(pid_file).unwrap();
        let process = PathBuf::from(format!("/proc/{}", pid.trim()));
        let start = Instant::now();
        while process.exists() {
            assert!(start.elapsed() < Duration::from_secs(20), "the helper lives");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_helper_that_says_nothing_or_nonsense_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let silent = script(dir.path(), "exit 0");
        assert!(matches!(silent.is_mounted(dir.path()), Err(Error::Io { .. })));
        // It takes the question, of two pieces, first: one that is gone by then is another error.
        let talking = script(
            dir.path(),
            "dd bs=65536 count=2 of=/dev/null 2>&1; echo nonsense >&0",
        );
        let nonsense = talking.is_mounted(dir.path()).unwrap_err().to_string();
        assert!(nonsense.contains("no message"), "{nonsense}");
    }
}

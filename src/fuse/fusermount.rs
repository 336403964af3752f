//! The ordinary user's way to mount and unmount: through `fusermount3`, the setuid program that libfuse brings along.
//!
//! It is told a socket (`_FUSE_COMMFD`), over which it sends the descriptor of the new session; the socket is its standard
//! input, so no descriptor has to be kept open over exec by hand. What it complains about on standard error is never
//! translated, so the complaints that have a remedy can be told by their texts (libfuse, `util/fusermount.c`).

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::fd_passing;
use crate::error::{Error, Result};

/// The names that the program goes by: that of libfuse 3, and that of libfuse 2, which speaks the same protocol.
const NAMES: [&str; 2] = ["fusermount3", "fusermount"];
/// Where it is looked for if the environment says nothing.
const PATH_DEFAULT: &str = "/usr/local/bin:/usr/bin:/bin";
/// How long it may take: less than the helper itself, so that its end can still be told.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a program that is about to end is looked at.
const EXIT_POLL: Duration = Duration::from_millis(2);
/// The most that is read of its complaint, in bytes.
const COMPLAINT_BYTES_MAX: usize = 4096;
/// Mode bit of a setuid program (inode(7)).
const SETUID: u32 = 0o4000;

/// The installed program.
#[derive(Debug)]
pub(super) struct Fusermount {
    program: PathBuf,
    deadline: Duration,
}

/// How a run of it ended.
struct Ended {
    device: Option<OwnedFd>,
    is_success: bool,
    complaint: String,
}

/// A value as it can stand among its options, where commas separate and backslashes escape.
pub(super) fn escaped(value: &str) -> String {
    let escape = |c: char| matches!(c, ',' | '\\').then_some('\\').into_iter().chain([c]);
    value.chars().flat_map(escape).collect()
}

impl Fusermount {
    /// The first one in `PATH`.
    ///
    /// # Errors
    /// [`Error::Usage`] with the remedy where there is none.
    pub(super) fn find() -> Result<Self> {
        Self::find_in(&std::env::var_os("PATH").unwrap_or_else(|| PATH_DEFAULT.into()))
    }

    fn find_in(path: &OsStr) -> Result<Self> {
        let dirs: Vec<PathBuf> = std::env::split_paths(path)
            .filter(|dir| dir.is_absolute())
            .collect();
        let candidates = NAMES
            .iter()
            .flat_map(|name| dirs.iter().map(move |dir| dir.join(name)));
        let program = candidates.into_iter().find(|file| file.is_file());
        let found = program.map(|program| Self {
            program,
            deadline: DEADLINE,
        });
        found.ok_or_else(|| {
            Error::usage(
                "fusermount3 is not installed, without which only root can mount; install the package fuse3",
            )
        })
    }

    /// Mounts with `options` and returns the descriptor of the session.
    ///
    /// # Errors
    /// What it complains about, with the remedy; [`Error::Timeout`] where it hangs.
    pub(super) fn mount(&self, mountpoint: &Path, options: &str) -> Result<OwnedFd> {
        let arguments = ["-o", options, "--"].map(OsString::from);
        let ended = self.run(&arguments, mountpoint)?;
        match ended.device {
            Some(device) if ended.is_success => Ok(device),
            _ => Err(self.refusal(
                &format!("cannot mount on {}", mountpoint.display()),
                &ended.complaint,
            )),
        }
    }

    /// Unmounts; `lazy` takes the mount out of the tree and lets its users go on.
    ///
    /// # Errors
    /// As [`Self::mount`]; [`Error::Busy`] while someone uses the mount.
    pub(super) fn unmount(&self, mountpoint: &Path, lazy: bool) -> Result<()> {
        let arguments: &[&str] = if lazy { &["-u", "-z", "--"] } else { &["-u", "--"] };
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let ended = self.run(&arguments, mountpoint)?;
        let what = format!("cannot unmount {}", mountpoint.display());
        match ended.is_success {
            true => Ok(()),
            false if ended.complaint.contains("Device or resource busy") => {
                Err(Error::busy(what, "it is in use"))
            }
            false => Err(self.refusal(&what, &ended.complaint)),
        }
    }

    fn run(&self, arguments: &[OsString], mountpoint: &Path) -> Result<Ended> {
        let failed = |error: &io::Error| Error::io(self.program.display().to_string(), error);
        let until = Instant::now() + self.deadline;
        let pair = || UnixStream::pair().map_err(|error| failed(&error));
        let ((socket, its_socket), (stderr, its_stderr)) = (pair()?, pair()?);
        let child = Command::new(&self.program)
            .args(arguments)
            .arg(mountpoint)
            .env("_FUSE_COMMFD", "0")
            .stdin(OwnedFd::from(its_socket))
            .stdout(Stdio::null())
            .stderr(OwnedFd::from(its_stderr))
            .spawn()
            .map_err(|error| failed(&error))?;
        let mut child = Killed(child);
        let outcome = (|| {
            let device = receive_device(&socket, until)?;
            let complaint = read_complaint(stderr, until)?;
            let is_success = child.wait(until)?;
            Ok(Ended {
                device,
                is_success,
                complaint,
            })
        })();
        outcome.map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Error::Timeout {
                what: format!("{} {}", self.program.display(), mountpoint.display()),
                waited_ms: u64::try_from(self.deadline.as_millis()).unwrap_or(u64::MAX),
            },
            _ => failed(&error),
        })
    }

    /// What a complaint means, and what helps.
    fn refusal(&self, what: &str, complaint: &str) -> Error {
        let remedy = remedy(complaint).map_or_else(|| self.remedy_for_rights(complaint), str::to_owned);
        let said = match complaint.trim() {
            "" => format!("{} says nothing about why", self.program.display()),
            complaint => complaint.replace('\n', "; "),
        };
        Error::usage(format!("{what}: {said}{remedy}"))
    }

    /// What helps where the kernel refuses: the program lacks the rights that it should have.
    fn remedy_for_rights(&self, complaint: &str) -> String {
        if !complaint.contains("Operation not permitted") {
            return String::new();
        }
        let is_setuid = std::fs::metadata(&self.program)
            .is_ok_and(|metadata| metadata.uid() == 0 && metadata.mode() & SETUID != 0);
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        if !is_setuid {
            let program = self.program.display();
            return format!("; it is not setuid root: reinstall the package fuse3, or chmod u+s {program}");
        }
        if status.lines().any(|line| line.trim_end() == "NoNewPrivs:\t1") {
            return "; this process may not gain rights (NoNewPrivileges): mount outside of it".to_owned();
        }
        "; the system does not let it mount here, as in a container without CAP_SYS_ADMIN".to_owned()
    }
}

/// What helps against a complaint that names its cause.
fn remedy(complaint: &str) -> Option<&'static str> {
    let remedies = [
        (
            "user_allow_other",
            "; leave allow_other out, or ask root for a line user_allow_other in /etc/fuse.conf",
        ),
        (
            "mount_max",
            "; unmount something, or ask root for a higher mount_max in /etc/fuse.conf",
        ),
        (
            "has no write access to mountpoint",
            "; mount on a directory of your own, such as ~/images",
        ),
        (
            "not owned by user",
            "; mount on a directory of your own, such as ~/images",
        ),
        (
            "mounting over filesystem type",
            "; mount on a directory of a local filesystem",
        ),
        ("modprobe fuse", ""),
        (
            "failed to open /dev/fuse: Permission denied",
            "; ask root to let users open it: chmod 666 /dev/fuse",
        ),
        (
            "failed to open /dev/fuse",
            "; the kernel's FUSE module is not loaded, or the device is missing in this container",
        ),
        (
            "could not determine username",
            ": this user has no name here; ask root for a line in /etc/passwd",
        ),
        (
            "not found in /",
            ": another user mounted it, who or root can unmount it",
        ),
    ];
    remedies
        .into_iter()
        .find(|(text, _)| complaint.contains(text))
        .map(|(_, remedy)| remedy)
}

/// What is left of the time, never nothing, which would mean to wait for ever.
fn left(until: Instant) -> Duration {
    until
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

/// The descriptor, or nothing if the other side closes without one.
fn receive_device(socket: &UnixStream, until: Instant) -> io::Result<Option<OwnedFd>> {
    let mut buffer = [0; 16];
    loop {
        socket.set_read_timeout(Some(left(until)))?;
        match fd_passing::receive(socket, &mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            received => return received.map(|(_, devices)| devices.into_iter().next()),
        }
    }
}

fn read_complaint(mut stderr: UnixStream, until: Instant) -> io::Result<String> {
    let mut text = Vec::new();
    let mut buffer = [0; 512];
    loop {
        stderr.set_read_timeout(Some(left(until)))?;
        match stderr.read(&mut buffer) {
            Ok(0) => return Ok(String::from_utf8_lossy(&text).trim().to_owned()),
            Ok(length) => {
                let room = COMPLAINT_BYTES_MAX.saturating_sub(text.len());
                text.extend_from_slice(buffer.get(..length.min(room)).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if Instant::now() >= until {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

/// A child that does not outlive the wait for it. One that hangs in the kernel is not waited for.
struct Killed(Child);

impl Killed {
    /// Whether it ended well.
    fn wait(&mut self, until: Instant) -> io::Result<bool> {
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.success());
            }
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(EXIT_POLL);
        }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // A setuid program can be killed by who started it: its real user is the same. One that has ended is not there.
        let _ = self.0.kill();
        let _ = self.0.try_wait();
    }
}

/// Ends the connection of a mount of this user, so that every use of it fails: what MNT_FORCE does for root. Without
/// fusectl that has to wait until the daemon is gone.
pub(super) fn abort(device_number: &str) {
    if let Some(mut file) = control_file(device_number) {
        let _ = file.write_all(b"1");
    }
}

/// The file by which the connection of a mount of this user is ended, where fusectl is mounted.
pub(super) fn control_file(device_number: &str) -> Option<File> {
    let minor = device_number.split(':').nth(1).unwrap_or_default();
    let is_number = minor.bytes().all(|byte| byte.is_ascii_digit()) && !minor.is_empty();
    let path = format!("/sys/fs/fuse/connections/{minor}/abort");
    is_number
        .then(|| File::options().write(true).open(path).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program of this name that is a shell script, written by another process: a child of another test, forked
    /// meanwhile, would hold it open for writing, and the kernel starts no program that is being written.
    fn script(dir: &Path, name: &str, text: &str) -> Fusermount {
        let path = dir.join(name);
        let write = "printf '#!/bin/sh\\n%s\\n' \"$1\" > \"$2\" && chmod 755 \"$2\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", write, "sh", text]).arg(&path);
        assert!(shell.status().unwrap().success());
        Fusermount::find_in(dir.as_os_str()).unwrap()
    }

    fn refused(text: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "fusermount3", &format!("echo '{text}' >&2; exit 1"));
        let error = program.mount(Path::new("/m"), "ro").unwrap_err();
        assert!(matches!(error, Error::Usage { .. }), "{error:?}");
        error.to_string()
    }

    #[test]
    fn the_newer_program_is_taken_and_its_absence_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Fusermount::find_in(dir.path().as_os_str()).unwrap_err();
        assert!(
            missing.to_string().contains("install the package fuse3"),
            "{missing}"
        );
        let old = script(dir.path(), "fusermount", "exit 0");
        assert_eq!(old.program, dir.path().join("fusermount"));
        let new = script(dir.path(), "fusermount3", "exit 0");
        assert_eq!(new.program, dir.path().join("fusermount3"));
    }

    #[test]
    fn each_complaint_gets_its_remedy() {
        for (complaint, remedy) in [
            (
                "fusermount3: option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf",
                "leave allow_other out",
            ),
            (
                "fusermount3: too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf",
                "unmount something",
            ),
            (
                "fusermount3: user has no write access to mountpoint /m",
                "directory of your own",
            ),
            (
                "fusermount3: failed to open /dev/fuse: Permission denied",
                "chmod 666",
            ),
            (
                "fusermount3: mount failed: Operation not permitted",
                "not setuid root",
            ),
        ] {
            let said = refused(&complaint.replace('\'', "'\\''"));
            assert!(
                said.contains("cannot mount on /m") && said.contains(remedy),
                "{said}"
            );
            assert!(said.contains(complaint), "its own words are kept: {said}");
        }
        assert!(refused("something new").ends_with("something new"));
    }

    #[test]
    fn success_without_a_descriptor_is_none_and_a_silent_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let program = script(dir.path(), "fusermount3", "exit 0");
        let error = program.mount(Path::new("/m"), "ro").unwrap_err().to_string();
        assert!(error.contains("says nothing"), "{error}");
        program.unmount(Path::new("/m"), true).unwrap();
    }

    #[test]
    fn one_that_hangs_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        // Once while it has the socket still, once when only its end is missing.
        for text in ["exec sleep 60", "exec sleep 60 <&- 2>&-"] {
            let text = format!("echo $$ > {}; {text}", pid_file.display());
            let program = Fusermount {
                deadline: Duration::from_millis(300),
                ..script(dir.path(), "fusermount3", &text)
            };
            let error = program.mount(Path::new("/m"), "ro").unwrap_err();
            assert!(
                matches!(error, Error::Timeout { waited_ms: 300, .. }),
                "{error:?}"
            );
            let process = std::fs::read_to_string(&pid_file).unwrap();
            let process = PathBuf::from(format!("/proc/{}/exe", process.trim()));
            let start = Instant::now();
            while std::fs::read_link(&process).is_ok() {
                assert!(start.elapsed() < Duration::from_secs(20), "it lives");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn a_busy_mount_is_told_from_other_failures() {
        let dir = tempfile::tempdir().unwrap();
        let text = "echo 'fusermount3: failed to unmount /m: Device or resource busy' >&2; exit 1";
        let program = script(dir.path(), "fusermount3", text);
        let error = program.unmount(Path::new("/m"), false).unwrap_err();
        assert!(matches!(error, Error::Busy { .. }), "{error:?}");
    }
}

//! One run of a credential helper (`docker-credential-NAME get`, the protocol of docker's helpers): it reads what it is
//! asked for from its standard input, and prints JSON with a user name and a secret.
//!
//! A helper is someone else's program, so everything about it has a bound: how long it runs, how much it prints, what
//! of that is shown. It runs in a process group of its own, and all of the group is killed when it did not do its
//! work. Nothing that it prints on standard output is shown: it may be a secret.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep_until, timeout};

use super::places::CredentialEnvironment;
use super::{Identity, password_identity};
use crate::registry::secret::one_line;

/// What every helper's program is called, before its name.
const PROGRAM_PREFIX: &str = "docker-credential-";
/// Longest name of a helper, in bytes.
const NAME_BYTES_MAX: usize = 100;
/// Most that a helper may print.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Of its complaints so much is kept.
const COMPLAINT_BYTES_MAX: usize = 4 << 10;
/// Of its complaints so much is shown.
const COMPLAINT_CHARS_MAX: usize = 200;
/// How long after its end a helper's output is waited for: something that it left behind may hold the pipes.
const GRACE: Duration = Duration::from_millis(200);
/// What a helper prints that has nothing (docker's helpers know no other way to say it).
const NOT_FOUND: &str = "credentials not found in native keychain";
/// Not for others' programs.
const OWN_SECRET: &str = "REGISTRYFS_CREDENTIAL";

/// What a helper said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    Found(Identity),
    Nothing,
    /// It failed, and how, as the end of a sentence.
    Failed(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(alias = "username", default)]
    username: String,
    #[serde(alias = "secret", default)]
    secret: String,
}

/// The name of the program of the helper `name`.
pub(super) fn program(name: &str) -> String {
    format!("{PROGRAM_PREFIX}{name}")
}

/// Asks the helper `name` for `server`, for at most `within`.
pub(super) async fn ask(
    environment: &CredentialEnvironment,
    name: &str,
    server: &str,
    within: Duration,
) -> Said {
    let failed = |why: &str| Said::Failed(why.to_owned());
    if !is_name(name) {
        return failed("has a name that no helper can have");
    }
    let started = Instant::now();
    // Neither looking for a program nor starting one belongs on an async thread.
    let (program, environment) = (program(name), environment.clone());
    let starting = tokio::task::spawn_blocking(move || start(&program, &environment));
    let mut child = match timeout(within, starting).await {
        Ok(Ok(Ok(child))) => child,
        Ok(Ok(Err(why))) => return Said::Failed(why),
        Ok(Err(_)) => return failed("could not be started"),
        Err(_) => {
            return Said::Failed(format!(
                "could not be started within {:.0} s",
                within.as_secs_f32()
            ));
        }
    };
    // Dropped before the child is: until then its number, which names the group, is nobody else's.
    let group = Group::of(&child);
    let rest = within.saturating_sub(started.elapsed());
    match timeout(rest, converse(&mut child, server)).await {
        Ok(Ok(output)) => {
            group.leave();
            output.meaning()
        }
        Ok(Err(why)) => Said::Failed(why),
        Err(_) => Said::Failed(format!(
            "did not answer within {:.0} s and was killed",
            within.as_secs_f32()
        )),
    }
}

/// A helper's name is a part of a file's name.
fn is_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'+');
    !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(allowed)
}

fn start(program: &str, environment: &CredentialEnvironment) -> Result<Child, String> {
    let Some(path) = find(program, environment.path.as_deref()) else {
        return Err(match &environment.path {
            Some(path) => format!("is not in $PATH ({})", one_line(&path.to_string_lossy(), 300)),
            None => "cannot be looked for: there is no $PATH".to_owned(),
        });
    };
    let spawned = command(&path, environment.home.as_deref()).spawn();
    spawned.map_err(|error| format!("could not be started: {error}"))
}

fn command(program: &Path, home: Option<&Path>) -> Command {
    let mut command = Command::new(program);
    command
        .arg("get")
        .current_dir("/")
        .env_remove(OWN_SECRET)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    // Helpers look for their stores there, and a service may have none.
    if let Some(home) = home {
        command.env("HOME", home);
    }
    command
}

/// The program in `path`. Relative parts of that are left out: the working directory is not ours to trust.
fn find(program: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    let is_program = |path: &PathBuf| {
        let metadata = std::fs::metadata(path);
        metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(path?)
        .filter(|folder: &PathBuf| Path::is_absolute(folder))
        .map(|folder| folder.join(program))
        .find(is_program)
}

/// The process group of a helper, killed when dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        Self(id.map(Pid::from_raw))
    }

    /// Whatever it left behind may stay.
    fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0
            && let Err(error) = killpg(group, Signal::SIGKILL)
        {
            tracing::debug!(%error, "a credential helper could not be killed");
        }
    }
}

/// What a helper left when it ended. No debug form: the output may be a secret.
struct Output {
    status: ExitStatus,
    output: Vec<u8>,
    complaint: Vec<u8>,
}

/// Tells the helper what it is asked for, and reads until it ends. The error is how it failed.
async fn converse(child: &mut Child, server: &str) -> Result<Output, String> {
    let (Some(mut stdin), Some(mut stdout), Some(mut stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err("could not be started".to_owned());
    };
    let lost = |error: std::io::Error| format!("cannot be listened to: {error}");
    // One that does not want to hear it may still answer. What is written fits into any pipe.
    let _ = stdin.write_all(server.as_bytes()).await;
    drop(stdin);
    let (mut output, mut complaint) = (Vec::new(), Vec::new());
    let (mut stdout_open, mut stderr_open) = (true, true);
    let mut piece = [0; 4096];
    let mut ended: Option<(ExitStatus, Instant)> = None;
    loop {
        if let Some((status, _)) = ended
            && !stdout_open
            && !stderr_open
        {
            return Ok(Output {
                status,
                output,
                complaint,
            });
        }
        let until = ended.map(|(_, until)| until);
        tokio::select! {
            read = stdout.read_buf(&mut output), if stdout_open => {
                stdout_open = read.map_err(lost)? > 0;
                if output.len() > OUTPUT_BYTES_MAX {
                    return Err(format!("printed more than {OUTPUT_BYTES_MAX} bytes"));
                }
            }
            read = stderr.read(&mut piece), if stderr_open => {
                let bytes = read.map_err(lost)?;
                stderr_open = bytes > 0;
                let room = COMPLAINT_BYTES_MAX - complaint.len();
                complaint.extend(piece.iter().take(bytes.min(room)));
            }
            status = child.wait(), if ended.is_none() => {
                ended = Some((status.map_err(lost)?, Instant::now() + GRACE));
            }
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {
                (stdout_open, stderr_open) = (false, false);
            }
        }
    }
}

impl Output {
    fn meaning(&self) -> Said {
        if !self.status.success() {
            let said = String::from_utf8_lossy(&self.output);
            if said.trim().eq_ignore_ascii_case(NOT_FOUND) {
                return Said::Nothing;
            }
            return Said::Failed(self.complaint());
        }
        let Ok(answer) = serde_json::from_slice::<Answer>(&self.output) else {
            return Said::Failed("printed something else than credentials".to_owned());
        };
        if answer.secret.is_empty() {
            return Said::Nothing;
        }
        Said::Found(password_identity(&answer.username, &answer.secret))
    }

    fn complaint(&self) -> String {
        let text = String::from_utf8_lossy(&self.complaint);
        let text = one_line(&text, COMPLAINT_CHARS_MAX);
        match text.is_empty() {
            true => format!("failed ({})", self.status),
            false => format!("failed ({}): {text}", self.status),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_gets_the_home_directory_and_not_our_secret() {
        let command = command(Path::new("/bin/true"), Some(Path::new("/home/u")));
        let given: Vec<_> = command.as_std().get_envs().collect();
        let expected = [
            (OsStr::new("HOME"), Some(OsStr::new("/home/u"))),
            (OsStr::new(OWN_SECRET), None),
        ];
        assert_eq!(given, expected);
    }

    #[test]
    fn a_name_is_one_part_of_a_file_name() {
        for name in ["pass", "desktop.exe", "ecr-login", "gcr_2"] {
            assert!(is_name(name), "{name}");
        }
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for name in ["", "a/b", "../x", "a b", "a\0", "ä", &long] {
            assert!(!is_name(name), "{name}");
        }
    }
}
